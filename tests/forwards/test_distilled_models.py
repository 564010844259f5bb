"""Logits of real networks: the term is that of the recipe by hand, or a regression where classes are others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import LogitDistillation, RepresentationTransfer, TransferWarning

IDS = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(4, 9, dtype=torch.long)
MASK[0, 5:] = MASK[2, 3:] = 0
OTHER_MASK = torch.ones(4, 9, dtype=torch.long)
OTHER_MASK[1, 6:] = 0


def images(size: int = 64, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def by_hand(student: Tensor, teacher: Tensor, axis: int = 1, mask: Tensor | None = None) -> float:
    """T² KL, the mean over valid positions."""
    student, teacher = (logits.movedim(axis, -1).flatten(0, -2) for logits in (student, teacher))
    if mask is not None:
        student, teacher = (logits[mask.flatten() != 0] for logits in (student, teacher))
    soft, target = (F.log_softmax(logits / 4, -1) for logits in (student, teacher))
    return float(16 * F.kl_div(soft, target, reduction="batchmean", log_target=True))


def distil(
    student: nn.Module, teacher: nn.Module, call: Callable[[nn.Module], Any], layers: Any = "auto", **options: Any
) -> tuple[float, Any, Any, str]:
    """The value of the term, the outputs of both networks, and what the log says."""
    options = {"weight": 0, "distillation": 1.0, **options}
    transfer, lines = RepresentationTransfer(teacher, layers, **options), []
    transfer.report = lines.append
    with transfer.attached(student):
        output = call(student)
        transfer.loss().backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters())
    with torch.no_grad():
        target = call(copy.deepcopy(teacher).eval())
    assert transfer.distillation_value is not None
    return float(transfer.distillation_value), output, target, lines[0].splitlines()[-1]


def identity(output: Any) -> Any:
    return output


class Found(NamedTuple):
    embedding: Tensor
    logits: Tensor


class WithFeatures(nn.Module):
    """Returns what enters its head, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU()), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Found:
        embedding = self.body(x)
        return Found(embedding, self.head(embedding))


class TestImages:
    @pytest.mark.parametrize("classes", [10, 20])
    @pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v3_small", marks=pytest.mark.slow)])
    def test_torchvision(self, name, classes):
        models = pytest.importorskip("torchvision.models")
        student, teacher = getattr(models, name)(num_classes=10), models.resnet34(num_classes=classes)
        value, output, target, said = distil(student, teacher, lambda net: net(images()))
        if classes == 10:
            assert value == pytest.approx(by_hand(output.detach(), target), rel=1e-4)
            assert "KL of 10 classes" in said
        else:
            assert 0 <= value < 1.5
            assert f"regressed on {'fc:input' if name == 'resnet18' else 'classifier.2:input'!r}" in said

    @pytest.mark.parametrize("select", [None, "logits", 1])
    def test_a_named_tuple_whose_first_item_are_no_logits(self, select):
        """Its logits are found by name in the trace as in a step."""
        nets = [seeded(seed, WithFeatures, width) for seed, width in enumerate((6, 8))]
        option = LogitDistillation(1.0, select=select)
        value, output, target, said = distil(*nets, lambda net: net(images(8)), ["body"], distillation=option)
        assert value == pytest.approx(by_hand(output.logits.detach(), target.logits), rel=1e-4)
        assert "KL of 10 classes" in said

    @pytest.mark.slow
    def test_an_output_that_is_another_one_in_training(self):
        """GoogLeNet returns auxiliary logits only in training."""
        models = pytest.importorskip("torchvision.models")
        student = models.googlenet(num_classes=10, init_weights=False, aux_logits=True)
        value, output, target, _ = distil(student, models.resnet18(num_classes=10), lambda net: net(images(96)))
        assert value == pytest.approx(by_hand(output.logits.detach(), target), rel=1e-4)

    @pytest.mark.parametrize("classes", [10, 12])
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
            pytest.param("convnext_atto", {}, marks=pytest.mark.slow),
        ],
    )
    def test_timm(self, name, options, classes):
        timm = pytest.importorskip("timm")
        student = timm.create_model(name, num_classes=10, **options)
        teacher = timm.create_model("resnet10t", num_classes=classes)
        value, output, target, said = distil(student, teacher, lambda net: net(images()))
        if classes == 10:
            assert value == pytest.approx(by_hand(output.detach(), target), rel=1e-4)
        else:
            assert "regressed on 'head" in said


class TestSegmentation:
    def make(self, name: str, classes: int, aux: bool = False) -> nn.Module:
        models = pytest.importorskip("torchvision.models.segmentation")
        options = {"aux_loss": True} if aux else {}
        return getattr(models, name)(weights=None, weights_backbone=None, num_classes=classes, **options)

    def test_each_pixel(self):
        student, teacher = self.make("deeplabv3_mobilenet_v3_large", 5), self.make("lraspp_mobilenet_v3_large", 5)
        value, output, target, _ = distil(student, teacher, lambda net: net(images()))
        assert value == pytest.approx(by_hand(output["out"].detach(), target["out"]), rel=1e-4)

    @pytest.mark.slow
    def test_other_classes_by_the_head_of_the_chosen_output(self):
        student, teacher = self.make("deeplabv3_mobilenet_v3_large", 5, True), self.make("fcn_resnet50", 7)
        value, _, _, said = distil(student, teacher, lambda net: net(images(count=8)))
        assert 0 <= value < 1.5
        assert "regressed on 'classifier.4:input'" in said

    def test_an_auxiliary_output(self):
        student, teacher = self.make("deeplabv3_mobilenet_v3_large", 5, True), self.make("lraspp_mobilenet_v3_large", 5)
        option = LogitDistillation(select=("aux", "out"))
        value, output, target, _ = distil(student, teacher, lambda net: net(images()), distillation=option)
        assert value == pytest.approx(by_hand(output["aux"].detach(), target["out"]), rel=1e-4)

    def test_a_map_of_another_size_is_resized_to_the_students(self):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16, "depths": [1] * 4}
        config = transformers.SegformerConfig(num_labels=5, num_attention_heads=[1] * 4, **sizes)
        student = transformers.SegformerForSemanticSegmentation(config).eval()
        teacher = self.make("lraspp_mobilenet_v3_large", 5)
        value, output, target, _ = distil(student, teacher, lambda net: net(images()))
        assert output.logits.shape[2:] == (16, 16)
        resized = F.interpolate(target["out"], (16, 16), mode="bilinear", antialias=True)
        assert value == pytest.approx(by_hand(output.logits.detach(), resized), rel=1e-4)


class TestText:
    def make(self, kind: str, classes: int, width: int = 16) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 50, "hidden_size": width, "num_hidden_layers": 2, "max_position_embeddings": 32}
        more = {"num_attention_heads": 2, "intermediate_size": 32, "num_labels": classes}
        return getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**sizes, **more)).eval()

    @pytest.mark.parametrize("by_name", [True, False])
    @pytest.mark.parametrize("classes", [3, 5])
    def test_classification_of_sequences(self, classes, by_name):
        student, teacher = self.make("SequenceClassification", 3), self.make("SequenceClassification", classes, 32)
        value, output, target, said = distil(
            student, teacher, lambda net: net(input_ids=IDS, attention_mask=MASK) if by_name else net(IDS, MASK)
        )
        if classes == 3:
            assert value == pytest.approx(by_hand(output.logits.detach(), target.logits), rel=1e-3, abs=1e-6)
        else:
            assert "regressed on 'dropout:input'" in said

    @pytest.mark.parametrize(
        "call",
        [
            lambda net: net(input_ids=IDS, attention_mask=MASK),
            lambda net: net(IDS, MASK),
            lambda net: net(IDS, MASK, return_dict=False),
            lambda net: net(IDS, MASK, labels=IDS % 3),
        ],
        ids=["by name", "by position", "a tuple", "with labels"],
    )
    def test_padding_is_left_out_of_the_classification_of_tokens(self, call):
        student, teacher = self.make("TokenClassification", 3), self.make("TokenClassification", 3, 32)
        value, output, target, _ = distil(student, teacher, call)
        logits, wanted = (getattr(found, "logits", found[0]) for found in (output, target))
        assert value == pytest.approx(by_hand(logits.detach(), wanted, -1, MASK), rel=1e-3)
        assert value != pytest.approx(by_hand(logits.detach(), wanted, -1), rel=1e-3)

    def test_other_classes_of_tokens(self):
        """What stands in the padding changes nothing."""
        student, teacher = self.make("TokenClassification", 3), self.make("TokenClassification", 5, 32)
        values = []
        for ids in (IDS, torch.where(MASK == 1, IDS, 7)):
            value, _, _, said = distil(student, teacher, lambda net, ids=ids: net(ids, MASK))
            values.append(value)
            assert "regressed on 'dropout:input'" in said
        assert values[0] == pytest.approx(values[1], rel=1e-4)

    def test_a_loss_in_front_of_the_logits(self):
        student, teacher = self.make("TokenClassification", 3), self.make("TokenClassification", 3, 32)

        def call(net: nn.Module) -> Any:
            return net(IDS, MASK, labels=IDS % 3, return_dict=False)

        with pytest.raises(TypeError, match=r"tuple\(float32 \(\), float32 \(4, 9, 3\)\).*LogitDistillation\(select"):
            distil(student, teacher, call)
        value, output, target, _ = distil(student, teacher, call, distillation=LogitDistillation(select=1))
        assert value == pytest.approx(by_hand(output[1].detach(), target[1], -1, MASK), rel=1e-3)

    @pytest.mark.parametrize(("width", "select"), [(8, None), (12, None), (12, 1)])
    def test_features_in_front_of_the_logits_are_told(self, width, select):
        class Both(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.body, self.head = nn.Sequential(nn.Linear(6, width), nn.ReLU()), nn.Linear(width, 4)

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                features = self.body(x)
                return nn.functional.normalize(features), self.head(features)

        option = LogitDistillation(select=select)
        transfer = RepresentationTransfer(Both(width), ["body"], weight=0.0, distillation=option)
        with warnings.catch_warnings(record=True) as caught, transfer.attached(student := Both(8)):
            warnings.simplefilter("always")
            student(torch.randn(16, 6))
            transfer.loss()
        told = [str(warning.message) for warning in caught if "one made the item 1" in str(warning.message)]
        assert len(told) == (select is None)

    def test_an_encoder_has_no_logits(self):
        transformers = pytest.importorskip("transformers")
        student = self.make("TokenClassification", 3)
        teacher = transformers.BertModel(self.make("TokenClassification", 3).config)
        with pytest.raises(TypeError, match="teacher.*last_hidden_state: float32.*Name the key"):
            distil(student, teacher, lambda net: net(IDS, MASK))

    def test_a_language_model(self):
        transformers = pytest.importorskip("transformers")
        tokens = {"vocab_size": 50, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
        student, teacher = (
            transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=width, n_layer=2, n_head=2, **tokens)).eval()
            for width in (16, 32)
        )
        value, output, target, _ = distil(student, teacher, lambda net: net(IDS, attention_mask=MASK))
        assert value == pytest.approx(by_hand(output.logits.detach(), target.logits, -1, MASK), rel=1e-3)

    def test_the_decoder_of_an_encoder_and_decoder_has_its_own_mask(self):
        """Both sequences have nine tokens, and other padding."""
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 50, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        student, teacher = (
            transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=width, **sizes)).eval()
            for width in (16, 32)
        )
        value, output, target, _ = distil(
            student,
            teacher,
            lambda net: net(
                input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS, decoder_attention_mask=OTHER_MASK
            ),
        )
        assert value == pytest.approx(by_hand(output.logits.detach(), target.logits, -1, OTHER_MASK), rel=1e-3)


class Sequence(nn.Module):
    def __init__(self, width: int, batch_first: bool) -> None:
        super().__init__()
        self.embedding, self.batch_first = nn.Embedding(50, width), batch_first
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=src_key_padding_mask)
        return self.head(x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_tokens_of_plain_transformers(batch_first):
    value, output, target, _ = distil(
        Sequence(16, batch_first),
        Sequence(32, batch_first),
        lambda net: net(IDS, src_key_padding_mask=MASK == 0),
        {"head:input": "head:input"},
    )
    if not batch_first:
        output, target = output.transpose(0, 1), target.transpose(0, 1)
    assert value == pytest.approx(by_hand(output.detach(), target, -1, MASK), rel=1e-4)


def convolutions(dims: int, width: int, classes: int) -> nn.Module:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(kind(3, width, 3, padding=1), nn.ReLU(), kind(width, classes, 1))


@pytest.mark.parametrize("classes", [3, 6])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_signals_images_and_volumes(dims, classes):
    x = torch.randn(4, 3, *[8] * dims)
    student, teacher = convolutions(dims, 8, 3), convolutions(dims, 16, classes)
    value, output, target, said = distil(student, teacher, lambda net: net(x), {"1": "1"})
    if classes == 3:
        assert value == pytest.approx(by_hand(output.detach(), target), rel=1e-4)
    else:
        assert "regressed on '2:input'" in said


class FeaturesFirst(nn.Module):
    """Returns its features and its logits, in one order or the other."""

    def __init__(self, width: int, classes: int, *, first: bool = True) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, width), nn.ReLU()), nn.Linear(width, classes)
        self.first = first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        logits = self.head(features)
        return (features, logits) if self.first else (logits, features)


class TestFeaturesFirst:
    x = torch.randn(16, 4)

    @pytest.mark.parametrize("classes", [5, 12])
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_is_warned_of(self, side, classes):
        """Of a teacher with as many features as the student has classes nothing else would show it."""
        student = FeaturesFirst(8, 12, first=side == "student")
        teacher = FeaturesFirst(12, classes, first=side == "teacher")
        with pytest.warns(TransferWarning, match=f"first item of what the {side} returns") as caught:
            distil(student, teacher, lambda net: net(self.x), {"body": "body"})
        wanted = "select=(1, None)" if side == "student" else "select=(None, 1)"
        assert any(wanted in str(warning.message) for warning in caught)

    def test_what_the_warning_says_works(self):
        student, teacher = FeaturesFirst(8, 12, first=False), FeaturesFirst(12, 12)
        option = LogitDistillation(select=(None, 1))
        value, output, target, _ = distil(
            student, teacher, lambda net: net(self.x), {"body": "body"}, distillation=option
        )
        assert value == pytest.approx(by_hand(output[0].detach(), target[1]), rel=1e-4)


class Functional(nn.Module):
    """A head that is no module; three axes, of which none is known to be that of the classes."""

    def __init__(self, width: int, classes: int, last: bool) -> None:
        super().__init__()
        self.body, self.other = nn.Linear(4, width), nn.Linear(2, 2)
        self.head, self.last = nn.Parameter(torch.randn(classes, width)), last

    def forward(self, x: Tensor) -> Tensor:
        logits = F.normalize(self.body(x), dim=-1) @ self.head.T
        return logits if self.last else logits.transpose(1, 2)


class TestAmbiguous:
    def test_the_axis_of_the_classes_has_to_be_given(self):
        x = torch.randn(4, 6, 4)
        student, teacher = Functional(5, 3, False), Functional(8, 3, False)
        with pytest.raises(ValueError, match=r"\(class_axis=1\) for \(B, K, T\) or .*class_axis=-1"):
            distil(student, teacher, lambda net: net(x), {"body": "body"})
        option = LogitDistillation(class_axis=1)
        value, output, target, _ = distil(student, teacher, lambda net: net(x), {"body": "body"}, distillation=option)
        assert value == pytest.approx(by_hand(output.detach(), target), rel=1e-4)

    @pytest.mark.parametrize("axis", [None, 2, -1])
    def test_the_axis_that_the_layers_before_tell(self, axis):
        x = torch.randn(4, 6, 4)
        student, teacher = Functional(5, 3, True), Functional(8, 3, True)
        option = LogitDistillation(class_axis=axis)
        value, output, target, _ = distil(student, teacher, lambda net: net(x), {"body": "body"}, distillation=option)
        assert value == pytest.approx(by_hand(output.detach(), target, -1), rel=1e-4)

    def test_a_head_that_is_not_found_has_to_be_named(self):
        x = torch.randn(16, 4)
        student, teacher = (nn.Sequential(Functional(5, classes, True), nn.Identity()) for classes in (3, 6))
        layers = {"0.body": "0.body"}
        with pytest.raises(ValueError, match=r"3 classes and the teacher 6.*LogitDistillation\(features="):
            distil(student, teacher, lambda net: net(x), layers)
        option = LogitDistillation(features="0.body")
        value, *_, said = distil(student, teacher, lambda net: net(x), layers, distillation=option)
        assert 0 <= value < 1.5
        assert "'0.body'" in said

    @pytest.mark.parametrize("axis", [0, 3, -3])
    def test_an_axis_that_is_none(self, axis):
        x, option = torch.randn(4, 6, 4), LogitDistillation(class_axis=axis)
        student, teacher = Functional(5, 3, True), Functional(8, 3, True)
        with pytest.raises(ValueError, match="`class_axis` to be an axis of the logits"):
            distil(student, teacher, lambda net: net(x), {"body": "body"}, distillation=option)


class Scalar(nn.Module):
    def __init__(self, width: int, squeeze: bool) -> None:
        super().__init__()
        self.body, self.head, self.squeeze = nn.Linear(4, width), nn.Linear(width, 1), squeeze

    def forward(self, x: Tensor) -> Tensor:
        value = self.head(self.body(x))
        return value.squeeze(1) if self.squeeze else value


class TestNoClasses:
    def test_a_single_output(self):
        x, layers = torch.randn(16, 4), {"body": "body"}
        with pytest.raises(ValueError, match="single output.*always 1.*features="):
            distil(Scalar(5, False), Scalar(8, False), lambda net: net(x), layers)
        option = LogitDistillation(features="body")
        value, *_ = distil(Scalar(5, False), Scalar(8, False), lambda net: net(x), layers, distillation=option)
        assert 0 < value < 1.5

    def test_no_axis_of_classes(self):
        x = torch.randn(16, 4)
        with pytest.raises(
            TypeError, match=r"the logits of the teacher .*one number for each sample, of shape \(16,\)"
        ):
            distil(Scalar(5, True), Scalar(8, True), lambda net: net(x), {"body": "body"})

    @pytest.mark.parametrize("option", [{"activation": "sigmoid"}, {"features": "body"}])
    def test_the_ways_out_of_it(self, option):
        """Those that the error names: (B, 1), which a task may squeeze again."""

        class Unsqueezed(Scalar):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).unsqueeze(1)

        x, layers = torch.randn(16, 4), {"body": "body"}
        teacher = Unsqueezed(8, True)
        for student in (Unsqueezed(5, True), Scalar(5, False)):
            value, *_ = distil(student, teacher, lambda net: net(x), layers, distillation=LogitDistillation(**option))
            assert 0 < value < 1.5

    def test_an_output_of_a_kind_of_its_own(self):
        class Output:
            def __init__(self, logits: Tensor) -> None:
                self.logits, self.scores = logits, logits

        class Own(Scalar):
            def forward(self, x: Tensor) -> Any:
                return Output(self.body(x))

        x = torch.randn(16, 4)
        for option in (1.0, LogitDistillation(select="scores")):
            student, teacher = Own(5, True), Own(5, True)
            value, output, target, _ = distil(
                student, teacher, lambda net: net(x), {"body": "body"}, distillation=option
            )
            assert value == pytest.approx(by_hand(output.logits.detach(), target.logits), rel=1e-4)
        with pytest.raises(TypeError, match="select='boxes'"):
            distil(
                Own(5, True),
                Own(5, True),
                lambda net: net(x),
                {"body": "body"},
                distillation=LogitDistillation(select="boxes"),
            )


class TestShapes:
    def test_other_samples(self):
        x = torch.randn(16, 4)
        student, teacher = (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)) for _ in range(2))
        with pytest.raises(ValueError, match="the batch sizes differ.*teacher_inputs"):
            distil(student, teacher, lambda net: net(x), {"0": "0"}, teacher_inputs=lambda x: x[:8])

    def test_other_lengths(self):
        x = torch.randn(4, 3, 8)
        student, teacher = convolutions(1, 8, 3), convolutions(1, 16, 3)
        with pytest.raises(ValueError, match=r"the positions differ .*cannot be matched.*resized"):
            distil(student, teacher, lambda net: net(x), {"1": "1"}, teacher_inputs=lambda x: x[..., :6])

    def test_a_map_and_a_vector(self):
        x = torch.randn(4, 3, 8, 8)
        student = convolutions(2, 8, 3)
        teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
        with pytest.raises(ValueError, match="the positions differ"):
            distil(student, teacher, lambda net: net(x), {"1": "1"})


def test_a_mask_of_another_length_is_said():
    """As for layers that are matched."""
    student, teacher = Sequence(16, True), Sequence(32, True)

    class Shifted(nn.Module):
        def __init__(self, inner: Sequence) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(ids[:, 1:])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distil(
            Shifted(student),
            Shifted(teacher),
            lambda net: net(IDS, attention_mask=MASK),
            {"inner.embedding": "inner.embedding"},
        )
    assert any("Padding is not left out" in str(each.message) for each in caught)
