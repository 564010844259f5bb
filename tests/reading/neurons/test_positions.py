"""Readings of two layers at the same positions."""

from __future__ import annotations

import pytest
import torch
from reading.adaptive import ADAPTIVE, columns

from lightning_otrt.reading.neurons.positions import as_matrix, can_be_compared, match_positions

POSITIONS: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((6,), (8,), 1),
    ((6, 4, 4), (8, 4, 4), 16),
    ((6, 4, 4), (8, 2, 2), 4),
    ((6, 2, 4), (8, 4, 3), 6),
    ((6,), (8, 4, 4), 1),
    ((6, 4, 4), (8,), 1),
    ((6, 16), (8, 9), 9),
    ((6,), (8, 9), 1),
    ((6, 3, 4, 4), (8, 2, 2, 4), 16),
    ((6, 1, 1), (8, 1), 1),
]


@pytest.mark.parametrize(("student", "teacher", "positions"), POSITIONS)
def test_match_positions(student: tuple[int, ...], teacher: tuple[int, ...], positions: int) -> None:
    y, x = torch.randn(5, *student), torch.randn(5, *teacher)
    found = match_positions(y, x, "pair")
    same = len(student) == len(teacher) > 1
    sizes = tuple(map(min, student[1:], teacher[1:])) if same else ()
    for matrix, reading in zip(found, (y, x), strict=True):
        assert matrix.shape == (reading.shape[1], 5 * positions)
        if sizes:
            expected = ADAPTIVE[len(sizes)](reading, sizes)
        else:
            expected = reading.flatten(2).mean(2) if reading.dim() > 2 else reading
        torch.testing.assert_close(matrix, columns(expected))


@pytest.mark.parametrize(("student", "teacher", "positions"), POSITIONS)
def test_positions_are_those_of_the_shape_also_without_a_sample(
    student: tuple[int, ...], teacher: tuple[int, ...], positions: int
) -> None:
    y, x = torch.randn(0, *student), torch.randn(0, *teacher)
    assert can_be_compared(y, x)
    assert [matrix.shape for matrix in match_positions(y, x, "pair")] == [(student[0], 0), (teacher[0], 0)]


def test_match_positions_errors() -> None:
    with pytest.raises(ValueError, match=r"layer a: the batch sizes differ \(student \(4, 6\), teacher \(5, 8\) as"):
        match_positions(torch.ones(4, 6), torch.ones(5, 8), "layer a")
    with pytest.raises(ValueError, match=r"layer a: the positions cannot be paired .*one side is a map and the other"):
        match_positions(torch.ones(4, 6, 16), torch.ones(4, 8, 4, 4), "layer a")


def test_as_matrix() -> None:
    reading = torch.randn(3, 4, 2, 5)
    assert torch.equal(as_matrix(reading), columns(reading))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [((6,), (8,), True), ((6,), (8, 4, 4), True), ((6, 9), (8,), True), ((6, 9), (8, 4), True)]
    + [((6, 4, 4), (8, 16), False), ((6, 2, 4, 4), (8, 4, 4), False)],
)
def test_what_can_be_compared_can_be_matched(
    student: tuple[int, ...], teacher: tuple[int, ...], expected: bool
) -> None:
    y, x = torch.randn(5, *student), torch.randn(5, *teacher)
    assert can_be_compared(y, x) is can_be_compared(x, y) is expected
    if expected:
        match_positions(y, x, "pair")
    else:
        with pytest.raises(ValueError, match="cannot be paired"):
            match_positions(y, x, "pair")
