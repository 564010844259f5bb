"""A root that is a part of the student: the same part of the teacher runs alone, in whatever form layers are given."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from lightning_otrt import LayerPair, RepresentationTransfer, neurons, suggest_weight, transport_distance

X = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Normalises, then runs a backbone, a neck and a head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.neck = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def normalised(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.05

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.backbone(self.normalised(x))).mean((2, 3)))


def by_parts(net: Net, x: Tensor) -> Tensor:
    """As a training step that calls the parts by itself."""
    return net.head(net.neck(net.backbone(net.normalised(x))).mean((2, 3)))


def seen_by(module: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().clone()))
    return found


def value(transfer: RepresentationTransfer, student: nn.Module, call: Any) -> float:
    with transfer.attached(student):
        call(student)
        transfer.loss()
    return float(transfer.transport_value)


FORMS: dict[str, Any] = {
    "words": "blocks",
    "names": ["backbone.1", "backbone.3"],
    "pairs": [("backbone.1", "backbone.1"), ("backbone.3", "backbone.3")],
    "mapping": {"backbone.1": "backbone.1", "backbone.3": "backbone.3"},
    "glob": "backbone.[13]",
    "regex": "re:backbone.[13]",
    "layer pairs": [LayerPair("backbone.1", "backbone.1"), LayerPair("backbone.3", "backbone.3")],
    "relative names": {"1": "1", "3": "3"},
    "word and name": ["blocks", ("backbone.0", "backbone.0")],
    "name and word": [("backbone.0", "backbone.0"), "blocks"],
    "input": {"backbone.2:input": "backbone.2:input"},
    "index": [1, ("backbone.3", "backbone.3")],
}


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel, torch.compile])
def test_the_part_of_a_wrapped_teacher(wrap: Any) -> None:
    """It was looked for in the wrapper, which has none of that name."""
    teacher, student = Net(8), nn.ModuleDict({"net": Net()})
    values = []
    for each in (teacher, wrap(teacher)):
        options = {"student_root": "net.backbone", "plan": "uniform"}
        transfer = RepresentationTransfer(each, {"net.backbone.1": "backbone.1"}, **options)
        values.append(value(transfer, student, lambda model: by_parts(model["net"], X)))
    assert values[0] == values[1]


@pytest.mark.parametrize("layers", FORMS.values(), ids=FORMS)
def test_a_copy_of_the_student_gives_nothing_and_another_teacher_what_its_part_gives(layers):
    torch.manual_seed(0)
    student = Net()
    for teacher in (copy.deepcopy(student), Net(9)):
        enters = seen_by(teacher.backbone)
        transfer = RepresentationTransfer(teacher, layers, student_root="backbone", plan="exact")
        found = value(transfer, student, lambda net: net(X))
        torch.testing.assert_close(enters[-1], student.normalised(X))
        right = 0.0
        for pair in transfer.pairs:
            y, x = (
                net.backbone[: int(name.split(".")[1].removesuffix(":input")) + (not name.endswith(":input"))](
                    student.normalised(X)
                )
                for net, name in ((student, pair.student), (teacher, pair.teacher))
            )
            columns = neurons(y, neuron_axis=1), neurons(x, neuron_axis=1)
            right += pair.weight * float(transport_distance(*columns, plan="exact").value.detach())
        assert found == pytest.approx(right, abs=1e-5)


@pytest.mark.parametrize("layers", [{"backbone.3": "backbone.3"}, {"1": "1"}, "re:backbone.[13]"])
def test_a_root_that_is_found_is_treated_like_one_that_is_named(layers):
    student = Net()
    assert value(
        RepresentationTransfer(copy.deepcopy(student), layers, plan="exact"), student, lambda net: by_parts(net, X)
    ) == (pytest.approx(0.0, abs=1e-5))


def test_the_table_says_which_part_of_the_teacher_runs():
    for layers, root, told in (
        ({"backbone.3": "backbone.3"}, "backbone", True),
        ("blocks", "backbone", True),
        ({"backbone.3": "backbone.3"}, None, False),
    ):
        lines: list[str] = []
        student, transfer = Net(), RepresentationTransfer(Net(), layers, student_root=root)
        transfer.report = lines.append
        value(transfer, student, lambda net: net(X))
        assert ("teacher: its part 'backbone' runs alone, on what enters 'backbone' of the student" in lines[0]) == told


@pytest.mark.parametrize("layers", ["auto", {"backbone.3": "backbone.3"}, ["blocks", ("backbone.0", "backbone.0")]])
def test_a_resumed_run_and_a_cache_feed_the_same_part(layers):
    student, teacher = Net(), Net(9)
    options = {"student_root": "backbone", "plan": "exact"}
    first = RepresentationTransfer(teacher, layers, **options)
    before = value(first, student, lambda net: net(X))
    resumed, cached = (
        RepresentationTransfer(teacher, layers, **options, **more) for more in ({}, {"teacher_cache": "memory"})
    )
    resumed.load_state_dict(first.state_dict())
    enters = seen_by(teacher.backbone)
    assert value(resumed, student, lambda net: net(X)) == pytest.approx(before, rel=1e-5)
    assert value(cached, student, lambda net: net(X)) == pytest.approx(before, rel=1e-5)
    for x in enters:
        torch.testing.assert_close(x, student.normalised(X))


def test_a_suggested_weight_is_that_of_the_same_part():
    student, teacher = Net(), Net(9)
    data = [(X, torch.arange(8) % 3)]
    enters = seen_by(teacher.backbone)

    weights = [
        suggest_weight(
            student, RepresentationTransfer(teacher, layers, student_root="backbone"), data, loss_fn=F.cross_entropy
        ).weight
        for layers in ("blocks", ["backbone.1", "backbone.3"])
    ]
    assert weights[0] == pytest.approx(weights[1], rel=1e-4)
    for x in enters:
        torch.testing.assert_close(x, student.normalised(X))


def test_a_layer_outside_of_the_part_runs_the_whole_teacher_and_says_so():
    student, teacher = Net(), Net(9)
    enters = seen_by(teacher)
    transfer = RepresentationTransfer(teacher, {"backbone.3": "neck"}, student_root="backbone")
    with pytest.warns(UserWarning, match=r"because its layers \['neck'\] lie outside of its own 'backbone'"):
        value(transfer, student, lambda net: net(X))
    torch.testing.assert_close(enters[-1], student.normalised(X))


def test_no_warning_where_the_part_of_the_whole_teacher_gets_the_same():
    class Plain(Net):
        def normalised(self, x: Tensor) -> Tensor:
            return x

    transfer = RepresentationTransfer(Plain(9), {"backbone.3": "neck"}, student_root="backbone")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value(transfer, Plain(), lambda net: net(X))


def test_a_wrapped_teacher_runs_as_a_whole():
    teacher = Net(9)
    enters = seen_by(teacher)
    transfer = RepresentationTransfer(nn.Sequential(teacher), {"backbone.3": "0.backbone.3"}, student_root="backbone")
    student = Net()
    value(transfer, student, lambda net: net(X))
    torch.testing.assert_close(enters[-1], student.normalised(X))


def test_a_wrong_name_is_an_error_before_any_forward():
    for root in (None, "backbone"):
        with pytest.raises(ValueError, match="No layer 'backbone.9' in the teacher"):
            RepresentationTransfer(Net(), {"backbone.3": "backbone.9"}, student_root=root).attach(Net())


def test_the_encoder_of_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    student = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1, 30, (6, 9))
    for layers in ("blocks", {"bert.encoder.layer.1": "bert.encoder.layer.1"}, {"layer.0": "layer.0"}):
        transfer = RepresentationTransfer(
            copy.deepcopy(student), layers, student_root="bert.encoder", plan="exact", strict=False
        )
        assert value(transfer, student, lambda net: net(ids)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_the_backbone_of_a_detector():
    detection = pytest.importorskip("torchvision").models.detection
    student = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    teacher = copy.deepcopy(student)
    seen = seen_by(student.backbone), seen_by(teacher.backbone)
    transfer = RepresentationTransfer(
        teacher, {"backbone.features.0.3": "backbone.features.0.3"}, student_root="backbone", plan="identity"
    )
    found = value(transfer, student, lambda net: net([torch.rand(3, 40, 64), torch.rand(3, 50, 50)]))
    torch.testing.assert_close(seen[0][-1], seen[1][-1])
    assert found == pytest.approx(0.0, abs=1e-5)


class Wrapped(nn.Module):
    """Does something before, or after, it calls a network of the student's type under the student's name."""

    def __init__(self, net: nn.Module, before: Any = lambda x: x, after: Any = lambda y: y) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


class Lit(pl.LightningModule):
    """The same as a LightningModule, whose type is another one than that of the student's module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 0.5) / 0.05)


class Task(pl.LightningModule):
    """A step that calls a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, x: Tensor, _: int = 0) -> Tensor:
        return self.net(x).square().mean()


def normalised(x: Tensor) -> Tensor:
    return (x - 0.5) / 0.05


def values(teacher: nn.Module, **options: Any) -> tuple[float, float]:
    torch.manual_seed(2)
    student = Task(Net())
    transfer = RepresentationTransfer(teacher, plan="exact", distillation=1.0, **options)
    with transfer.attached(student):
        student.training_step(X)
        transfer.loss()
    return float(transfer.transport_value), float(transfer.distillation_value)


@pytest.mark.parametrize("root", [None, "net"])
@pytest.mark.parametrize("cache", [None, "memory"])
@pytest.mark.parametrize("layers", ["blocks", {"net.backbone.3": "net.backbone.3"}], ids=["word", "names"])
def test_a_teacher_that_normalises_does_so(root, cache, layers):
    """Also where it calls its network by the student's name."""
    torch.manual_seed(1)
    net = Net(9).eval()
    options = {"student_root": root, "teacher_cache": cache}
    named = layers if isinstance(layers, str) else {"net.backbone.3": "backbone.3"}
    right = values(net, layers=named, teacher_inputs=normalised, **options)
    assert right != pytest.approx(values(net, layers=named, **options), rel=1e-3)
    for teacher in (Wrapped(net, normalised), Lit(net)):
        assert values(teacher, layers=layers, **options) == pytest.approx(right, rel=1e-5)
        assert values(teacher, layers=layers, teacher_inputs=lambda x: x, **options) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(
    "after", [lambda y: y[:, [2, 0]], lambda y: y / 0.2, lambda y: y.div_(0.2)], ids=["chosen", "scaled", "in place"]
)
def test_outputs_of_the_whole_teacher_are_distilled(after):
    torch.manual_seed(1)
    net = Net(9).eval()
    student, seen = Net(), []
    transfer = RepresentationTransfer(Wrapped(net, after=after), "blocks", distillation=1.0)
    with transfer.attached(nn.ModuleDict({"net": student})):
        student(X)
        seen.append(transfer.teacher_output)
        transfer.loss()
    with torch.no_grad():
        torch.testing.assert_close(seen[0], after(net(X)))


def test_a_teacher_that_calls_parts_of_its_network_runs_its_own_forward():
    class Around(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return self.net.head(-self.net.backbone(x).mean((2, 3)))

    torch.manual_seed(1)
    teacher, student = Around(Net(9)), Net()
    transfer = RepresentationTransfer(teacher, {"net.backbone.3": "net.backbone.3"}, distillation=1.0)
    with transfer.attached(nn.ModuleDict({"net": student})):
        student(X)
        found = transfer.teacher_output
        transfer.loss()
    torch.testing.assert_close(found, teacher(X).detach())


def test_inputs_that_are_made_for_the_whole_teacher_reach_it():
    class Two(Wrapped):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.net(x + y)

    torch.manual_seed(1)
    net = Net(9).eval()
    found = values(Two(net), layers="blocks", teacher_inputs=lambda x: (x, x.flip(3)))
    assert found == pytest.approx(values(net, layers="blocks", teacher_inputs=lambda x: x + x.flip(3)), rel=1e-5)


def test_the_part_runs_alone_where_the_teacher_does_no_more_or_cannot_run():
    """One that passes its inputs on, one that takes other inputs, and names that only the part has."""

    class Two(Wrapped):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.net(x + y)

    torch.manual_seed(1)
    net = Net(9).eval()
    right = values(net, layers={"backbone.3": "backbone.3"})
    named = {"net.backbone.3": "net.backbone.3"}
    assert values(Wrapped(net), layers=named) == pytest.approx(right, rel=1e-5)
    with pytest.warns(UserWarning, match=r"\(Two\) failed on what enters .* part 'net' runs alone.*argument: 'y'"):
        assert values(Two(net), layers=named) == pytest.approx(right, rel=1e-5)
    assert values(Lit(net), layers={"backbone.3": "backbone.3"}) == pytest.approx(right, rel=1e-5)


def test_the_part_runs_alone_where_the_network_around_the_root_has_run():
    """What enters the root is then normalised already, as the teacher's own backbone would get it."""

    class Other(Net):
        pass

    torch.manual_seed(1)
    student, teacher = Net(), Other(9)
    transfer = RepresentationTransfer(teacher, {"backbone.3": "backbone.3"}, student_root="backbone")
    enters = seen_by(teacher.backbone)
    value(transfer, student, lambda net: net(X))
    torch.testing.assert_close(enters[-1], student.normalised(X))


def test_the_report_says_that_the_whole_teacher_runs():
    lines: list[str] = []
    torch.manual_seed(1)
    transfer = RepresentationTransfer(Wrapped(Net(9), normalised), "blocks")
    transfer.report = lines.append
    value(transfer, Task(Net()), lambda task: task.training_step(X))
    assert "teacher: all of it runs, on what enters 'net' of the student; to run 'net' of the teacher alone" in lines[0]
