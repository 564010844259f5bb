"""Which forwards a recorder records, and that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reading.recorded import KINDS, Net, Outer, Started, handles, reader, watched

from lightning_otrt.reading.hooks.recorder import RecordedLayer


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
    recorder.switch(False)
    with recorder.switched_off():
        net(x)
    assert not recorder.enabled
    net(x)
    assert not started.calls
    assert recorder.take() == []


def test_only_the_outermost_root_opens_a_view(x) -> None:
    outer, started = Outer(), Started()
    recorder = watched(outer, started, roots=[("", outer), ("net", outer.net)], layer="net.first")
    outer(x, times=3)
    outer.net(x)
    views = recorder.take()
    assert [view.root for view in views] == ["", "net"]
    assert [len(view.student[0]) for view in views] == [3, 1]
    assert [name for name, *_ in started.calls] == ["", "net"]


def test_the_teacher_is_read_only_while_this_recorder_runs_it(net, x) -> None:
    teacher, recorder = Net(), watched(net)
    recorder.watch_teacher({0: RecordedLayer("first", teacher.first, reader("first"))})

    def run_it(x: torch.Tensor) -> None:
        assert recorder.runs_teacher
        teacher(x)

    def run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        teacher(args[0])  # by another recorder
        with torch.no_grad():
            recorder.run_teacher(lambda args, kwargs: run_it(*args), args, kwargs)
        assert not recorder.runs_teacher
        return True

    recorder.on_forward = run
    net(x)
    teacher(x)
    [view] = recorder.take()
    assert len(view.teacher[0]) == 1
    assert not view.teacher[0][0].requires_grad
    torch.testing.assert_close(view.teacher[0][0], teacher.first(x).detach(), rtol=0, atol=0)


def test_watching_again_replaces_the_hooks(net, x) -> None:
    recorder = watched(net)
    before = handles(net)
    recorder.watch_roots([("", net)])
    recorder.watch_student({0: RecordedLayer("first", net.first, reader("first"))})
    recorder.watch_teacher({0: RecordedLayer("first", net.first, reader("first"))})
    recorder.watch_teacher({})
    assert handles(net) == before == 3
    net(x)
    [view] = recorder.take()
    assert len(view.student[0]) == 1


def test_remove_leaves_nothing(net, x) -> None:
    recorder = watched(net)
    recorder.watch_teacher({0: RecordedLayer("second", net.second, reader("second"))})
    recorder.nested, recorder.runs_teacher = 2, True
    net(x)
    recorder.open()
    recorder.remove()
    assert handles(net) == 0
    assert not any(getattr(part, kind) for part in net.modules() for kind in KINDS)
    assert (recorder.views, recorder.current, recorder.enabled) == ([], None, False)
    assert (recorder.nested, recorder.runs_teacher) == (0, False)
    net(x)
    assert recorder.take() == []
