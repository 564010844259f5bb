"""The distillation of logits in a plain loop: its value, its gradient, and where there is none."""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import Net, assert_same, differ, forwards, loader, make_task, make_teacher, weights
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import LogitDistillation, OTRTCallback, RepresentationTransfer
from lightning_otrt.steps.distillation_term import LEAST_MEMORY, RIDGE

LAYERS = {"block1": "block1", "block2": "block2"}


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_hand(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """The recipe that many write themselves."""
    soft, target = (F.log_softmax(values / temperature, dim=1) for values in (student, teacher))
    return temperature**2 * F.kl_div(soft, target, reduction="batchmean", log_target=True)


def make_student() -> Net:
    return make_task().net


def other_classes(count: int = 7) -> Net:
    teacher = make_teacher()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        teacher.head = nn.Linear(teacher.head.in_features, count)
    return teacher


def images(count: int = 16) -> Tensor:
    return next(iter(loader(batch_size=count)))[0].to(torch.get_default_dtype())


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


class TestOption:
    @pytest.mark.parametrize("value", [True, "1", None, [1.0], {"weight": 1.0}])
    def test_wrong_type(self, value):
        with pytest.raises(TypeError, match=r"`distillation` to be the weight .* or LogitDistillation\(weight"):
            RepresentationTransfer(make_teacher(), distillation=value)

    @pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
    def test_out_of_range(self, value):
        with pytest.raises(ValueError, match="`distillation` to be finite and not negative"):
            OTRTCallback(make_teacher(), distillation=value)

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"weight": -1}, ValueError, "`weight`"),
            ({"weight": "1"}, TypeError, "`weight`"),
            ({"temperature": 0}, ValueError, "`temperature` to be positive"),
            ({"temperature": -2.0}, ValueError, "`temperature`"),
            ({"temperature": None}, TypeError, "`temperature`"),
            ({"select": 1.5}, TypeError, "`select`"),
            ({"select": ("a", "b", "c")}, TypeError, "`select`"),
            ({"class_axis": "last"}, TypeError, "`class_axis`"),
            ({"features": 3}, TypeError, "`features`"),
        ],
    )
    def test_fields(self, options, error, match):
        with pytest.raises(error, match=match):
            LogitDistillation(**options)

    def test_it_cannot_be_set_again(self):
        transfer = RepresentationTransfer(make_teacher(), distillation=1.0)
        with pytest.raises(AttributeError, match="`distillation` .* cannot be changed"):
            transfer.distillation = 2.0


@pytest.mark.usefixtures("_float64")
class TestSameClasses:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    @pytest.mark.parametrize("weight", [0.0, 8.0])
    def test_value_and_gradient_are_those_of_the_recipe(self, temperature, weight):
        student, teacher, x = make_student().double(), make_teacher().double(), images()
        option = LogitDistillation(0.5, temperature=temperature)
        transfer = RepresentationTransfer(teacher, LAYERS, weight=weight, distillation=option)
        with transfer.attached(student):
            logits = student(x)
            transfer.loss().backward()
            found = gradients(student)
            assert (transfer.transport_value is not None) == (weight > 0)
        student.zero_grad()
        twin = RepresentationTransfer(teacher, LAYERS, weight=weight)
        target = copy.deepcopy(teacher).eval()(x).detach()
        with twin.attached(student):
            expected = by_hand(student(x), target, temperature)
            (0.5 * expected + twin.loss()).backward()
        torch.testing.assert_close(transfer.distillation_value, by_hand(logits, target, temperature).detach())
        torch.testing.assert_close(found, gradients(student), rtol=1e-9, atol=1e-12)

    def test_finite_differences(self):
        student, teacher = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.Linear(3, 3)
        transfer = RepresentationTransfer(teacher, {"1": ""}, weight=0, distillation=1.0)
        x = torch.randn(6, 3)

        def term(weight: Tensor) -> Tensor:
            with torch.no_grad():
                student[0].weight.copy_(weight)
            student(x)
            return transfer.loss()

        with transfer.attached(student):
            start = student[0].weight.detach().clone()
            (gradient,) = torch.autograd.grad(term(start), student[0].weight)
            for index in range(start.numel()):
                step = torch.zeros(start.numel()).index_fill_(0, torch.tensor([index]), 1e-5).view_as(start)
                numeric = (term(start + step) - term(start - step)) / 2e-5
                assert float(numeric.detach()) == pytest.approx(float(gradient.flatten()[index]), rel=1e-6, abs=1e-9)

    def test_equal_networks_cost_nothing(self):
        teacher = make_teacher().double()
        student = copy.deepcopy(teacher).eval()
        transfer = RepresentationTransfer(teacher, LAYERS, weight=0, distillation=1.0)
        with transfer.attached(student):
            student(images())
            transfer.loss()
        assert float(transfer.distillation_value) == pytest.approx(0, abs=1e-12)

    def test_views_are_averaged(self):
        student, teacher, x = make_student().double(), make_teacher().double(), images()
        transfer = RepresentationTransfer(teacher, LAYERS, distillation=1.0)
        values = []
        with transfer.attached(student):
            for parts in ([x[:4]], [x[4:]], [x[:4], x[4:]]):
                for part in parts:
                    student(part)
                transfer.loss()
                values.append(float(transfer.distillation_value))
        assert values[2] == pytest.approx((values[0] + values[1]) / 2, rel=1e-6)

    def test_a_change_of_the_logits_in_place_does_not_reach_the_term(self):
        student, teacher, x = make_student().double(), make_teacher().double(), images()
        transfer = RepresentationTransfer(teacher, LAYERS, distillation=1.0)
        with transfer.attached(student):
            expected = by_hand(student(x).detach(), copy.deepcopy(teacher).eval()(x))
            transfer.discard()
            student(x).mul_(100)
            transfer.loss().backward()
        torch.testing.assert_close(transfer.distillation_value, expected.detach())


def ridge_by_hand(features: list[Tensor], logits: list[Tensor]) -> Tensor:
    """1 - R² of the last batch, its map from decayed moments of all batches, by the normal equations."""
    decays = [LEAST_MEMORY ** (len(features) - 1 - call) for call in range(len(features))]
    count = sum(decay * len(y) for decay, y in zip(decays, features, strict=True))
    mean_y = sum(decay * y.sum(0) for decay, y in zip(decays, features, strict=True)) / count
    targets = [x - x.mean(1, keepdim=True) for x in logits]
    mean_x = sum(decay * x.sum(0) for decay, x in zip(decays, targets, strict=True)) / count
    yy = sum(d * (y - mean_y).T @ (y - mean_y) for d, y in zip(decays, features, strict=True))
    yx = sum(d * (y - mean_y).T @ (x - mean_x) for d, y, x in zip(decays, features, targets, strict=True))
    ridge = RIDGE * yy.diagonal().mean() * torch.eye(len(yy))
    own, target = features[-1] - features[-1].mean(0), targets[-1] - targets[-1].mean(0)
    found = torch.linalg.solve(yy + ridge, yx).detach()
    return (target - own @ found).square().sum() / target.square().sum()


@pytest.mark.usefixtures("_float64")
class TestOtherClasses:
    @pytest.mark.parametrize("weight", [0.0, 8.0])
    def test_value_and_gradient_by_the_normal_equations(self, weight):
        student, teacher = make_student().double(), other_classes().double()
        transfer = RepresentationTransfer(teacher, LAYERS, weight=weight, distillation=1.0)
        features: list[Tensor] = []
        student.head.register_forward_pre_hook(
            lambda module, args: features.append(args[0]) if args[0].requires_grad else None
        )
        logits = []
        with transfer.attached(student):
            for start in (0, 16, 32):
                x = images(64)[start : start + 16]
                student(x)
                logits.append(copy.deepcopy(teacher).eval()(x).detach())
                loss = transfer.loss()
        expected = ridge_by_hand([y.detach() for y in features[:-1]] + [features[-1]], logits)
        torch.testing.assert_close(transfer.distillation_value, expected.detach(), rtol=1e-6, atol=1e-9)
        if not weight:  # else the gradient at the features is that of both terms
            (found,) = torch.autograd.grad(loss, features[-1], retain_graph=True)
            (wanted,) = torch.autograd.grad(expected, features[-1])
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)

    def test_the_student_gets_no_parameter_and_the_log_names_the_layer(self):
        student, lines = make_student().double(), []
        transfer = RepresentationTransfer(other_classes().double(), LAYERS, distillation=1.0)
        transfer.report = lines.append
        names = list(student.state_dict())
        with transfer.attached(student):
            student(images())
            transfer.loss()
        assert list(student.state_dict()) == names
        assert "regressed on 'dropout:input'" in lines[0]

    def test_named_features_where_numbers_agree_by_chance(self):
        student, teacher = make_student().double(), make_teacher().double()
        option = LogitDistillation(features="block2")
        transfer = RepresentationTransfer(teacher, LAYERS, weight=0, distillation=option)
        with transfer.attached(student):
            student(images())
            assert 0 < float(transfer.loss().detach()) < 1.5
            assert "moments" not in repr(transfer)

    def test_a_linear_function_of_the_teacher_costs_little(self):
        teacher = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
        student = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
        student[0].load_state_dict({"weight": torch.randn(5, 5) @ teacher[0].weight.detach(), "bias": torch.randn(5)})
        transfer = RepresentationTransfer(teacher, {"0": "0"}, weight=0, distillation=1.0)
        with transfer.attached(student):
            for _ in range(3):
                student(torch.randn(64, 4))
                transfer.loss()
        assert float(transfer.distillation_value) < 0.05

    @pytest.mark.parametrize("name", ["head.nothing", "block9:input"])
    def test_features_that_do_not_exist(self, name):
        option = LogitDistillation(features=name)
        transfer = RepresentationTransfer(make_teacher().double(), LAYERS, distillation=option)
        student = make_student().double()
        with transfer.attached(student), pytest.raises(ValueError, match="`features`.*Children"):
            student(images())

    def test_a_batch_that_is_too_small(self):
        for strict in (True, False):
            student = make_student().double()
            options: dict[str, Any] = {"weight": 0, "distillation": 1.0, "strict": strict}
            transfer = RepresentationTransfer(other_classes().double(), LAYERS, **options)
            with transfer.attached(student):
                student(images(2))
                if strict:
                    with pytest.raises(ValueError, match="2 observations, and needs at least 3"):
                        transfer.loss()
                else:
                    with pytest.warns(UserWarning, match="skipped for such batches"):
                        assert transfer.loss().item() == 0
                    assert transfer.distillation_value is None
                    student(images())
                    assert float(transfer.loss().detach()) == float(transfer.distillation_value)

    def test_a_batch_that_is_not_finite_leaves_the_moments_alone(self):
        student = make_student().double()
        transfer = RepresentationTransfer(other_classes().double(), LAYERS, weight=0, distillation=1.0)
        with transfer.attached(student):
            for x in (images(), torch.full((16, 1, 8, 8), torch.nan), images()):
                student(x)
                value = transfer.loss().detach()
            with pytest.warns(UserWarning, match="1 recent values"):
                assert transfer.check_finite() == 1
        assert value.isfinite()

    def test_a_first_batch_that_is_not_finite(self):
        student = make_student().double()
        transfer = RepresentationTransfer(make_teacher().double(), LAYERS, weight=0, distillation=1.0)
        with transfer.attached(student):
            student(torch.full((16, 1, 8, 8), torch.nan))
            with pytest.raises(ValueError, match="logits of the student.*NaN or infinite"):
                transfer.loss()


class Masked(nn.Module):
    """A teacher some of whose classes have one value in all samples."""

    def __init__(self, value: float, classes: list[int]) -> None:
        super().__init__()
        self.net, self.value, self.classes = other_classes(), value, classes

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).index_fill(1, torch.tensor(self.classes, dtype=torch.long), self.value)


class TestClassesThatAreConstant:
    def train(self, teacher: nn.Module, **options: Any) -> tuple[list[float], Net]:
        student, values = make_student(), []
        option = LogitDistillation(**options)
        transfer = RepresentationTransfer(teacher, {"block1": "net.block1"}, weight=0, distillation=option)
        with transfer.attached(student):
            for step in range(3):
                student(images(32) * (1 + step))
                loss = transfer.loss()
                values.append(float(loss.detach()))
        loss.backward()
        return values, student

    @pytest.mark.parametrize("options", [{}, {"activation": "sigmoid"}])
    def test_masked_classes_are_left_out(self, options):
        found = {value: self.train(Masked(value, [2, 5]), **options) for value in (-1e9, -1e4, -3.4e38)}
        for values, student in found.values():
            assert min(values) > 1e-2
            assert values == pytest.approx(found[-1e9][0], rel=1e-4)
            assert student.block1[0].weight.grad.abs().sum() > 0
        left = Masked(0.0, [])
        left.net.head = nn.Linear(left.net.head.in_features, 5)
        left.net.head.load_state_dict(
            {name: value[[0, 1, 3, 4, 6]] for name, value in other_classes().head.state_dict().items()}
        )
        assert self.train(left, **options)[0] == pytest.approx(found[-1e9][0], rel=1e-4)

    @pytest.mark.parametrize(("value", "classes"), [(0.5, range(7)), (-1e9, range(7)), (-1e9, range(6))])
    def test_nothing_is_left_to_learn(self, value, classes):
        with pytest.warns(UserWarning, match=r"do not vary over the first batch.*masked by a huge negative") as caught:
            values, _ = self.train(Masked(value, list(classes)))
        assert len(caught) == 1
        assert values == [0, 0, 0]


class TestSchedule:
    def test_there_is_no_term_of_an_earlier_batch(self):
        """Steps 0 and 2 have none: the teacher does not run, and nothing is kept for the next."""
        student, teacher, x = make_student(), make_teacher(), images()
        factors = [0.0, 0.5, 0.0, 1.0]
        transfer = RepresentationTransfer(
            teacher, LAYERS, weight=0, distillation=2.0, schedule=lambda step: factors[min(step, 3)]
        )
        losses, counts = [], []
        with transfer.attached(student), forwards(transfer.teacher.module) as count:
            for step in range(4):
                logits = student(x + step)
                loss = transfer.loss()
                losses.append((float(loss.detach()), logits.detach()))
                counts.append(len(count))
        target = copy.deepcopy(teacher).eval()
        for step, (loss, logits) in enumerate(losses):
            expected = 2 * factors[step] * float(by_hand(logits, target(x + step)).detach())
            assert loss == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert counts == [0, 4, 4, 5], "the first also traces the layers and sees how maps lie"

    def test_the_teacher_runs_once_for_both_terms(self):
        student, teacher = make_student(), make_teacher()
        transfer = RepresentationTransfer(teacher, LAYERS, distillation=1.0)
        with transfer.attached(student), forwards(teacher) as count:
            for _ in range(3):
                student(images())
                transfer.loss()
        assert len(count) == 6, "the first forward is traced, and two see how maps lie"


class TestTeacherOutput:
    def make(self, **options: Any) -> tuple[Net, Net, RepresentationTransfer]:
        student, teacher = make_student(), make_teacher()
        return student, teacher, RepresentationTransfer(teacher, LAYERS, **options)

    def test_is_that_of_the_newest_forward(self):
        student, teacher, transfer = self.make()
        target = copy.deepcopy(teacher).eval()
        with transfer.attached(student):
            for step in range(3):
                student(images() + step)
                torch.testing.assert_close(transfer.teacher_output, target(images() + step).detach())
                assert not transfer.teacher_output.requires_grad
                transfer.loss()

    @pytest.mark.parametrize(
        "later",
        [
            lambda student, transfer: transfer.loss(),
            lambda student, transfer: transfer.discard(),
            lambda student, transfer: torch.no_grad()(student)(images()),
            lambda student, transfer: transfer.paused()(student)(images()),
            lambda student, transfer: setattr(transfer, "weight", 0),
            lambda student, transfer: transfer.detach(),
        ],
        ids=["loss", "discard", "no grad", "paused", "weight", "detach"],
    )
    def test_raises_where_it_would_be_stale(self, later: Callable[..., Any]):
        student, _, transfer = self.make()
        with pytest.raises(RuntimeError, match="no output of the teacher"):
            _ = transfer.teacher_output
        transfer.attach(student)
        with transfer.recording():
            student(images())
            assert transfer.teacher_output.shape == (16, 3)
            later(student, transfer)
            with pytest.raises(RuntimeError, match="no output of the teacher for the last forward"):
                _ = transfer.teacher_output
            if transfer.is_attached:
                transfer.weight = 1.0
                student(images())
                assert transfer.teacher_output.shape == (16, 3)
        with pytest.raises(RuntimeError, match="no output of the teacher"):
            _ = transfer.teacher_output
        transfer.detach()

    def test_raises_in_a_step_without_a_term(self):
        student, _, transfer = self.make(schedule=lambda step: float(step != 1))
        with transfer.attached(student):
            student(images())
            transfer.loss()
            student(images())
            with pytest.raises(RuntimeError, match="schedule or all weights are 0"):
                _ = transfer.teacher_output
            transfer.loss()
            student(images())
            assert transfer.teacher_output.shape == (16, 3)


class TestState:
    @pytest.mark.parametrize("make", [make_teacher, other_classes])
    @pytest.mark.parametrize("weight", [0.0, 2.0])
    def test_a_resumed_run_is_an_uninterrupted_one(self, make, weight):
        def run(steps: range, student: Net, transfer: RepresentationTransfer) -> None:
            optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
            with transfer.attached(student):
                for step in steps:
                    student(images() * (1 + step))
                    optimizer.zero_grad()
                    transfer.loss().backward()
                    optimizer.step()

        options: dict[str, Any] = {"weight": weight, "distillation": 1.0, "memory": 0.9}
        whole, first = (
            RepresentationTransfer(make(), LAYERS, **options),
            RepresentationTransfer(make(), LAYERS, **options),
        )
        expected, student = make_student(), make_student()
        run(range(6), expected, whole)
        run(range(3), student, first)
        state = copy.deepcopy(first.state_dict())
        with pytest.warns(UserWarning, match="is another one than the transfer had before"):
            run(range(3, 4), copy.deepcopy(student), first)  # what is saved does not change
        second = RepresentationTransfer(make(), LAYERS, **options)
        second.load_state_dict(state)
        run(range(3, 6), student, second)
        assert_same(weights(student), weights(expected))
        assert second.step == 6

    def test_moments_of_another_width(self):
        states, teacher = [], nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        for width in (8, 5):
            student = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
            transfer = RepresentationTransfer(teacher, {"0": "0"}, weight=0, distillation=1.0)
            if states:
                transfer.load_state_dict(states[0])
            with transfer.attached(student):
                student(torch.randn(16, 4))
                if states:
                    with pytest.raises(ValueError, match=re.escape("5 student neurons and 3 logits")):
                        transfer.loss()
                else:
                    transfer.loss()
            states.append(transfer.state_dict())

    def run_regression(
        self, teacher: nn.Module, state: dict[str, Any] | None = None, how: str = "before", **options: Any
    ) -> tuple[list[float], dict[str, Any]]:
        """Three steps, with a state that is loaded before the first forward, or after one."""
        student, values = make_student().eval(), []
        option = LogitDistillation(**{"features": "block2", **options})
        transfer = RepresentationTransfer(teacher, LAYERS, weight=0, distillation=option)
        with transfer.attached(student):
            if how == "after":
                student(images())
                transfer.loss()
            if state is not None:
                transfer.load_state_dict(state)
            for factor in (1, 3, 2):
                student(images() * factor)
                values.append(float(transfer.loss().detach()))
        return values, copy.deepcopy(transfer.state_dict())

    @pytest.mark.parametrize("how", ["before", "after"])
    @pytest.mark.parametrize(
        ("count", "options", "words"),
        [
            (7, {"features": "block1"}, r"features='block1' \(before: 'block2'\)"),
            (7, {"activation": "sigmoid"}, r"activation='sigmoid' \(before: 'softmax'\)"),
            (9, {}, "other weights of the teacher"),
            (-7, {}, "other weights of the teacher"),
        ],
    )
    def test_moments_of_another_regression_are_dropped(self, count, options, words, how):
        teacher = other_classes(abs(count))
        if count < 0:  # the same shapes
            nn.init.normal_(teacher.head.weight, generator=torch.Generator().manual_seed(1))
        _, state = self.run_regression(other_classes())
        expected, _ = self.run_regression(teacher, **options)
        with pytest.warns(UserWarning, match=f"regression .* is another one .*: {words}. It starts anew") as caught:
            found, _ = self.run_regression(teacher, state, how, **options)
        assert len(caught) == 1
        assert found == pytest.approx(expected, rel=1e-5)

    def test_moments_of_the_same_regression_go_on(self):
        first, state = self.run_regression(other_classes())
        old = {**state, "distillation": {**state["distillation"]}}
        del old["distillation"]["regression"]
        for saved, options in ((state, {}), (state, {"temperature": 2.0, "weight": 3.0}), (old, {})):
            found, _ = self.run_regression(other_classes(), saved, **options)
            assert found[0] / options.get("weight", 1) != pytest.approx(first[0], rel=1e-3)
        self.run_regression(other_classes(), old, features="block2", activation="sigmoid")  # not known: no warning

    def test_a_state_goes_on_with_soft_targets(self):
        """Which have no moments, so that the teacher may have another head."""
        _, state = self.run_regression(other_classes())
        found, state = self.run_regression(make_teacher(), state, features=None)
        assert found == pytest.approx(self.run_regression(make_teacher(), features=None)[0], rel=1e-5)
        assert state["distillation"]["regression"] is None

    def test_reset(self):
        student = make_student()
        transfer = RepresentationTransfer(other_classes(), LAYERS, weight=0, distillation=1.0)
        with transfer.attached(student):
            values = []
            for _ in range(2):
                for x in (images(), images() * 2):
                    student(x)
                    values.append(float(transfer.loss().detach()))
                transfer.reset()
        assert values[0] == pytest.approx(values[2], rel=1e-5)
        assert values[0] != pytest.approx(values[1], rel=1e-3)

    def test_reevaluation_changes_nothing(self):
        student = make_student().eval()
        transfer = RepresentationTransfer(other_classes(), LAYERS, weight=0, distillation=1.0)
        with transfer.attached(student):
            student(images())
            first = transfer.loss()
            state = copy.deepcopy(transfer.state_dict())
            student(images())
            again = transfer.loss(reevaluation=True)
            assert float(first.detach()) == pytest.approx(float(again.detach()), rel=1e-6)
            assert differ_not(state, transfer.state_dict())


def differ_not(first: dict[str, Any], second: dict[str, Any]) -> bool:
    one, two = first["distillation"], second["distillation"]
    return (
        all(torch.equal(a, b) for a, b in zip(one["sums"], two["sums"], strict=True)) and one["calls"] == two["calls"]
    )


@pytest.mark.parametrize("make", [make_teacher, other_classes])
def test_autocast(make):
    """The loss is computed in float32, whatever the networks run in."""
    student = make_student()
    transfer = RepresentationTransfer(make(), LAYERS, weight=0, distillation=1.0)
    values = []
    with transfer.attached(student):
        for on in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                student(images())
                loss = transfer.loss()
            assert loss.dtype == torch.float32
            loss.backward()
            values.append(float(loss.detach()))
            transfer.reset()
    assert values[1] == pytest.approx(values[0], rel=0.05)


@pytest.mark.parametrize("make", [make_teacher, other_classes])
@pytest.mark.parametrize("weight", [0, 2.0])
def test_a_cached_teacher_gives_the_same_losses(make, weight, tmp_path):
    """From memory, and from a folder of an earlier run, whose weights may have been others."""
    found, hits = [], []
    for cache in (None, "memory", str(tmp_path), str(tmp_path)):
        student = make_student()
        transfer = RepresentationTransfer(make(), LAYERS, weight=weight, distillation=1.0, teacher_cache=cache)
        values = []
        with transfer.attached(student):
            for _ in range(2):
                for x, _ in loader(batch_size=16):
                    student(x)
                    values.append(float(transfer.loss().detach()))
            student(images())
            if cache is not None:
                with pytest.raises(RuntimeError, match="with `teacher_cache`"):
                    _ = transfer.teacher_output
                hits.append(transfer.cache.hit_rate)
            transfer.discard()
        found.append(values)
    assert hits[0] >= 0.5
    assert hits[2] == 1
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-5)
    other = RepresentationTransfer(make(), LAYERS, weight=2.0 - weight, distillation=1.0, teacher_cache=str(tmp_path))
    with other.attached(student):
        student(images())
        other.loss()
        assert (other.transport_value is None) == (weight > 0)
    assert other.cache.hit_rate == 1


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 100 * (x - x.mean())


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class TestWhatCannotBeMeant:
    @pytest.mark.parametrize(
        ("last", "said"),
        [
            (nn.Softmax(dim=1), "look like probabilities: .*Leave the softmax out"),
            (nn.Sequential(Scaled(), nn.Sigmoid()), "look like probabilities of single labels: .*activation='sigmoid'"),
            (nn.LayerNorm(3, elementwise_affine=False), ""),
            (Unit(), "have a length of 1 in each sample, as normalised embeddings have"),
        ],
        ids=["softmax", "sigmoid", "a norm", "unit length"],
    )
    def test_what_is_no_logits(self, last, said):
        teacher = nn.Sequential(make_teacher(), last)
        transfer = RepresentationTransfer(teacher, {"block1": "0.block1"}, distillation=1.0)
        with transfer.attached(student := make_student()), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            student(images())
            transfer.loss()
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == bool(said)
        assert all(re.match(f"The logits of the teacher {said}", message) for message in messages)

    @pytest.mark.parametrize("low", [0.0, 0.65])
    def test_logits_of_labels_between_0_and_1(self, low):
        """The zeros that stand for "no" are none of them. Those near both ends look like probabilities."""

        class Between(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return low + (0.97 - low) * (x - x.min()) / (x.max() - x.min())

        teacher = nn.Sequential(make_teacher(), Between())
        option = LogitDistillation(1.0, activation="sigmoid")
        transfer = RepresentationTransfer(teacher, {"block1": "0.block1"}, distillation=option)
        says = pytest.warns(UserWarning, match="probabilities of single labels") if not low else nullcontext()
        with transfer.attached(student := make_student()), says:
            student(images())
            transfer.loss()

    def test_logarithms_of_probabilities_are_logits(self):
        found = []
        for teacher in (make_teacher(), nn.Sequential(make_teacher(), nn.LogSoftmax(dim=1))):
            layers = {"block1": "0.block1" if isinstance(teacher, nn.Sequential) else "block1"}
            transfer = RepresentationTransfer(teacher, layers, weight=0, distillation=1.0)
            with transfer.attached(student := make_student()):
                student(images())
                found.append(float(transfer.loss().detach()))
        assert found[0] == pytest.approx(found[1], rel=1e-4)

    def test_features_that_are_frozen(self):
        student = make_student()
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name.startswith("head"))
        transfer = RepresentationTransfer(other_classes(), LAYERS, weight=0, distillation=1.0)
        with transfer.attached(student):
            student(images())
            with pytest.raises(RuntimeError, match="constant: the student's layer 'dropout:input' does not depend"):
                transfer.loss()
        same = RepresentationTransfer(make_teacher(), LAYERS, weight=0, distillation=1.0)
        with same.attached(student):
            student(images())
            same.loss().backward()
        assert student.head.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("frozen", "layers", "option", "left"),
        [
            ("body", {"body": "body"}, LogitDistillation(), "transport term"),
            ("body", {"middle": "middle"}, LogitDistillation(features="body"), "distillation of logits"),
        ],
    )
    def test_a_term_that_cannot_be_formed_leaves_the_other_one(self, frozen, layers, option, left):
        def net(width: int) -> nn.Module:
            return nn.Sequential(
                OrderedDict(body=nn.Linear(4, width), middle=nn.Linear(width, 6), head=nn.Linear(6, 3))
            )

        x = torch.randn(16, 4)
        for strict in (True, False):
            student = net(5)
            student.get_submodule(frozen).requires_grad_(False)
            transfer = RepresentationTransfer(net(8), layers, weight=1.0, distillation=option, strict=strict)
            with transfer.attached(student):
                student(x)
                if strict:
                    with pytest.raises(RuntimeError, match="constant|frozen"):
                        transfer.loss()
                    continue
                with pytest.warns(UserWarning, match=rf"strict=False: the {left} is left out") as caught:
                    loss = transfer.loss()
                assert len(caught) == 1
                student(x)
                loss = transfer.loss()  # without another warning
            values = {"transport term": transfer.transport_value, "distillation of logits": transfer.distillation_value}
            assert values.pop(left) is None
            assert float(loss.detach()) == pytest.approx(float(*values.values()), rel=1e-5)
            loss.backward()
            assert student.middle.weight.grad.abs().sum() > 0
            student.requires_grad_(True)
            with transfer.attached(student):
                student(x)
                transfer.loss()
            assert transfer.transport_value is not None
            assert transfer.distillation_value is not None

    def test_a_head_outside_of_the_root_that_the_user_named(self):
        body, head = make_student(), nn.Linear(3, 3)
        student = nn.ModuleDict({"body": body, "head": head})
        transfer = RepresentationTransfer(make_teacher(), LAYERS, student_root="body", distillation=1.0)
        with transfer.attached(student):
            head(body(images()))
            with pytest.warns(UserWarning, match="outside of the root 'body': 'head'.*takes what the root returns"):
                transfer.loss()
            head(body(images()))
            transfer.loss()


def test_nothing_of_the_student_is_kept():
    student = make_student()
    transfer = RepresentationTransfer(other_classes(), LAYERS, distillation=1.0)
    with transfer.attached(student):
        student(images())
        transfer.loss().backward()
    known, gone = weakref.ref(student.block1), weakref.ref(student)
    del student
    gc.collect()
    assert known() is None
    assert gone() is None


def test_it_trains():
    student, teacher = make_student(), make_teacher()
    start = weights(student)
    transfer = RepresentationTransfer(teacher, LAYERS, weight=0, distillation=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    values = []
    with transfer.attached(student):
        for _ in range(30):
            student(images(64))
            loss = transfer.loss()
            values.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert values[-1] < 0.5 * values[0]
    assert differ(weights(student), start)


class Parts(nn.Module):
    """An encoder and a head, which a step may call alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(this, x: Tensor) -> Tensor:
        return this.head(this.encoder(x))


@pytest.mark.parametrize("is_whole", [False, True])
def test_logits_of_an_encoder_that_later_runs_inside_of_its_network(is_whole):
    """The first step of a warm-up calls the encoder alone. What that returns are no logits of later steps."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    student = Parts(16) if is_whole else nn.ModuleDict({"net": Parts(16)})
    net, name = (student, "") if is_whole else (student["net"], "net")
    layers = {f"{name}.encoder.0".removeprefix("."): "encoder.0"}
    transfer = RepresentationTransfer(Parts(32), layers, distillation=1.0)
    with transfer.attached(student):
        net.encoder(x)
        transfer.loss()
        net(x)
        with pytest.raises(RuntimeError, match=f"ran inside of .*pass student_root='{name}'"):
            transfer.loss()
    # Without the logits the encoder is read in both.
    transfer = RepresentationTransfer(Parts(32), layers)
    with transfer.attached(student):
        for call in (net.encoder, net):
            call(x)
            assert transfer.loss() > 0
    # And as told.
    transfer = RepresentationTransfer(Parts(32), layers, distillation=1.0, student_root=name)
    with transfer.attached(student):
        with transfer.paused():
            net.encoder(x)
        net(x)
        transfer.loss()
        assert transfer.distillation_value > 0
