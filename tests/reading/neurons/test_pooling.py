"""Average pooling, against the adaptive pooling of torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from reading.adaptive import ADAPTIVE
from torch import Tensor

from lightning_otrt.reading.neurons.pooling import Windows, pool, pool_valid, widened, widened_copy
from lightning_otrt.reading.neurons.reader import NeuronReader

SIZES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((16,), (16,)),
    ((16,), (4,)),
    ((17,), (16,)),
    ((31,), (7,)),
    ((5,), (1,)),
    ((8, 8), (4, 4)),
    ((7, 7), (4, 4)),
    ((14, 14), (4, 4)),
    ((4, 4), (4, 4)),
    ((8, 7), (4, 4)),
    ((3, 9), (3, 4)),
    ((1, 1), (1, 1)),
    ((6, 10), (1, 1)),
    ((4, 8, 8), (2, 4, 4)),
    ((14, 15), (4, 4)),
    ((16, 12), (4, 4)),
    ((16, 4), (4, 4)),
    ((5, 7, 9), (4, 4, 4)),
    ((3, 4, 5), (3, 4, 4)),
]
#: One case of each way to pool: nothing to do, one product for a small map, products along the axes, sums.
WAYS = [((4, 4), (4, 4)), ((7, 7), (4, 4)), ((14, 15), (4, 4)), ((16, 12), (4, 4))]
LAYOUTS = {
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: torch.stack((x, x), -1)[..., 0],
}


def check(x: Tensor, targets: tuple[int, ...]) -> None:
    x.requires_grad_()
    pooled, expected = pool(x, targets), ADAPTIVE[len(targets)](x, targets)
    assert pooled.dtype == x.dtype
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((value * weights).sum(), x)[0] for value in (pooled, expected)))


@pytest.mark.parametrize(("sizes", "targets"), SIZES)
def test_is_adaptive_average_pooling(sizes: tuple[int, ...], targets: tuple[int, ...]) -> None:
    check(torch.randn(3, 5, *sizes), targets)


@pytest.mark.parametrize(("sizes", "targets"), WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_other_layouts(sizes: tuple[int, ...], targets: tuple[int, ...], layout: str) -> None:
    check(LAYOUTS[layout](torch.randn(3, 5, *sizes)), targets)


@pytest.mark.parametrize(("sizes", "targets"), WAYS)
def test_in_float64(sizes: tuple[int, ...], targets: tuple[int, ...]) -> None:
    check(torch.randn(3, 5, *sizes, dtype=torch.float64), targets)


def test_valid_tokens_fill_equal_segments() -> None:
    x = torch.tensor([[[1.0, 3.0, 5.0, 7.0, torch.nan]], [[torch.nan, 2.0, torch.nan, torch.nan, torch.nan]]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 0, 0]])
    torch.testing.assert_close(pool_valid(x, mask, 2), torch.tensor([[[2.0, 6.0]], [[2.0, 2.0]]]))
    assert (pool_valid(x, torch.zeros_like(mask), 2) == 0).all()


def test_widened() -> None:
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert widened(single) is single
    assert widened(double) is double
    assert widened(single.half()).dtype == torch.float32
    assert widened_copy(single) is not single
    assert widened_copy(single).data_ptr() != single.data_ptr()


@pytest.mark.parametrize(("sizes", "targets"), WAYS)
def test_windows_are_made_once(sizes: tuple[int, ...], targets: tuple[int, ...]) -> None:
    windows = Windows()
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 5, *sizes, dtype=dtype)
        first = pool(x, targets, windows)
        made = dict(windows._made)
        assert torch.equal(pool(x, targets, windows), first)
        assert torch.equal(pool(x, targets), first)
        assert all(windows._made[key] is matrix for key, matrix in made.items())


def test_windows_of_a_validation_serve_a_later_backward_pass() -> None:
    reader, x = NeuronReader("layer", neuron_axis=1), torch.randn(2, 3, 7, 7)
    with torch.inference_mode():
        reader(x)
    x.requires_grad_()
    reader(x).sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(2 * 3 * 16.0))


def test_windows_of_many_sizes_are_not_all_kept() -> None:
    windows = Windows()
    for size in range(65, 200):
        pool(torch.zeros(1, 1, size), (4,), windows)
    assert len(windows._made) < 100
    assert not copy.deepcopy(windows)._made
    assert not pickle.loads(pickle.dumps(windows))._made
