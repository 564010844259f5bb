"""In which precision a forward runs here and now: settings of the process that change what a network gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = ["Numerics"]


class Numerics(NamedTuple):
    """Settings that change the outputs of a network by more than rounding in its own type.

    Attributes:
        autocast: Type of autocast on the device; None where it is off.
        products: How float32 matrices are multiplied.
        convolutions: How float32 convolutions are computed; None on the CPU.
    """

    autocast: torch.dtype | None
    products: str
    convolutions: str | None

    @classmethod
    def now(cls, device: torch.device) -> Numerics:
        """Those in force on a device.

        Example:
            >>> Numerics.now(torch.device("cpu")).autocast is None
            True
            >>> with torch.autocast("cpu", torch.bfloat16):
            ...     Numerics.now(torch.device("cpu")).autocast
            torch.bfloat16
        """
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        products = _read(torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.fp32_precision)
        if kind != "cuda":
            return cls(autocast, products, None)
        cudnn: Any = torch.backends.cudnn
        convolutions = _read(lambda: cudnn.allow_tf32, lambda: cudnn.conv.fp32_precision)
        return cls(autocast, products, convolutions)

    @property
    def is_float32_shortened(self) -> bool:
        """Whether float32 is computed with the fraction of a shorter type."""
        return self.products not in ("highest", "ieee", "none") or self.convolutions in ("True", "tf32", "bf16")


def _read(setting: Callable[[], Any], newer: Callable[[], Any]) -> str:
    """A setting that has two interfaces; torch refuses to read the older one after a write through the newer."""
    try:
        return str(setting())
    except RuntimeError:
        return str(newer())
