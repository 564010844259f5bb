"""What a pair keeps: new plans, other precisions, other widths."""

from __future__ import annotations

import io

import pytest
import torch

from lightning_otrt.steps.pair_state import PairState, Solved
from lightning_otrt.transport.cost import Plan

OLD, NEW = Plan.of(torch.full((2, 3), 0.1)), Plan.of(torch.full((2, 3), 0.2))


def solved(is_finite: bool, plan: Plan = NEW, potential: float = 2.0) -> Solved:
    return Solved(Plan(*(part.clone() for part in plan)), torch.full((3,), potential), torch.tensor(is_finite))


@pytest.mark.parametrize("is_finite", [True, False])
def test_a_plan_is_replaced_by_a_finite_one_only(is_finite: bool) -> None:
    state = PairState(plan=OLD, potential=torch.ones(3))
    state.keep(solved(is_finite))
    torch.testing.assert_close(state.plan, NEW if is_finite else OLD, rtol=0, atol=0)
    assert state.potential.tolist() == [2.0 if is_finite else 1.0] * 3


def test_a_first_plan_that_is_not_finite_becomes_the_uniform_one() -> None:
    state = PairState()
    nan = Plan(*(torch.full_like(part, torch.nan) for part in NEW))
    state.keep(solved(False, nan, torch.nan))
    torch.testing.assert_close(state.plan, Plan.of(torch.full((2, 3), 1 / 6)))
    assert state.potential.tolist() == [0.0] * 3


def test_a_solver_without_potentials_leaves_them_alone() -> None:
    state = PairState()
    state.keep(solved(True)._replace(potential=None))
    assert state.potential is None


def test_plan_takes_the_precision_of_the_neurons() -> None:
    state = PairState(plan=OLD, potential=torch.ones(3), reference=(torch.ones(2, 1), torch.ones(3, 1)))
    state.check_plan(torch.ones(2, 8).double(), torch.ones(3, 8).double(), "a -> b")
    assert {part.dtype for part in (*state.plan, state.potential, *state.reference)} == {torch.float64}


def test_other_widths_are_refused() -> None:
    expected = r"a -> b has 4 student and 3 teacher neurons, but its plan, .*, has the shape \(2, 3\)"
    with pytest.raises(ValueError, match=expected):
        PairState(plan=OLD).check_plan(torch.ones(4, 8), torch.ones(3, 8), "a -> b")


@pytest.mark.parametrize("memory", [0.9, 0.0])
def test_state_survives_a_file(memory: float) -> None:
    state = PairState(
        OLD, torch.ones(3), [torch.ones(2, 3)], (torch.ones(2, 1), torch.ones(3, 1)), torch.ones(2), 0.9, 7
    )
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    found = PairState.of(torch.load(file, weights_only=True), memory, torch.device("cpu"))
    for name in ("plan", "potential", "reference", "energy"):
        torch.testing.assert_close(getattr(found, name), getattr(state, name), rtol=0, atol=0)
    assert (found.memory, found.samples) == (memory, 7)
    assert (found.sums is None) == (memory == 0), "nothing would add to the sums"


def test_a_state_follows_the_neurons_to_their_device() -> None:
    """A state that was loaded before the student was moved."""
    state = PairState(plan=OLD, potential=torch.ones(3), sums=[torch.ones(2), torch.ones(2, 3)], energy=torch.ones(2))
    state.check_plan(torch.ones(2, 8, device="meta"), torch.ones(3, 8, device="meta"), "a -> b")
    assert {tensor.device.type for tensor in state.tensors()} == {"meta"}
    assert [tuple(tensor.shape) for tensor in state.sums] == [(2,), (2, 3)]
    late = PairState(reference=(torch.ones(2, 1), torch.ones(3, 1)))
    late.check_plan(torch.ones(2, 8, device="meta"), torch.ones(3, 8, device="meta"), "a -> b")
    assert {tensor.device.type for tensor in late.tensors()} == {"meta"}
