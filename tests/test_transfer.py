"""The engine in a plain PyTorch loop, and what every public call leaves as it was."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import CLASSES, Net, assert_same, differ, forwards, hooks, loader, make_teacher, seeded, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import lightning_otrt
from lightning_otrt import LinearWarmup, RepresentationTransfer, load_teacher, neurons, transport_distance

LAYERS = {"block1": "block1", "block2": "block2"}


def make_student(width: int = 4, *, norm: bool = True) -> Net:
    return seeded(0, Net, width, norm=norm)


def make_transfer(teacher: nn.Module | None = None, **options: Any) -> RepresentationTransfer:
    teacher = make_teacher() if teacher is None else teacher
    return RepresentationTransfer(teacher, **{"layers": LAYERS, "weight": 2.0, **options})


def batch() -> Tensor:
    return next(iter(loader()))[0]


def step(transfer: RepresentationTransfer, student: nn.Module, x: Tensor | None = None) -> Tensor:
    student(batch() if x is None else x)
    return transfer.loss()


# Which forwards count


def test_the_block_ends_with_no_hook_left():
    student, transfer = make_student(), make_transfer()
    with transfer.attached(student) as inside:
        assert inside is transfer
        assert transfer.is_attached
        assert hooks(student)
        step(transfer, student)
        assert hooks(transfer.teacher.module)
    assert not hooks(student, transfer.teacher.module)
    assert not transfer.is_attached
    with pytest.raises(ZeroDivisionError):
        record_and_fail(transfer, student)
    assert not hooks(student, transfer.teacher.module)
    assert not transfer.has_views


def record_and_fail(transfer: RepresentationTransfer, student: nn.Module) -> None:
    with transfer.attached(student):
        student(batch())
        raise ZeroDivisionError


def test_a_forward_that_fails_is_forgotten():
    """Its open view would swallow the next forward."""
    student, transfer = make_student(), make_transfer()
    with transfer.attached(student):
        with pytest.raises(RuntimeError):
            student(torch.zeros(2, 5, 8, 8))
        for part in ("block2", "head"):
            handle = student.get_submodule(part).register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                student(batch())
            handle.remove()
            assert not transfer.has_views
        first = step(transfer, student)
    again = make_transfer()
    with again.attached(fresh := make_student()):
        expected = step(again, fresh)
    assert abs(float((first - expected).detach())) < 0.2  # BatchNorm has seen more batches, no more than that
    assert [len(transfer.distances), len(again.distances)] == [2, 2]


def fail(*args: Any) -> None:
    raise ZeroDivisionError


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_forward_is_forgotten():
    """As in a notebook, where the cell of the loop runs again. Torch calls no hook after an interrupt."""
    student, transfer = make_student(), make_transfer()
    transfer.attach(student)
    for _ in range(2):
        handle = student.head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), transfer.recording():
            student(batch())
        handle.remove()
        with transfer.recording():
            step(transfer, student)
    assert transfer.engine.calls == 2
    transfer.detach()


def test_nothing_is_recorded_after_a_schedule_that_fails():
    student, transfer = make_student(), make_transfer(schedule=fail)
    transfer.attach(student)
    with pytest.raises(RuntimeError, match="`schedule` .* failed at step 0. ZeroDivisionError"), transfer.recording():
        pass
    transfer.schedule = None
    student(batch())
    assert not transfer.has_views
    transfer.detach()


IGNORED: dict[str, Callable[[RepresentationTransfer, nn.Module], Any]] = {
    "no_grad": lambda transfer, student: under(torch.no_grad(), student),
    "inference mode": lambda transfer, student: under(torch.inference_mode(), student),
    "paused": lambda transfer, student: under(transfer.paused(), student),
    "frozen": lambda transfer, student: frozen(student),
}


def under(context: Any, student: nn.Module) -> None:
    with context:
        student(batch() + 1)


def frozen(student: nn.Module) -> None:
    student.requires_grad_(False)
    student(batch() + 1)
    student.requires_grad_(True)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", IGNORED)
def test_forwards_that_do_not_count(name, first):
    """Before the layers are resolved and after; the term is that of the forward that counts alone."""
    values = []
    for ignored in (IGNORED[name], lambda transfer, student: None):
        student, transfer = make_student().eval(), make_transfer()
        with transfer.attached(student):
            if first:
                ignored(transfer, student)
                assert not transfer.has_views
            student(batch())
            if not first:
                ignored(transfer, student)
            values.append((transfer.loss().detach(), transfer.engine.calls))
            assert not transfer.has_views
    assert values[0] == values[1]
    assert float(values[0][0]) > 0


def test_the_teacher_runs_for_forwards_that_count():
    teacher = make_teacher()
    student, transfer = make_student(), make_transfer(teacher)
    with forwards(teacher) as count, transfer.attached(student):
        for ignored in ("no_grad", "inference mode", "paused"):
            IGNORED[ignored](transfer, student)
        assert not count
        step(transfer, student)
        assert len(count) == 4  # one to trace its layers, two to see how its maps lie
        step(transfer, student)
        assert len(count) == 5


@pytest.mark.parametrize("grid", [4, 3])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("part", ["root", "layer"])
def test_recomputed_forwards_do_not_count(part, early_stop, grid):
    """By activation checkpointing, in a backward inside the block. A grid that does not divide saves tensors."""

    def loop(checkpointed: bool) -> tuple[list[float], dict[str, Tensor], int]:
        student, teacher = make_student(norm=False), make_teacher()
        transfer, values = make_transfer(teacher, grid=grid), []
        run = student
        if checkpointed and part == "root":
            run = lambda x: checkpoint(student, x, use_reentrant=False)  # noqa: E731
        if checkpointed and part == "layer":
            inner = student.block1.forward
            student.block1.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
        with forwards(teacher) as count, transfer.attached(student), set_checkpoint_early_stop(early_stop):
            for x, y in list(loader())[:3]:
                loss = F.cross_entropy(run(x), y) + transfer.loss()
                loss.backward()
                values.append(float(loss.detach()))
        return values, {name: p.grad for name, p in student.named_parameters()}, len(count)

    found, expected = loop(True), loop(False)
    assert found[0] == expected[0]
    assert_same(found[1], expected[1])
    assert found[2] == expected[2] == 6


class Penalised(Net):
    """Takes a gradient through a checkpointed layer within its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        with torch.enable_grad(), set_checkpoint_early_stop(False):
            hidden = checkpoint(self.block1, x, use_reentrant=False)
            (gradient,) = torch.autograd.grad(hidden.square().sum(), x, retain_graph=True)
        return self.head(self.block2((x * gradient).repeat(1, 4, 1, 1)).mean((2, 3)))


def test_recomputation_within_a_forward_does_not_count():
    student, transfer = seeded(0, Penalised, norm=False), make_transfer()
    with transfer.attached(student):
        step(transfer, student).backward()
        assert len(transfer.distances) == 2


def test_copies_do_not_record():
    """A copy of a hooked student is another network, and brings no teacher along."""
    teacher = make_teacher()
    student, transfer = make_student(), make_transfer(teacher)
    with forwards(teacher) as count, transfer.attached(student):
        step(transfer, student)
        for copied in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
            copied(batch())
            assert not transfer.has_views
            assert not any(part._forward_hooks for part in copied.modules())
        assert len(count) == 4
        step(transfer, student)
        assert transfer.engine.calls == 2


def test_discarded_forwards():
    student, transfer = make_student(), make_transfer()
    with transfer.attached(student):
        student(batch())
        assert transfer.has_views
        transfer.discard()
        with pytest.raises(RuntimeError, match="was not called with gradient since the last call"):
            transfer.loss()
        assert transfer.engine.calls == 0


def test_attaching_twice_and_not_at_all():
    student, transfer = make_student(), make_transfer()
    with pytest.raises(RuntimeError, match="needs an attached student"):
        transfer.loss()
    with transfer.attached(student), pytest.raises(RuntimeError, match="attached already"):
        transfer.attach(make_student())
    with transfer.attached(student):
        assert float(step(transfer, student).detach()) > 0


def test_again_and_with_another_student():
    """Plans of one student are not used for another."""
    transfer = make_transfer(layers="penultimate")
    with transfer.attached(student := make_student(4)):
        step(transfer, student)
    with (
        transfer.attached(wider := make_student(8)),
        pytest.warns(UserWarning, match="another one than the transfer had before"),
        pytest.raises(ValueError, match="to start anew"),
    ):
        step(transfer, wider)
    transfer.reset()
    with transfer.attached(student := make_student(8)):
        step(transfer, student)
        assert transfer.distances[0].matrix.shape == (16, 12)


@pytest.mark.parametrize("distills", [False, True])
def test_another_student_goes_on_with_a_word(distills):
    """As in folds of a cross-validation; the same one again, and one that resumes, are not told of."""
    options = {"weight": 0.0, "distillation": 1.0} if distills else {}
    transfer, student = make_transfer(**options), make_student()
    for _ in range(2):
        with transfer.attached(student):
            step(transfer, student)
    state = transfer.state_dict()
    other = make_student()
    with transfer.attached(other), pytest.warns(UserWarning, match=r"This student \(.*\) is another one"):
        step(transfer, other)
    for start in (transfer.reset, lambda: transfer.load_state_dict(state)):
        start()
        with transfer.attached(other := make_student()):
            step(transfer, other)
    copied = pickle.loads(pickle.dumps(transfer))
    with copied.attached(other := make_student()):
        step(copied, other)


class Encoder(Net):
    def encode(self, x: Tensor) -> Tensor:
        return self.forward(x)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_several_transfers_give_a_method_back_in_any_order(order):
    student = Encoder()
    transfers = [make_transfer(student_root=":encode") for _ in order]
    for transfer in transfers:
        transfer.attach(student)
    for place in order:
        assert "encode" in vars(student)
        transfers[place].detach()
    assert "encode" not in vars(student)


def test_recording_can_be_switched_by_hand():
    student, transfer = make_student(), make_transfer()
    transfer.attach(student)
    student(batch())
    assert not transfer.has_views
    with pytest.raises(RuntimeError, match=r"inside `with transfer\.recording\(\):`"):
        transfer.loss()
    with transfer.recording():
        student(batch())
    student(batch())
    transfer.loss()
    assert transfer.engine.calls == 1
    transfer.detach()
    assert not hooks(student)


def test_the_teacher_shows_what_it_is():
    assert repr(make_transfer().teacher) == "Teacher(Net(...))"
    assert repr(make_transfer(teacher_dtype="bfloat16").teacher) == "Teacher(Net(...), dtype=torch.bfloat16)"


def test_constant_terms_are_refused():
    student, transfer = make_student(), make_transfer()
    with transfer.attached(student):
        step(transfer, student)
        student.requires_grad_(False)
        student(batch())
        with pytest.raises(RuntimeError, match=r"constant: .*'block1', 'block2'.*frozen"):
            transfer.loss()


def test_partly_frozen_students_are_told():
    student, transfer = make_student(), make_transfer()
    student.block1.requires_grad_(False)
    with transfer.attached(student), pytest.warns(UserWarning, match=r"'block1'\] get no gradient"):
        loss = step(transfer, student)
    loss.backward()
    assert student.block1[0].weight.grad is None
    assert bool(student.block2[0].weight.grad.any())


# Settings


def test_the_schedule_follows_the_step():
    student, transfer = make_student(), make_transfer(schedule=LinearWarmup(4))
    seen = []
    with transfer.attached(student):
        for _ in range(5):
            seen.append(transfer.current_weights.transport)
            step(transfer, student)
    assert seen == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_an_adapter_gives_the_teacher_its_inputs():
    values = []
    for adapter in (None, lambda x: x, lambda x: {"x": x}, lambda x: 2 * x + 1):
        student, transfer = make_student(), make_transfer(teacher_inputs=adapter)
        with transfer.attached(student):
            values.append(float(step(transfer, student).detach()))
    assert values[0] == values[1] == values[2] != values[3]


def test_the_root_is_what_the_teacher_stands_for():
    """A stem of the student that the teacher does not have."""

    class Stemmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(1, 1, 3, padding=1), make_student()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.stem(x))

    seen = []
    teacher = make_teacher()
    student = seeded(4, Stemmed)
    for root in (None, "body"):
        transfer = make_transfer(
            teacher, layers={"body.block1": "block1"}, student_root=root, teacher_inputs=lambda x: seen.append(x) or x
        )
        with transfer.attached(student):
            step(transfer, student)
        last = seen[-1]
        torch.testing.assert_close(last, batch() if root is None else student.stem(batch()).detach())


def test_state_goes_through_a_file():
    def three(transfer: RepresentationTransfer, student: nn.Module, count: int) -> float:
        with transfer.attached(student):
            for index in range(count):
                value = step(transfer, student, batch() + index)
        return float(value.detach())

    whole = make_transfer(memory=0.9)
    student = make_student().eval()
    three(whole, student, 3)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    expected = three(whole, student, 2)
    resumed = make_transfer(memory=0.9)
    resumed.load_state_dict(state)
    assert resumed.step == 3
    assert three(resumed, student, 2) == expected
    assert three(make_transfer(memory=0.9), student, 2) != expected
    other = make_transfer(layers={"block1": "block1"})
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="saved with the layer pairs"), other.attached(student):
        student(batch())


def test_random_numbers_are_left_alone():
    for layers in (LAYERS, "auto", "penultimate"):
        student, transfer = make_student(), make_transfer(layers=layers, plan="random")
        x = batch()  # a DataLoader draws a seed
        before = torch.get_rng_state()
        with transfer.attached(student):
            step(transfer, student, x).backward()
        assert torch.equal(torch.get_rng_state(), before)


def test_the_plain_loop_trains_and_the_teacher_stays():
    teacher, student = make_teacher(), make_student()
    before, start = weights(teacher), weights(student)
    transfer = make_transfer(teacher, layers="auto")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    values = []
    with transfer.attached(student):
        for x, y in loader():
            loss = F.cross_entropy(student(x), y) + (term := transfer.loss())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(term.detach()))
    assert_same(weights(teacher), before)
    assert differ(weights(student), start)
    assert values[-1] < values[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert teacher.training


# Autograd as it was


def failing(*args: Any) -> Any:
    raise ZeroDivisionError


def loop(student: nn.Module | None = None, **options: Any) -> Callable[[], Any]:
    def call() -> None:
        model = make_student() if student is None else student
        transfer = make_transfer(**options)
        with transfer.attached(model):
            step(transfer, model)
            transfer.check_finite()
            transfer.state_dict()
            transfer.reset()

    return call


class FailingNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return failing()


def nan_student() -> Net:
    student = make_student()
    student.block1[0].weight.data.fill_(float("nan"))
    return student


A, B = torch.arange(24.0).reshape(4, 6).sin(), torch.arange(36.0).reshape(6, 6).cos()
CALLS: dict[str, tuple[Callable[[], Any], type[Exception] | None]] = {
    "transport_distance": (lambda: transport_distance(A, B), None),
    "transport_distance of NaN": (lambda: transport_distance(A / 0 * 0, B), ValueError),
    "transport_distance of a failing cost": (lambda: transport_distance(A, B, cost=failing), ZeroDivisionError),
    "transport_distance of a negative cost": (
        lambda: transport_distance(A, B, cost=lambda y, x: -((y @ x.T) ** 2)),
        ValueError,
    ),
    "transport_distance of other shapes": (lambda: transport_distance(A, B[:, :3]), ValueError),
    "transport_distance with the exact plan": (lambda: transport_distance(A, B, plan="exact"), None),
    "neurons": (lambda: neurons(torch.randn(4, 3, 8, 8), neuron_axis=1), None),
    "neurons, ambiguous": (lambda: neurons(torch.randn(4, 3, 8, 8)), ValueError),
    "load_teacher": (lambda: load_teacher("resnet18", weights=None), None),
    "load_teacher, unknown": (lambda: load_teacher("resnet81"), ValueError),
    "loop": (loop(), None),
    "loop of blocks": (loop(layers="auto"), None),
    "loop with a misspelt layer": (loop(layers={"blok1": "block1"}), ValueError),
    "loop with a failing cost": (loop(cost=failing), ZeroDivisionError),
    "loop with a failing adapter": (loop(teacher_inputs=failing), RuntimeError),
    "loop with a failing teacher": (loop(teacher=FailingNet()), RuntimeError),
    "loop with a failing student": (loop(FailingNet()), ZeroDivisionError),
    "loop with a student of NaN": (loop(nan_student()), ValueError),
    "loop with a failing schedule": (loop(schedule=failing), RuntimeError),
}


@pytest.mark.parametrize("mode", ["gradient", "no gradient", "inference"])
@pytest.mark.parametrize("name", CALLS)
def test_autograd_is_as_before(name, mode):
    call, error = CALLS[name]
    context = {"gradient": nullcontext(), "no gradient": torch.no_grad(), "inference": torch.inference_mode()}[mode]
    if mode != "gradient" and name.startswith("loop"):
        # Without gradient nothing is recorded, so that the first thing missing is the term.
        error = error if name in ("loop with a misspelt layer", "loop with a failing schedule") else RuntimeError
        error = ZeroDivisionError if name == "loop with a failing student" else error
    with context:
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        with nullcontext() if error is None else pytest.raises(error):
            call()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == before


# Documentation


#: Types of arguments, which have no docstring.
ALIASES = ("LayerSpec", "Schedule", "TeacherSource")


@pytest.mark.parametrize("name", sorted({*lightning_otrt.__all__} - {*ALIASES}))
def test_every_public_name_has_an_example_that_runs(name):
    found = getattr(lightning_otrt, name)
    assert inspect.getdoc(found), name
    module = importlib.import_module(found.__module__)
    tests = doctest.DocTestFinder().find(found, name, module=module, globs=vars(module).copy())
    examples = [example for test in tests for example in test.examples]
    assert examples, f"{name} has no example"
    assert not any(example.options.get(doctest.SKIP) for example in examples), f"{name} has an example that is skipped"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in tests:
        assert runner.run(test).failed == 0


def test_the_number_of_classes_is_no_matter():
    """Teacher and student differ in everything but the names of the layers."""
    student = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, CLASSES + 4))
    transfer = RepresentationTransfer(make_teacher(), {"1": "block1"})
    with transfer.attached(student):
        loss = step(transfer, student)
    loss.backward()
    assert bool(student[0].weight.grad.any())


def test_a_state_that_is_none_is_refused_by_its_keys() -> None:
    transfer = RepresentationTransfer(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Expected the `state_dict` of a RepresentationTransfer.*'engine'.*missing"):
        transfer.load_state_dict({"step": 3})
    assert transfer.step == 0


@pytest.mark.parametrize("factors", [[1.0, 2.0, 3.0], [1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
def test_a_batch_that_is_evaluated_again_keeps_its_weight(factors):
    """The closures of LBFGS: the step of the schedule goes on after the first evaluation."""
    transfer, student, images = make_transfer(schedule=lambda step: factors[step]), make_student().eval(), batch()
    with transfer.attached(student):
        values = []
        for again in (False, True, True):
            if not again or factors[1]:
                student(images)
                values.append(float(transfer.loss(reevaluation=again).detach()))
            else:  # nothing was recorded where the next step has no weight
                student(images)
                with pytest.raises(RuntimeError, match="was not called with gradient"):
                    transfer.loss(reevaluation=True)
    assert values == [pytest.approx(values[0], rel=1e-5)] * len(values)
    assert bool(values[0]) == bool(factors[0])
    assert transfer.step == 1


def test_lbfgs_at_the_end_of_a_schedule():
    """All evaluations of the last step with a weight have it, and the teacher rests soon after."""
    transfer, student, images = make_transfer(schedule=lambda step: float(step < 3)), make_student().eval(), batch()
    optimizer = torch.optim.LBFGS(student.parameters(), lr=1e-6, max_iter=3, tolerance_change=0, tolerance_grad=0)
    values: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        task = student(images).square().mean()
        term = transfer.loss(reevaluation=bool(values))
        values.append(float(term.detach()))
        (task + term).backward()
        return task + term

    runs: list[bool] = []
    hook = transfer.teacher.module.register_forward_hook(lambda *_: runs.append(True))
    with transfer.attached(student):
        for step in range(5):
            values.clear()
            before = len(runs)
            optimizer.step(closure)
            assert len(values) > 1
            assert all(bool(value) == (step < 3) for value in values)
            assert step < 4 or len(runs) == before
    hook.remove()


@pytest.mark.parametrize("start", ["reset", "load_state_dict"])
def test_a_new_run_has_no_forwards_of_before(start: str):
    """As after an error between the forward and the loss."""
    transfer, student = make_transfer(), make_student()
    with transfer.attached(student):
        step(transfer, student)
        state = transfer.state_dict()
        student(batch())
        if start == "reset":
            transfer.reset()
        else:
            transfer.load_state_dict(state)
        images = batch()[:7]
        student(images)
        transfer.loss()
        assert transfer.samples == 7


def test_a_first_call_that_is_said_to_be_a_second_one_has_its_weight():
    """A closure may count from a number of its own; and after a reset there is no earlier call."""
    transfer, student = make_transfer(schedule=lambda step: 1.0), make_student().eval()
    with transfer.attached(student):
        for _ in range(2):
            student(batch())
            assert float(transfer.loss(reevaluation=True).detach()) > 0
            transfer.reset()
            assert not any(transfer.last_weights)


def test_another_student_after_a_reset_in_the_middle_of_a_run():
    transfer = make_transfer()
    with transfer.attached(student := make_student()):
        step(transfer, student)
        transfer.reset()
        assert (transfer.samples, transfer.distances, transfer.transport_value) == (0, [], None)
        step(transfer, student)
    with transfer.attached(other := make_student()), pytest.warns(UserWarning, match="is another one"):
        step(transfer, other)
