"""Whether states are zeros is known in the same step where that waits for no device, and else in the next one."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from lightning_otrt.reading.traced.states import StateShapes
from lightning_otrt.teacher.frozen import zero_states
from lightning_otrt.teacher.frozen.zero_states import ZeroStates, zeros_for


@pytest.mark.parametrize("place", [0, 1])
def test_one_number_is_enough(place: int) -> None:
    states = [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)]
    found = ZeroStates(may_wait=False)
    found.check(states, ValueError("a state"))
    states[place][0, 1, 2] = 1e-30
    with pytest.raises(ValueError, match="a state"):
        found.check(states, ValueError("a state"))


@pytest.mark.parametrize("is_zero", [True, False])
def test_on_a_device_the_next_step_knows(is_zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Copied:
        def __init__(self, tensor: Tensor) -> None:
            assert tensor.device.type == "meta"

        def wait(self) -> Tensor:
            return torch.tensor(is_zero)

    monkeypatch.setattr(zero_states, "HostCopy", Copied)
    found = ZeroStates(may_wait=False)
    found.check([torch.zeros(1, 2, 3, device="meta")], ValueError("a state"))
    pickle.loads(pickle.dumps(found)).check_earlier()
    if not is_zero:
        with pytest.raises(ValueError, match="a state"):
            found.check_earlier()
    found.check_earlier()


def test_shapes_of_the_teacher() -> None:
    student = StateShapes(frozenset({(2, 8)}), frozenset({6}))
    one = StateShapes(frozenset({(4, 16)}), frozenset({12}))
    several = StateShapes(frozenset({(4, 16), (1, 3)}), frozenset({12, 3}))
    assert zeros_for(torch.zeros(2, 5, 8), student, one).shape == (4, 5, 16)
    assert zeros_for(torch.zeros(5, 6), student, one).shape == (5, 12)
    for state in (torch.zeros(2, 5, 8), torch.zeros(5, 6)):
        assert zeros_for(state, student, several) is state
        assert zeros_for(state, student, StateShapes()) is state
