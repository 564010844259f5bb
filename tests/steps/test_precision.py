"""Terms in the precision that users choose for products of matrices."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from engines import call, draw, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _rounded_product(bits: int) -> Any:
    """A product of matrices whose factors keep so many bits of their mantissas, as TF32 (10) and bfloat16 (7) do."""

    def rounded(side: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(side)
        return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name().split("::")[1].split(".")[0]
            if name in ("mm", "bmm"):
                args = [rounded(side) for side in args]
            elif name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
                args = [args[0], *(rounded(side) for side in args[1:])]
            return func(*args, **(kwargs or {}))

    return Mode()


@pytest.mark.parametrize(("cost", "limit"), [("correlation", 1e-3), ("sqeuclidean", 1e-3), ("euclidean", 1e-2)])
def test_products_in_tf32_change_little(cost: str, limit: float) -> None:
    """With ``torch.set_float32_matmul_precision("high")``; a distance of matched neurons is the root of the error."""
    for kind in ("permuted", "independent"):
        y, x = draw(64, 64, 512)
        if kind == "permuted":
            y = x[torch.randperm(64, generator=torch.Generator().manual_seed(0))].clone().requires_grad_()
        values, gradients = [], []
        for mode in (contextlib.nullcontext(), _rounded_product(10)):
            engine = make(cost)
            with mode:
                value = call(engine, (y, x))
            values.append(value.item())
            gradients.append(torch.autograd.grad(value, y)[0].flatten())
        assert abs(values[1] - values[0]) <= limit
        if kind == "independent":
            assert torch.cosine_similarity(*gradients, dim=0) > 0.999
