"""Real architectures with a cached teacher, with padding and in every layout: the terms are those without the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from forwards.masked import SAMPLES, SITUATIONS
from helpers import Net, forwards, seeded, with_slow
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import LayerPair, RepresentationTransfer
from lightning_otrt.reading.tracer import trace

#: Samples of batches: new, known, in part known, in another order, a single one, and one twice.
BATCHES = [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 4, 5], [5, 3, 1, 0], [4], [5, 5, 0]]
IMAGES = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def terms(
    student: nn.Module,
    teacher: nn.Module,
    layers: Any,
    batches: list[tuple[tuple[Any, ...], Mapping[str, Any]]],
    **options: Any,
) -> tuple[list[float], RepresentationTransfer]:
    transfer = RepresentationTransfer(teacher, layers, weight=1.0, solve_every=1, **options)
    found = []
    with transfer.attached(student), warnings.catch_warnings():
        # Of single batches of a few samples.
        warnings.simplefilter("ignore")
        for args, kwargs in batches:
            student(*args, **kwargs)
            found.append(float(transfer.loss().detach()))
    return found, transfer


def assert_same_terms(
    student: nn.Module, teacher: nn.Module, layers: Any, batches: Any, runs: int, **options: Any
) -> RepresentationTransfer:
    expected, _ = terms(student, teacher, layers, batches, **options)
    with forwards(teacher) as count:
        found, transfer = terms(student, teacher, layers, batches, teacher_cache="memory", **options)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(count) == runs
    return transfer


def part(value: Any, samples: list[int]) -> Any:
    return value[samples] if isinstance(value, Tensor) and value.shape[:1] == (SAMPLES,) else value


@pytest.mark.filterwarnings("ignore:Padding is", "ignore:The argument", "ignore:The mask")
@pytest.mark.parametrize(
    "name", with_slow(SITUATIONS, "T5", "BART", "BERT, one", "GPT-2", "CLIP", "Wav2Vec2", "Whisper", "no mask")
)
def test_padding(name: str) -> None:
    situation = SITUATIONS[name]
    torch.manual_seed(0)
    student, teacher = situation.build(8).eval(), situation.build(12).eval()
    layers = [LayerPair(situation.layer, situation.layer, **situation.options)]
    batches = [
        (
            tuple(part(value, samples) for value in situation.args),
            {key: part(value, samples) for key, value in situation.kwargs.items()},
        )
        for samples in BATCHES
    ]
    # The plan is fixed: a solved one takes long, and depends on the same readings.
    options: dict[str, Any] = {"cost": "sqeuclidean", "plan": "random", "memory": 0}
    if situation.args and len(situation.args[0]) != SAMPLES:
        with pytest.raises(ValueError, match="none of its inputs has one entry for each|it fails on a part of a batch"):
            terms(student, teacher, layers, [(situation.args, {})], teacher_cache="memory", **options)
        return
    with forwards(teacher) as traced:  # where nothing tells the axis of the samples, it runs more than once
        trace(teacher, *batches[0])
    # The trace; the first batch twice, with its parts; and samples 4 and 5.
    transfer = assert_same_terms(student, teacher, layers, batches, len(traced) + 4 + 1, **options)
    assert transfer.cache.misses == 6


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=5)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Any]] = {
    "torchvision, ResNet-34 to 18": (lambda: resnet(0), lambda: torchvision.models.resnet34(), "blocks"),
    "timm, EfficientNet": (lambda: resnet(0), lambda: timm.create_model("efficientnet_lite0"), "blocks"),
    "timm, ConvNeXt": (lambda: resnet(0), lambda: timm.create_model("convnext_atto"), "blocks"),
    "timm, ViT": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=2),
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=72, num_heads=2),
        "blocks",
    ),
    "timm, penultimate": (lambda: resnet(0), lambda: timm.create_model("mobilenetv3_small_050"), "penultimate"),
    # Windows of an image lie along the first axis.
    "timm, windows of Swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 1, 1, 1)),
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=48, depths=(1, 1, 1, 1)),
        [LayerPair("layers.0.blocks.0.attn.proj", "layers.0.blocks.0.attn.proj", neuron_axis=-1)],
    ),
    "transformers, ViT": (
        lambda: vit_of_hugging_face(24, 2),
        lambda: vit_of_hugging_face(32, 4),
        "blocks",
    ),
}


def vit_of_hugging_face(width: int, depth: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": depth, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=64, patch_size=16, **sizes))


@pytest.mark.parametrize(
    "name", with_slow(MODELS, "torchvision", "timm, EfficientNet", "timm, ConvNeXt", "timm, w", "transformers")
)
def test_models(name: str, tmp_path: Path) -> None:
    build, build_teacher, layers = MODELS[name]
    torch.manual_seed(1)
    student, teacher = build().eval(), build_teacher()
    images = IMAGES[:, :, :56, :56] if "Swin" in name else IMAGES
    batches = [((images[samples],), {}) for samples in BATCHES[:4]]
    # Where a layer has as many tokens as the batch has samples, two more tell the axis of the samples; three more tell
    # whether the tokens of a square lie row by row; five more tell how maps lie, and seven whose the rows are.
    order = {"timm, windows of Swin": 2 + 7, "timm, ViT": 3 + 5, "transformers, ViT": 3 + 5, "timm, penultimate": 0}
    assert_same_terms(student, teacher, layers, batches, 1 + order.get(name, 5) + 4 + 1, plan="random")
    for known in (0, 1):
        _, transfer = terms(student, teacher, layers, batches, teacher_cache=str(tmp_path), plan="random")
        assert transfer.cache.misses == (0 if known else 6)
        assert all(parameter.grad is None for parameter in teacher.parameters())


class Folded(nn.Module):
    """Its layer sees positions along the first axis, with the samples in an order of its own."""

    def __init__(self, *, samples_first: bool) -> None:
        super().__init__()
        self.layer, self.samples_first = nn.Linear(3, 4), samples_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.mean((2, 3))[:, None].repeat(1, 5, 1) * torch.arange(5)[:, None]
        rows = tokens if self.samples_first else tokens.transpose(0, 1)
        return self.layer(rows.reshape(-1, 3))


def test_positions_along_the_axis_of_the_samples() -> None:
    batches = [((IMAGES[samples],), {}) for samples in BATCHES[:4]]
    nets = [Folded(samples_first=True) for _ in range(2)]
    assert_same_terms(*nets, {"layer": "layer"}, batches, 1 + 7 + 4 + 1)
    nets = [Folded(samples_first=False) for _ in range(2)]
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        terms(*nets, {"layer": "layer"}, batches, teacher_cache="memory")


class Early(nn.Module):
    """Runs a layer where the batch is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.mean((2, 3)))
        return self.second(x) if len(x) > 2 else x


def test_a_layer_that_runs_for_some_batches() -> None:
    with pytest.raises(ValueError, match="other layers run for a part of a batch"):
        terms(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
            Early(),
            {"2": "second"},
            [((IMAGES[:4],), {})],
            teacher_cache="memory",
        )


class Doubling(nn.Module):
    """Writes to what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(2))


@pytest.mark.filterwarnings("ignore:A forward of the teacher or of the traced student writes")
@pytest.mark.filterwarnings("ignore:The teacher writes to its inputs in place")
@pytest.mark.parametrize("cache", [None, "memory", "folder"])
@pytest.mark.parametrize("inputs", [None, torch.Tensor.detach])
def test_batches_of_new_samples_stay_as_they_are(cache: str | None, inputs: Any, tmp_path: Path) -> None:
    """Also in a second run, whose first batch the folder holds, and whose others it does not."""
    option = tmp_path if cache == "folder" else cache
    for batches in ([0, 1, 2], [0, 3, 4]):
        student = nn.Sequential(nn.Conv2d(3, 4, 3))
        transfer = RepresentationTransfer(Doubling(), {"0": "layer"}, teacher_cache=option, teacher_inputs=inputs)
        with transfer.attached(student):
            for batch in batches:
                x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
                before = x.clone()
                student(x)
                transfer.loss()
                assert torch.equal(x, before)


class Resizing(Doubling):
    """Writes to what it gets where it need not resize it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[-1] == 8 else F.interpolate(x, size=8))


@pytest.mark.parametrize("inputs", [None, torch.clone])
def test_a_teacher_that_writes_to_later_inputs_alone(inputs: Any) -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3))
    transfer = RepresentationTransfer(Resizing(), {"0": "layer"}, teacher_inputs=inputs)
    with transfer.attached(student):
        student(torch.rand(4, 3, 12, 12))
        transfer.loss()
        for _ in range(2):
            x = torch.rand(4, 3, 8, 8)
            before = x.clone()
            if inputs is None:
                with pytest.raises(RuntimeError, match=r"to its inputs in place in this step \(shapes: \(4, 3, 8"):
                    student(x)
                break
            student(x)
            transfer.loss()
            assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:A forward of the teacher or of the traced student writes")
@pytest.mark.filterwarnings("ignore:The teacher writes to its inputs in place")
def test_a_teacher_that_writes_to_its_inputs() -> None:
    student, teacher = nn.Sequential(nn.Conv2d(3, 4, 3)), Doubling()
    images = IMAGES.clone()
    for _ in range(2):
        batches = [((images[samples],), {}) for samples in BATCHES[1:]]
        expected, _ = terms(student, teacher, {"0": "layer"}, batches[1:])
        found, transfer = terms(student, teacher, {"0": "layer"}, batches[1:], teacher_cache="memory")
        assert found[1:] == pytest.approx(expected[1:], rel=1e-5)
        assert transfer.cache.hits > 0
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize("in_place", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_student(in_place: bool) -> None:
    torch.compiler.reset()
    values = []
    for cache in (None, "memory"):
        student = net = seeded(0, Net)
        if in_place:
            net.compile(backend="eager")
        else:
            student = torch.compile(net, backend="eager")
        batches = [((IMAGES[samples, :1],), {}) for samples in BATCHES[:4]]
        found, transfer = terms(student, seeded(1, Net, 6), {"block1": "block1"}, batches, teacher_cache=cache)
        values.append(found)
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert transfer.cache.misses == 6
    torch.compiler.reset()


@pytest.mark.slow
def test_autocast_has_samples_of_its_own() -> None:
    student, teacher = resnet(0), resnet(1)
    transfer = RepresentationTransfer(teacher, {"layer4": "layer4"}, teacher_cache="memory")
    with transfer.attached(student):
        for cast in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                student(IMAGES)
            transfer.loss()
    assert (transfer.cache.hits, transfer.cache.misses) == (16, 16)


def test_a_scripted_teacher() -> None:
    values = []
    for cache in (None, "memory"):
        teacher = torch.jit.script(seeded(1, Net, 6).eval())
        batches = [((IMAGES[samples, :1],), {}) for samples in BATCHES[:4]]
        values.append(terms(seeded(0, Net), teacher, {"head": ""}, batches, teacher_cache=cache)[0])
    assert values[1] == pytest.approx(values[0], rel=1e-5)
