"""What counts as a forward of the student, what is read in it, and that hooks leave nothing behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_otrt.reading.masks import padding_mask
from lightning_otrt.reading.neurons import NeuronReader
from lightning_otrt.reading.recorder import Recorder
from lightning_otrt.reading.views import View

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class Net(nn.Module):
    """Two layers, the second in place of what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.ReLU(inplace=True)
        self.checkpointed = False
        self.fails = False

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        y = checkpoint(self.first, x, use_reentrant=False) if self.checkpointed else self.first(x)
        if self.fails:
            raise RuntimeError("on purpose")
        return self.second(y)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        return torch.stack([self.net(x) for _ in range(times)]).mean(0)


def reader(name: str) -> NeuronReader:
    return NeuronReader(f"layer {name!r}", neuron_axis=1)


class Started:
    """Notes the forwards that a recorder announces, and answers whether they are recorded."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        self.calls.append((name, args, kwargs))
        return self.answer


def watched(net: nn.Module, started: Started | None = None, *, roots: Any = None, layer: str = "first") -> Recorder:
    recorder = Recorder(started or Started())
    recorder.watch_roots(roots or [("", net)])
    module = net.get_submodule(layer.removesuffix(":input"))
    recorder.watch_student({layer: (layer, module, reader(layer))})
    recorder.enabled = True
    return recorder


def handles(module: nn.Module) -> int:
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in KINDS[:2])


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3)


def test_each_forward_is_a_view_with_what_the_layer_gave(net, x) -> None:
    started = Started()
    recorder = watched(net, started)
    outputs = [net.first(x).detach(), net.first(2 * x).detach()]
    net(x)
    net(2 * x, word=1)
    views = recorder.take()
    assert [view.root for view in views] == ["", ""]
    assert recorder.take() == []
    for view, output in zip(views, outputs, strict=True):
        [reading] = view.student["first"]
        torch.testing.assert_close(reading, output, rtol=0, atol=0)  # not what the next layer made of it in place
        assert reading.requires_grad
        assert view.has_gradient
        assert view.teacher == {}
    assert [(name, args[0] is x, kwargs) for name, args, kwargs in started.calls] == [
        ("", True, {}),
        ("", False, {"word": 1}),
    ]


def test_the_input_of_a_layer(net, x) -> None:
    recorder = watched(net, layer="second:input")
    expected = net.first(x)
    net(x)
    [view] = recorder.take()
    torch.testing.assert_close(view.student["second:input"], [expected], rtol=0, atol=0)


def test_the_input_by_name(x) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x=x.tanh())

    net = Named()
    recorder = watched(net, layer="inner:input")
    net(x)
    [view] = recorder.take()
    torch.testing.assert_close(view.student["inner:input"], [x.tanh()], rtol=0, atol=0)
    assert not view.has_gradient


@pytest.mark.parametrize("answer", [False, True])
def test_the_caller_decides_whether_a_forward_is_recorded(net, x, answer) -> None:
    recorder = watched(net, Started(answer))
    net(x)
    assert len(recorder.take()) == answer
    assert recorder.current is None


def test_an_error_of_the_caller_leaves_no_open_view(net, x) -> None:
    def fails(*args: Any) -> bool:
        raise ValueError("on purpose")

    recorder = watched(net)
    recorder.on_forward = fails
    with pytest.raises(ValueError, match="on purpose"):
        net(x)
    assert recorder.current is None
    recorder.on_forward = Started()
    net(x)
    assert len(recorder.take()) == 1


def test_forwards_that_do_not_count(net, x) -> None:
    started = Started()
    recorder = watched(net, started)
    with torch.no_grad():
        net(x)
    with recorder.switched_off():
        assert not recorder.enabled
        net(x)
    assert recorder.enabled
    recorder.enabled = False
    with recorder.switched_off():
        net(x)
    assert not recorder.enabled
    net(x)
    assert not started.calls
    assert recorder.take() == []


def test_a_forward_that_raises_is_no_view(net, x) -> None:
    recorder = watched(net)
    net.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        net(x)
    assert recorder.current is None
    net.fails = False
    net(x)
    assert len(recorder.take()) == 1


def test_only_the_outermost_root_opens_a_view(x) -> None:
    outer, started = Outer(), Started()
    recorder = watched(outer, started, roots=[("", outer), ("net", outer.net)], layer="net.first")
    outer(x, times=3)
    outer.net(x)
    views = recorder.take()
    assert [view.root for view in views] == ["", "net"]
    assert [len(view.student["net.first"]) for view in views] == [3, 1]
    assert [name for name, *_ in started.calls] == ["", "net"]


def test_a_root_inside_itself_is_left_out(x) -> None:
    """As when another recorder traces the student from inside of its forward."""

    class Twice(Net):
        def forward(self, x: Tensor, deep: bool = False) -> Tensor:
            if not deep:
                self(x + 1, deep=True)
            return super().forward(x)

    net = Twice()
    started = Started()
    recorder = watched(net, started)
    net(x)
    net(x)
    views = recorder.take()
    assert len(started.calls) == len(views) == 2
    assert recorder.nested == 0
    for view in views:
        torch.testing.assert_close(view.student["first"], [net.first(x)], rtol=0, atol=0)


def test_recomputation_in_the_backward_pass_is_not_read_again(net, x) -> None:
    recorder = watched(net)
    net.checkpointed = True
    y = net(x)
    with recorder.switched_off():
        expected = net.first(x)
    [view] = recorder.take()
    recorder.current = View("")
    y.sum().backward(retain_graph=True)
    assert recorder.current.student == {}
    recorder.current = None
    torch.testing.assert_close(view.student["first"], [expected], rtol=0, atol=0)
    view.student["first"][0].sum().backward()
    assert net.first.weight.grad is not None


def test_a_forward_inside_of_a_backward_is_none_of_the_students(net, x) -> None:
    recorder, calls = watched(net), []
    z = x.clone().requires_grad_()

    def attack(gradient: Tensor) -> None:
        with torch.enable_grad():
            calls.append(net(x))

    z.register_hook(attack)
    (z * 2).sum().backward()
    assert calls
    assert recorder.take() == []


def test_the_teacher_is_read_only_while_this_recorder_runs_it(net, x) -> None:
    teacher, recorder = Net(), watched(net)
    recorder.watch_teacher({"t": ("first", teacher.first, reader("first"))})

    def run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        teacher(args[0])  # by another recorder
        with recorder.teacher_running(), torch.no_grad():
            assert recorder.runs_teacher
            teacher(args[0])
        assert not recorder.runs_teacher
        return True

    recorder.on_forward = run
    net(x)
    teacher(x)
    [view] = recorder.take()
    assert len(view.teacher["t"]) == 1
    assert not view.teacher["t"][0].requires_grad
    torch.testing.assert_close(view.teacher["t"][0], teacher.first(x).detach(), rtol=0, atol=0)


def test_each_side_is_read_with_its_own_mask() -> None:
    seen = {}

    class Masked(NeuronReader):
        def __call__(self, output: Any, mask: Tensor | None = None) -> Tensor:
            seen[self.layer] = mask
            return super().__call__(output)

    student, teacher = Net(), Net()
    recorder = watched(student)
    recorder.watch_student({"s": ("first", student.first, Masked("s", neuron_axis=1))})
    recorder.watch_teacher({"t": ("first", teacher.first, Masked("t", neuron_axis=1))})
    other = torch.ones(5, 2, dtype=torch.bool)

    def run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        assert recorder.current is not None
        recorder.current.teacher_mask = other
        with recorder.teacher_running():
            teacher(args[0])
        return True

    recorder.on_forward = run
    student(torch.randn(5, 3), attention_mask=torch.tensor([[1, 0]] * 5))
    assert seen["s"].tolist() == [[True, False]] * 5
    assert seen["t"] is other


def test_watching_again_replaces_the_hooks(net, x) -> None:
    recorder = watched(net)
    before = handles(net)
    recorder.watch_roots([("", net)])
    recorder.watch_student({"first": ("first", net.first, reader("first"))})
    recorder.watch_teacher({"t": ("first", net.first, reader("first"))})
    recorder.watch_teacher({})
    assert handles(net) == before == 3
    net(x)
    [view] = recorder.take()
    assert len(view.student["first"]) == 1


def test_remove_leaves_nothing(net, x) -> None:
    recorder = watched(net)
    recorder.watch_teacher({"t": ("second", net.second, reader("second"))})
    recorder.nested, recorder.runs_teacher = 2, True
    net(x)
    recorder.current = View("")
    recorder.remove()
    assert handles(net) == 0
    assert not any(getattr(part, kind) for part in net.modules() for kind in KINDS)
    assert (recorder.views, recorder.current, recorder.enabled) == ([], None, False)
    assert (recorder.nested, recorder.runs_teacher) == (0, False)
    net(x)
    assert recorder.take() == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_a_hooked_module_record_nothing(net, x, how) -> None:
    recorder = watched(net)
    copied = how(net)
    assert handles(copied) == handles(net)
    torch.testing.assert_close(copied(x), net(x))
    assert len(recorder.take()) == 1
    hooks = [hook for part in copied.modules() for kind in KINDS[:2] for hook in getattr(part, kind).values()]
    assert all(hook.recorder is None and not vars(hook) for hook in hooks)


def test_gradient_of_a_view() -> None:
    view = View("")
    assert not view.has_gradient
    view.student = {"a": [torch.zeros(1)], "b": [torch.zeros(1), torch.zeros(1, requires_grad=True)]}
    assert view.has_gradient
    view.student["b"].pop()
    view.teacher = {"t": [torch.zeros(1, requires_grad=True)]}
    assert not view.has_gradient


VALID = torch.tensor([[1, 1, 0], [1, 0, 0]])
PADDING = VALID == 0


@pytest.mark.parametrize(
    ("args", "kwargs", "found"),
    [
        ((), {"attention_mask": VALID}, True),
        ((), {"padding_mask": VALID.bool()}, True),
        ((), {"attention_mask": VALID * 0.5}, True),
        ((), {"src_key_padding_mask": PADDING}, True),
        ((), {"key_padding_mask": PADDING}, True),
        (({"attention_mask": VALID},), {}, True),
        (({"input_ids": VALID},), {"attention_mask": VALID}, True),
        (({"attention_mask": PADDING},), {"attention_mask": VALID}, True),
        ((), {"attention_mask": VALID, "key_padding_mask": VALID.bool()}, True),
        ((), {"attention_mask": VALID[None]}, False),
        ((), {"attention_mask": VALID[0]}, False),
        ((), {"attention_mask": VALID.tolist()}, False),
        ((), {"key_padding_mask": PADDING[0]}, False),
        ((), {"key_padding_mask": PADDING.float()}, False),
        ((), {"key_padding_mask": None}, False),
        ((VALID,), {}, False),
        ((), {}, False),
    ],
)
def test_padding_masks(args, kwargs, found) -> None:
    mask = padding_mask(args, kwargs)
    if found:
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.tolist() == VALID.bool().tolist()
    else:
        assert mask is None


def test_readings_are_left_out_of_the_count_of_activation_checkpointing(x) -> None:
    """What a reading saves for its backward is not saved again in the recomputation, which torch would refuse."""
    net = Net()

    class Squared(NeuronReader):
        def __call__(self, output: Any, mask: Tensor | None = None) -> Tensor:
            return super().__call__(output).exp()

    recorder = Recorder(Started())
    recorder.watch_roots([("", net)])
    recorder.watch_student({"first": ("first", net.first, Squared("first", neuron_axis=1))})
    recorder.enabled = True
    net.checkpointed = True
    y = net(x)
    [view] = recorder.take()
    (y.sum() + view.student["first"][0].sum()).backward()
    expected = Net()
    expected.load_state_dict(net.state_dict())
    z = expected.first(x)
    (z.relu().sum() + z.exp().sum()).backward()
    torch.testing.assert_close(net.first.weight.grad, expected.first.weight.grad)
