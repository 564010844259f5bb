"""How long a layer may be missing before it is an error, or worth a warning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer
from lightning_otrt.missed_layers import FEW_CALLS, PATIENCE, PATIENCE_FOR_ALL, Missed, MissedLayers

PAIRS = (LayerPair("a", "x"), LayerPair("b", "y"))
STUDENT = nn.Linear(2, 2)


def after(calls: int, absent: list[int]) -> MissedLayers:
    """So many calls in which the layers of these pairs did not run."""
    missed = MissedLayers()
    for call in range(calls):
        missed.note({index: f"student layer {PAIRS[index].student!r}" for index in absent}, is_first=call == 0)
    return missed


def test_nothing_is_missed():
    assert after(100, []).report([], PAIRS, 100, STUDENT) == Missed()


@pytest.mark.parametrize(
    ("never", "student", "patience"),
    [([1], STUDENT, PATIENCE), ([1], None, FEW_CALLS), ([0, 1], STUDENT, PATIENCE_FOR_ALL), ([0, 1], None, 1)],
)
def test_layers_that_never_run(never, student, patience):
    for calls in (patience - 1, patience):
        found = after(calls, never).report(never, PAIRS, calls, student)
        assert not found.warning
        assert bool(found.error) == (calls == patience)
    assert "student layer 'b'" in found.error


def test_where_layers_are_skipped_at_random_the_end_of_an_epoch_waits_as_long():
    missed = MissedLayers()
    for call in range(PATIENCE):
        missed.note({1: "student layer 'b'"} if call % 2 else {0: "student layer 'a'"}, is_first=not call)
    assert not missed.report([1], PAIRS, PATIENCE - 1).error
    assert missed.report([1], PAIRS, PATIENCE).error


def test_evaluations_of_one_batch_are_one_step():
    """A layer that is skipped in two steps of twenty evaluations was not missing for long."""

    class Skips(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b, self.skips = nn.Linear(4, width), nn.Linear(width, width), False

        def forward(self, x):
            x = self.a(x).tanh()
            return x if self.skips else self.b(x)

    student = Skips(5)
    transfer = RepresentationTransfer(Skips(6), ["a", "b"], plan="exact")
    with transfer.attached(student):
        for step in range(3):
            student.skips = step > 0
            for evaluation in range(20):
                student(torch.randn(12, 4))
                transfer.loss(reevaluation=evaluation > 0)
    assert transfer.step == 3


def test_layers_that_ran_before():
    for calls in (PATIENCE - 1, PATIENCE):
        found = after(calls, [0]).report([], PAIRS, 100, STUDENT)
        assert not found.error
        assert bool(found.warning) == (calls == PATIENCE)
    assert f"The student layer 'a' did not run in the last {PATIENCE} steps" in found.warning
    missed = after(PATIENCE, [0])
    missed.note({}, is_first=False)
    assert missed.report([], PAIRS, 100, STUDENT) == Missed()


class Skipping(nn.Module):
    """A network that leaves out its second layer in training where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x if self.training and self.skips else self.b(x))


def train(transfer: RepresentationTransfer, skipped: list[bool]) -> None:
    """Calls of a new student, each of which skips the second layer or not."""
    student = Skipping()
    with transfer.attached(student):
        for student.skips in skipped:
            student(torch.randn(16, 6))
            transfer.loss()


def test_a_new_run_does_not_know_what_an_earlier_one_skipped():
    """Else it would wait longer at its end, as where layers are skipped at random."""
    transfer = RepresentationTransfer(Skipping(), {"a": "a", "b": "b"})
    train(transfer, [False, True, False])
    transfer.reset()
    with pytest.raises(RuntimeError, match="student layer 'b' did not run"):
        train(transfer, [True] * FEW_CALLS)


def test_processes_that_share_a_batch_wait_alike_at_the_end_of_an_epoch() -> None:
    """One of them may have seen other layers that were skipped, which the others do not know of."""
    for missed in (after(PATIENCE - 1, [1]), MissedLayers()):
        assert not missed.report([1], PAIRS, PATIENCE - 1, is_global=True).error
        assert missed.report([1], PAIRS, PATIENCE, is_global=True).error == after(1, [1]).report([1], PAIRS, 99).error
