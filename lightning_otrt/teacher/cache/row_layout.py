"""Named tensors of a sample as one row of numbers, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowLayout"]


@dataclass(frozen=True)
class RowLayout:
    """Where in a row which tensor lies. One row of all tensors is one copy to or from a device.

    Attributes:
        parts: Name, shape of one sample and type of each tensor, such as ``("logits", (10,), "float32")``.

    Example:
        >>> import torch
        >>> tensors = {"neurons": torch.rand(2, 3, 4), "mask": torch.tensor([[True], [False]])}
        >>> layout = RowLayout.of(tensors)
        >>> rows = layout.pack(tensors, torch.float32)
        >>> rows.shape
        torch.Size([2, 16])
        >>> all(torch.equal(tensor, tensors[name]) for name, tensor in layout.unpack(rows).items())
        True
    """

    parts: tuple[tuple[str, tuple[int, ...], str], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> RowLayout:
        """The layout for tensors ``(samples, ...)``.

        Raises:
            TypeError: If one holds neither floating-point numbers nor booleans.
        """
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() and tensor.dtype != torch.bool:
                raise TypeError(
                    f"Expected {name!r} to hold floating-point numbers or booleans, but got {tensor.dtype}, which "
                    "would be rounded."
                )
        return cls(
            tuple(
                (name, tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
                for name, tensor in tensors.items()
            )
        )

    @classmethod
    def from_json(cls, text: str) -> RowLayout:
        """What :meth:`to_json` wrote."""
        return cls(tuple((name, tuple(shape), dtype) for name, shape, dtype in json.loads(text)))

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self.parts)

    @property
    def width(self) -> int:
        """Numbers of a row: a multiple of four, so that a row is a whole number of 8-byte words in all types."""
        return max(4, 4 * math.ceil(sum(math.prod(shape) for _, shape, _ in self.parts) / 4))

    def pack(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Rows ``(samples, width)`` on the device of the tensors."""
        flat = [tensors[name].detach().flatten(1) if shape else tensors[name][:, None] for name, shape, _ in self.parts]
        rows = torch.cat([part.to(dtype) for part in flat], dim=1)
        return torch.nn.functional.pad(rows, (0, self.width - rows.shape[1]))

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """The tensors of rows, in their own types; views where that is the type of the rows."""
        tensors, start = {}, 0
        for name, shape, dtype in self.parts:
            stop = start + math.prod(shape)
            part = rows[:, start:stop].unflatten(1, shape) if shape else rows[:, start]  # type: ignore[no-untyped-call]
            tensors[name] = part.to(getattr(torch, dtype))
            start = stop
        return tensors
