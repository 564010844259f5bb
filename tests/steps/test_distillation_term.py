"""The distillation of logits over calls: its moments, and how they go on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_otrt.steps.distillation_term import Distillation
from lightning_otrt.transport.regression import Regression


def draw(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, None]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64) @ y + 0.5 * torch.randn(
        4, 40, generator=generator, dtype=torch.float64
    )
    return y.to(dtype).requires_grad_(), x.to(dtype), None


def run(term: Distillation, seeds: range, dtype: torch.dtype = torch.float64) -> list[float]:
    values = []
    for seed in seeds:
        value = term.term([draw(seed, dtype)], None, is_regression=True)
        assert value is not None
        values.append(float(value.detach()))
    return values


def test_the_first_call_is_the_regression_of_its_batch():
    y, x, _ = draw(0)
    regression = Regression(standardised=False, ridge=1e-2)
    expected, _ = regression.value(y.detach(), x, regression.solve(regression.sums(y.detach(), x)))
    assert run(Distillation(4.0), range(1))[0] == pytest.approx(float(expected), rel=1e-9)


def test_views_share_a_map():
    """That of their observations together; the value is the mean of theirs."""
    first, second = draw(0), draw(1)
    together, term = Distillation(4.0), Distillation(4.0)
    value = term.term([first, second], None, is_regression=True)
    both = torch.cat([first[0], second[0]], 1).detach().requires_grad_(), torch.cat([first[1], second[1]], 1), None
    together.term([both], None, is_regression=True)
    torch.testing.assert_close(term._map, together._map)
    alone = [float(term.term([each], None, is_regression=True, reevaluation=True).detach()) for each in (first, second)]
    assert float(value.detach()) == pytest.approx(sum(alone) / 2, rel=1e-9)
    value.backward()
    assert first[0].grad.shape == first[0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_goes_on_in_another_type(dtype):
    term, expected = Distillation(4.0), run(Distillation(4.0), range(6))
    other = torch.float64 if dtype == torch.float32 else torch.float32
    run(term, range(3), other)
    again = Distillation(4.0)
    again.load_state_dict(term.state_dict(), torch.device("cpu"))
    assert run(again, range(3, 6), dtype) == pytest.approx(expected[3:], rel=1e-4)


def test_means_that_are_far_from_zero():
    """In float32, around a reference of the first batch."""
    expected = run(Distillation(4.0), range(5))
    term, values = Distillation(4.0), []
    for seed in range(5):
        y, x, _ = draw(seed, torch.float32)
        value = term.term([(y + 1000, x - 300, None)], None, is_regression=True)
        values.append(float(value.detach()))
    assert values == pytest.approx(expected, rel=1e-2)


def test_a_call_of_soft_targets_keeps_nothing():
    logits = torch.randn(8, 3)
    term = Distillation(4.0)
    term.term([(logits, logits + 1, None)], None, is_regression=False)
    assert term.state_dict() == {"calls": 1, "sums": None, "reference": None, "map": None, "memory": None}


def test_wide_layers_remember_more():
    """A map from fewer observations than neurons predicts its own batch, whatever that is."""
    generator = torch.Generator().manual_seed(0)
    term, values = Distillation(4.0), []
    for _ in range(500):
        y = torch.randn(128, 4, generator=generator, dtype=torch.float64).requires_grad_()
        x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        value = term.term([(y, x, None)], None, is_regression=True)
        values.append(float(value.detach()))
    assert term.state_dict()["memory"] == 1 - 4 / 512
    assert values[0] < 0.01
    assert sum(values[-50:]) / 50 > 0.5
