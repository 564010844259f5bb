"""Networks that mix samples or are random are found with one batch; rounding passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt.teacher.cache.per_sample import ROUNDING, cloned, tolerance, why_not_per_sample

torch.manual_seed(0)
X = torch.randn(7, 6)


def why(net: Callable[[Tensor], Any], x: Tensor = X, limit: float = ROUNDING) -> str:
    def run(inputs: Any, size: int) -> dict[str, Tensor]:
        assert len(inputs[0][0]) == size
        return {"out": net(inputs[0][0])}

    return why_not_per_sample(((x,), {}), len(x), run, run(((x.clone(),), {}), len(x)), limit, x.device)


def batch_norm(x: Tensor) -> Tensor:
    """As networks do that call the function and forget the mode."""
    return F.batch_norm(x, None, None, training=True)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]


LINEAR = nn.Linear(6, 4).requires_grad_(False)
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "batch statistics": batch_norm,
    "attention between samples": attention,
    "the mean of the batch": lambda x: x - x.mean(),
    "a scale of the batch": lambda x: x / x.abs().max(),
    "the order of the batch": lambda x: x.cumsum(0),
    "neighbours": lambda x: x + 0.1 * x.roll(1, 0),
    "a few of them": lambda x: x + 1e-2 * x[:1],
}
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "a layer": LINEAR,
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "rounding that depends on the batch": lambda x: x * (1 + 1e-5 * len(x)),
    "zeros": torch.zeros_like,
    "values that are not finite": lambda x: torch.where(x > 0, x, torch.nan),
    "a network that writes to its input": lambda x: x.mul_(2),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing(name: str) -> None:
    assert "it mixes the samples of a batch" in why(MIXING[name])


@pytest.mark.parametrize("name", ALONE)
def test_alone(name: str) -> None:
    assert why(ALONE[name]) == ""


@pytest.mark.parametrize("size", [1, 2, 7])
def test_random(size: int) -> None:
    assert "it is random in evaluation mode" in why(lambda x: F.dropout(x, 0.5), X[:size])


def test_a_single_sample_shows_no_mixing() -> None:
    assert why(lambda x: x - x.mean(), X[:2]).startswith("it mixes")
    assert why(batch_norm, X[:2]).startswith("it fails on a part of a batch")
    assert why(lambda x: x - x.mean(), X[:1]) == ""


def test_what_fails_on_a_part() -> None:
    mixing = torch.randn(7, 7)
    found = why(lambda x: mixing @ x)
    assert found.startswith("it fails on a part of a batch, although it runs on the whole (RuntimeError:")


def test_other_shapes_and_other_layers() -> None:
    assert "parts of a batch give other shapes than the whole ((2, 2) and (5, 5) in place of (7, 7))" in why(
        lambda x: x @ x.T
    )

    def run(inputs: Any, size: int) -> dict[str, Tensor]:
        return {"a" if size == 7 else "b": inputs[0][0]}

    assert "other layers run" in why_not_per_sample(((X,), {}), 7, run, run(((X,), {}), 7), ROUNDING, X.device)


@pytest.mark.parametrize("size", range(2, 12))
@pytest.mark.parametrize("repeat", [lambda x: torch.cat([x, x]), lambda x: x.repeat_interleave(3, 0)])
def test_samples_that_come_several_times_do_not_hide_it(size: int, repeat: Callable[[Tensor], Tensor]) -> None:
    """As two views of an image that agree."""
    assert why(lambda x: x - x.mean(0), repeat(torch.randn(size, 6))).startswith("it mixes")


@pytest.mark.parametrize(("massive", "limit"), [(1e5, ROUNDING), (1e3, 0.03)])
def test_a_massive_neuron_does_not_hide_the_others(massive: float, limit: float) -> None:
    def net(x: Tensor) -> Tensor:
        y = x[:, None, :, None].expand(-1, 3, 12, 2)  # samples, rows, neurons, positions
        y = y - 0.3 * y.mean(0)
        return torch.cat([y[:, :, :1] * 0 + massive, y[:, :, 1:]], dim=2)

    assert why(net, torch.randn(8, 12), limit).startswith("it mixes")


@pytest.mark.parametrize("small", [0.0, 1e-30, 1e-6, 1e-3])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.85])
def test_neurons_that_are_nearly_dead_raise_no_alarm(small: float, share: float) -> None:
    """What is left of large terms has their rounding."""
    alive = (torch.arange(100) >= 100 * share).float()

    def net(x: Tensor) -> Tensor:
        y = x.repeat(1, 20)[:, :100]
        return y * (alive + (1 - alive) * small) + 1e-7 * len(x)

    assert why(net, torch.randn(8, 6)) == ""


@pytest.mark.parametrize("limit", [ROUNDING, 0.03])
@pytest.mark.parametrize("size", [1, 8])
def test_a_little_noise_is_random(limit: float, size: int) -> None:
    """Less than what may differ between a batch and its parts."""
    found = why(lambda x: x + 0.3 * limit * torch.randn_like(x), torch.randn(size, 6), limit)
    assert found.startswith("it is random in evaluation mode")


def test_out_of_memory_is_none_of_its_business() -> None:
    def fail(x: Tensor) -> Tensor:
        if len(x) < 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    with pytest.raises(torch.OutOfMemoryError):
        why(fail)


def test_rounding_of_shorter_types() -> None:
    assert tolerance(torch.float32, is_float32_shortened=False) == ROUNDING
    assert tolerance(torch.float64, is_float32_shortened=True) == ROUNDING
    found = [tolerance(dtype, is_float32_shortened=False) for dtype in (torch.float16, torch.bfloat16)]
    assert ROUNDING < found[0] < found[1] < 0.05
    assert tolerance(torch.float32, is_float32_shortened=True) == found[0]


def test_clones_in_containers() -> None:
    inputs = (({"x": X},), {"y": [X, None, "text"]})
    found = cloned(inputs)
    assert torch.equal(found[0][0]["x"], X)
    assert found[0][0]["x"].data_ptr() != X.data_ptr() != found[1]["y"][0].data_ptr()
    assert found[1]["y"][1:] == [None, "text"]
