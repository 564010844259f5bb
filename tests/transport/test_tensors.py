"""Fast forms of tensor operations against the plain ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transport_problems import draw

from lightning_otrt.transport import tensors


def by_columns(y: Tensor) -> Tensor:
    """The same values with observations next to each other in memory, as pooled maps have them."""
    return y.mT.contiguous().mT


@pytest.mark.parametrize("batch", [(), (1,), (3,)])
@pytest.mark.parametrize("layout", [lambda y: y.clone(), by_columns])
def test_products_norms_and_dots(batch: tuple[int, ...], layout: object) -> None:
    y, x = layout(draw(*batch, 6, 9)), layout(draw(*batch, 5, 9, seed=1))
    matrix = draw(*batch, 6, 5, seed=2)
    torch.testing.assert_close(tensors.product(matrix, x, like=y), matrix @ x)
    assert tensors.product(matrix, x, like=y).stride() == y.stride()
    torch.testing.assert_close(tensors.matrix_vector(matrix, x[..., 0]), (matrix @ x[..., :1]).squeeze(-1))
    torch.testing.assert_close(tensors.norms(y), y.square().sum(-1).sqrt())
    torch.testing.assert_close(tensors.dot(y, layout(y + 1)), (y * (y + 1)).sum((-2, -1)))
    torch.testing.assert_close(tensors.add_product(matrix.clone(), y, x.mT, alpha=-2), matrix - 2 * y @ x.mT)
    torch.testing.assert_close(tensors.subtract_product(y.clone(), matrix, x), y - matrix @ x)
    assert tensors.observation_count(y).tolist() == torch.full(batch, 9.0).tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0])
def test_zero_unless(value: float) -> None:
    for condition in (True, False):
        given = torch.tensor([1.0, value])
        [found] = tensors.zero_unless(torch.tensor(condition), given)
        assert found is given
        expected = [1.0, value] if condition else [0.0, 0.0]
        torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


def test_all_nonzero_never_reads_values_off_the_cpu() -> None:
    assert tensors.all_nonzero(torch.ones(3))
    assert not tensors.all_nonzero(torch.tensor([1.0, 0.0]))
    assert not tensors.all_nonzero(torch.ones(3, device="meta"))


@pytest.mark.parametrize(("first", "second", "common"), [
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.float32, torch.float64, torch.float64),
    (torch.float64, torch.bfloat16, torch.float64),
])  # fmt: skip
def test_common_dtype(first: torch.dtype, second: torch.dtype, common: torch.dtype) -> None:
    found = tensors.common_dtype(torch.ones(2, dtype=first), torch.ones(2, dtype=second))
    assert [side.dtype for side in found] == [common, common]


def test_neurons_of_many_observations_are_widened() -> None:
    limit = tensors.FLOAT64_OBSERVATIONS
    for count, dtype in ((limit, torch.float32), (limit + 1, torch.float64)):
        sides = tensors.widen_if_long(torch.zeros(2, count), torch.zeros(3, count))
        assert {side.dtype for side in sides} == {dtype}
