"""What is read in a forward, and what copies of a hooked module do."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from reading.recorded import KINDS, Net, Started, handles, watched
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.reading.hooks.recorder import RecordedLayer, Recorder
from lightning_otrt.reading.neurons.reader import NeuronReader


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
        [reading] = view.student[0]
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
    torch.testing.assert_close(view.student[0], [expected], rtol=0, atol=0)


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
    torch.testing.assert_close(view.student[0], [x.tanh()], rtol=0, atol=0)
    assert not view.has_gradient


def test_a_forward_that_raises_is_no_view(net, x) -> None:
    recorder = watched(net)
    net.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        net(x)
    assert recorder.current is None
    net.fails = False
    net(x)
    assert len(recorder.take()) == 1


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
        torch.testing.assert_close(view.student[0], [net.first(x)], rtol=0, atol=0)


def test_recomputation_in_the_backward_pass_is_not_read_again(net, x) -> None:
    recorder = watched(net)
    net.checkpointed = True
    y = net(x)
    with recorder.switched_off():
        expected = net.first(x)
    [view] = recorder.take()
    recorder.open()
    y.sum().backward(retain_graph=True)
    assert recorder.current.student == {}
    recorder.close()
    torch.testing.assert_close(view.student[0], [expected], rtol=0, atol=0)
    view.student[0][0].sum().backward()
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


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.first(x)


def test_each_side_is_read_with_its_own_mask() -> None:
    seen = {}

    class Masked(NeuronReader):
        def __call__(self, output: Any, mask: Tensor | None = None, grid: Any = None) -> Tensor:
            seen[self.layer] = mask
            return super().__call__(output, mask)

    student, teacher = Tokens(), Tokens()
    recorder = Recorder(Started())
    recorder.watch_roots([("", student)])
    recorder.switch(True)
    source = MaskSource("", "attention_mask", "valid")
    own = RecordedLayer("first", student.first, Masked("s", neuron_axis=2), ((source, student),))
    recorder.watch_student({0: own})
    padding = replace(source, true_at="padding", is_named=True)
    others = RecordedLayer("first", teacher.first, Masked("t", neuron_axis=2), ((padding, teacher),))
    recorder.watch_teacher({0: others})
    mask = torch.tensor([[1, 0]] * 5)

    def run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        recorder.run_teacher(lambda args, kwargs: teacher(*args, **kwargs), args[:1], {"attention_mask": mask})
        teacher(args[0], attention_mask=mask[:, :1])  # a forward that is none of this recorder
        return True

    recorder.on_forward = run
    for given in ((torch.randn(5, 2, 3), mask), (torch.randn(5, 2, 3), None)):
        student(*given)
        assert seen["t"].tolist() == [[False, True]] * 5
        assert (seen["s"] is None) if given[1] is None else seen["s"].tolist() == [[True, False]] * 5


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_a_hooked_module_record_nothing(net, x, how) -> None:
    recorder = watched(net)
    copied = how(net)
    assert handles(copied) == handles(net)
    hooks = [hook for part in copied.modules() for kind in KINDS[:2] for hook in getattr(part, kind).values()]
    assert hooks
    assert not any(map(vars, hooks)), "they hold nothing of the recorder"
    torch.testing.assert_close(copied(x), net(x))
    assert len(recorder.take()) == 1
    assert handles(copied) == 0


def test_readings_are_left_out_of_the_count_of_activation_checkpointing(x) -> None:
    """What a reading saves for its backward is not saved again in the recomputation, which torch would refuse."""
    net = Net()

    class Squared(NeuronReader):
        def __call__(self, output: Any, mask: Tensor | None = None, grid: Any = None) -> Tensor:
            return super().__call__(output).exp()

    recorder = Recorder(Started())
    recorder.watch_roots([("", net)])
    recorder.watch_student({0: RecordedLayer("first", net.first, Squared("first", neuron_axis=1))})
    recorder.switch(True)
    net.checkpointed = True
    y = net(x)
    [view] = recorder.take()
    (y.sum() + view.student[0][0].sum()).backward()
    expected = Net()
    expected.load_state_dict(net.state_dict())
    z = expected.first(x)
    (z.relu().sum() + z.exp().sum()).backward()
    torch.testing.assert_close(net.first.weight.grad, expected.first.weight.grad)
