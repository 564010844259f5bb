"""Names of floating-point types, as PyTorch and Lightning write them."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "named_dtype"]

#: The type of each name.
DTYPES = {
    **dict.fromkeys(("float16", "fp16", "half", "16", "16-true"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16", "bf16-true"), torch.bfloat16),
    **dict.fromkeys(("float32", "fp32", "float", "32", "32-true"), torch.float32),
    **dict.fromkeys(("float64", "fp64", "double", "64", "64-true"), torch.float64),
}


def named_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """The type that a user wrote; None where it is none of them.

    Example:
        >>> named_dtype("bf16-true"), named_dtype(torch.float64), named_dtype("int8")
        (torch.bfloat16, torch.float64, None)
    """
    return DTYPES.get(str(dtype).removeprefix("torch."))
