"""Sums around a reference that follows the means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_otrt.transport.cost import Sums
from lightning_otrt.transport.orthogonal import OrthogonalAlignment
from lightning_otrt.transport.reference import move_reference
from lightning_otrt.transport.regression import Regression

RULES = pytest.mark.parametrize("rule", [OrthogonalAlignment(), Regression()])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@RULES
@pytest.mark.parametrize("leading", [(), (3,)])
def test_moved_sums_are_those_around_the_new_reference(
    rule: OrthogonalAlignment | Regression, leading: tuple[int, ...]
) -> None:
    y, x = draw(*leading, 4, 30) + 2, draw(*leading, 5, 30, seed=1) - 3
    first = (draw(*leading, 4, 1, seed=2), draw(*leading, 5, 1, seed=3))
    sums, reference = move_reference(rule.sums(y, x, first), first)
    torch.testing.assert_close(reference, (y.mean(-1, keepdim=True), x.mean(-1, keepdim=True)))
    for found, expected in zip(sums, rule.sums(y, x, reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@RULES
def test_shares_move_as_the_whole(rule: OrthogonalAlignment | Regression) -> None:
    y, x = draw(4, 30) + 2, draw(5, 30, seed=1) - 3
    first = (torch.zeros(4, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64))
    sums = rule.sums(y, x, first)
    whole, reference = move_reference(sums, first)
    share, same = move_reference([part / 4 for part in sums], first)
    torch.testing.assert_close(same, reference)
    torch.testing.assert_close([4 * part for part in share], whole)


@RULES
def test_means_that_are_not_finite_stay_out(rule: OrthogonalAlignment | Regression) -> None:
    y, x = draw(4, 30), draw(5, 30, seed=1)
    y[2, 3] = float("inf")
    first = (torch.zeros(4, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64))
    assert all(side.isfinite().all() for side in move_reference(rule.sums(y, x, first), first)[1])


@RULES
def test_running_sums_of_a_neuron_that_fades_far_from_its_first_mean(rule: OrthogonalAlignment | Regression) -> None:
    """Its deviation falls to 1e-2, thousands of times less than its distance from where it began."""
    x, mixing = draw(6, 500, seed=1), draw(4, 6, seed=2)
    scale, mean = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    fixed = moving = start = (mean.clone(), torch.zeros(6, 1, dtype=torch.float64))
    sums: dict[str, Sums] = {}
    for step in range(300):
        scale[3], mean[3] = max(0.97**step, 1e-2), 20 * min(step, 50) / 50
        y = scale * (mixing @ x) + mean
        new = {
            "exact": rule.sums(y, x, start),
            "fixed": rule.sums(y.float(), x.float(), (fixed[0].float(), fixed[1].float())),
            "moving": rule.sums(y.float(), x.float(), (moving[0].float(), moving[1].float())),
        }
        sums = {
            name: [0.9 * old + part for old, part in zip(sums[name], parts, strict=True)] if sums else parts
            for name, parts in new.items()
        }
        if step % 10 == 0:
            sums["moving"], moving = move_reference(sums["moving"], moving)
    solved = {name: rule.solve(parts).double() for name, parts in sums.items()}
    error = {name: (found - solved["exact"]).norm() / solved["exact"].norm() for name, found in solved.items()}
    assert error["moving"] < 0.02
    # Products with a teacher whose means stay lose no digits; those of a student with itself do.
    assert isinstance(rule, OrthogonalAlignment) or not error["fixed"] < 0.2
