"""From a layer's output to its neurons: matrices whose rows are neurons and whose columns are observations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_otrt.checks import check_count
from lightning_otrt.reading.neurons.outputs import select_tensor
from lightning_otrt.reading.neurons.pooling import Windows, pool, pool_valid, widened_copy
from lightning_otrt.reading.neurons.positions import as_matrix

__all__ = ["NeuronReader", "neurons"]


def neurons(
    output: Any,
    *,
    neuron_axis: int | None = None,
    batch_axis: int = 0,
    grid: int | None = 4,
    prefix_tokens: int = 0,
    token_grid: tuple[int, ...] | None = None,
    mask: Tensor | None = None,
    select: str | int | None = None,
) -> Tensor:
    """Turn a layer's output into a matrix of neurons by observations.

    A neuron is seen through its activations on a mini-batch (arXiv 2007.06737, section 3). Feature maps and token grids
    are average-pooled to a small common grid per image, so that every image gives the same number of observations;
    nothing is sampled.

    Args:
        output: The output of a layer: a tensor ``(B, C)``, ``(B, C, L)``, ``(B, T, C)``, ``(B, C, H, W)``,
            ``(B, H, W, C)`` or ``(B, C, T, H, W)``, or a tuple, mapping or Hugging Face style output that holds one.
        neuron_axis: The axis of the neurons. Optional for ``(B, C)`` alone; with more axes it cannot be told from the
            shape and must be given: 1 for channels-first, -1 for channels-last and tokens.
        batch_axis: The axis of the samples: 0, or 1 for ``(T, B, C)``.
        grid: Positions kept along each axis of a map; a sequence keeps ``grid ** 2``. None keeps all.
        prefix_tokens: Class and register tokens in front of ``(B, T, C)``; they are dropped.
        token_grid: Rows and columns of the tokens of ``(B, T, C)`` (None: a square if they form one, else a sequence).
        mask: ``(B, T)``, true where a token is not padding. Padding is left out of the pooling.
        select: Key or index of the tensor, where the output holds several.

    Returns:
        ``(neurons, observations)``, in float32 or wider; a column is one position of one sample.

    Raises:
        ValueError: If the neuron axis is ambiguous, or the shape, the mask or the tokens do not fit.
        TypeError: If the output holds no floating-point tensor, or a nested one.

    Example:
        >>> import torch
        >>> from lightning_otrt import neurons
        >>> neurons(torch.randn(8, 32)).shape
        torch.Size([32, 8])
        >>> neurons(torch.randn(8, 32, 14, 14), neuron_axis=1).shape
        torch.Size([32, 128])
        >>> neurons(torch.randn(8, 197, 48), neuron_axis=-1, prefix_tokens=1).shape
        torch.Size([48, 128])
    """
    if batch_axis not in (0, 1):
        raise ValueError(f"Expected argument `batch_axis` to be 0, or 1 for (T, B, C), but got {batch_axis!r}.")
    check_count("grid", grid, optional=True)
    if prefix_tokens < 0:
        raise ValueError(f"Expected argument `prefix_tokens` not to be negative, but got {prefix_tokens}.")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"Expected argument `mask` to be a tensor (B, T), but got {type(mask).__name__}.")
    if mask is not None and bool((mask < 0).any()):
        raise ValueError(
            "Expected argument `mask` to be true where a token is not padding, but it has negative values, as masks "
            "that are added to scores have. Pass `mask == 0`."
        )
    tensor = select_tensor(output, select, where="output")
    if tensor.is_nested:
        raise TypeError(
            "Expected argument `output` to be a dense tensor, but got a nested one. Pad it with "
            "`torch.nested.to_padded_tensor`, and pass the `mask` of its lengths."
        )
    is_tokens = tensor.dim() == 3 and neuron_axis in (2, -1)
    if not is_tokens and (prefix_tokens or token_grid is not None):
        raise ValueError(
            f"Expected no `prefix_tokens` and no `token_grid` for an output of shape {tuple(tensor.shape)} with "
            f"neuron_axis={neuron_axis}: they are those of tokens (B, T, C) with neuron_axis=-1. Transpose (B, C, T)."
        )
    if mask is not None and (not is_tokens or token_grid is not None):
        raise ValueError(
            f"Expected no `mask` for an output of shape {tuple(tensor.shape)} with neuron_axis={neuron_axis} and "
            f"token_grid={token_grid}: padding is left out of sequences (B, T, C) with neuron_axis=-1 alone."
        )
    if token_grid is None and is_tokens and mask is None:
        tokens = max(tensor.shape[1 - batch_axis] - prefix_tokens, 0)
        side = math.isqrt(tokens)
        if side * side == tokens:
            token_grid = (side, side)
    reader = NeuronReader(
        layer="output",
        neuron_axis=neuron_axis,
        batch_axis=batch_axis,
        grid=grid,
        prefix_tokens=prefix_tokens,
        token_grid=token_grid,
    )
    return as_matrix(reader(tensor, mask))


@dataclass(frozen=True)
class NeuronReader:
    """Reads the output of one layer as ``(B, C, *positions)``, pooled, in float32 or wider.

    Args:
        layer: How errors name the layer, such as ``"student layer 'net.layer4'"``.
        neuron_axis: See :func:`neurons`.
        batch_axis: See :func:`neurons`.
        grid: See :func:`neurons`.
        prefix_tokens: See :func:`neurons`.
        token_grid: Rows and columns of the tokens, or None for a sequence.
        select: See :func:`neurons`.
    """

    layer: str
    neuron_axis: int | None = None
    batch_axis: int = 0
    grid: int | None = 4
    prefix_tokens: int = 0
    token_grid: tuple[int, ...] | None = None
    select: str | int | None = None
    _windows: Windows = field(default_factory=Windows, init=False, repr=False, compare=False)

    def __call__(self, x: Tensor, mask: Tensor | None = None, token_grid: tuple[int, ...] | None = None) -> Tensor:
        """Read one output.

        Args:
            x: The tensor that :func:`select_tensor` takes from the output by ``select``.
            mask: ``(B, T)``, true where a position is not padding; used for sequences only.
            token_grid: Rows and columns of this output, where they are not those of the reader.

        Returns:
            ``(B, C, *positions)``, a tensor of its own.
        """
        if hasattr(x, "device_mesh"):
            raise TypeError(
                f"{self.layer} gives a DTensor, whose neurons are spread over processes (tensor parallel). A term of "
                "one process' part of them would be wrong. Choose a layer whose output is a plain tensor, such as one "
                "with `output_layouts=Replicate()` and `use_local_output=True`."
            )
        axis = self._axis(x)
        if any(size == 0 for number, size in enumerate(x.shape) if number != self.batch_axis):
            raise ValueError(f"{self.layer} is empty: its shape is {tuple(x.shape)}. Choose another layer.")
        if self.batch_axis:
            x = x.transpose(0, self.batch_axis)
            axis = self.batch_axis if axis == 0 else axis
        is_tokens = x.dim() == 3 and axis == 2
        if axis != 1:  # `movedim` costs the host as much as a pooling
            x = x.movedim(axis, 1)
        if is_tokens:
            return self._pool_tokens(x, mask, token_grid or self.token_grid)
        if x.dim() == 2:
            return widened_copy(x)
        if x.dim() == 3 and mask is not None:
            return pool_valid(x, mask, self._sizes(x.shape[2:])[0])
        return pool(x, self._sizes(x.shape[2:]), self._windows)

    def sequence_size(self, output: Tensor) -> tuple[int, int] | None:
        """Number of samples and positions of a sequence, a prefix included; None for vectors, maps and token grids."""
        if output.dim() != 3 or self.token_grid is not None:
            return None
        positions = ({0, 1, 2} - {self.batch_axis, self._axis(output)}).pop()
        return output.shape[self.batch_axis], output.shape[positions]

    def _axis(self, x: Tensor) -> int:
        shape = tuple(x.shape)
        if x.dim() < 2:
            raise ValueError(
                f"Expected {self.layer} to give (batch, neurons, ...), but got {shape}: "
                "a representation needs an axis of samples and one of neurons. Choose another layer."
            )
        if self.neuron_axis is None:
            if x.dim() == 2:
                return 1 - self.batch_axis
            raise ValueError(
                f"The neuron axis of {self.layer} with shape {shape} is ambiguous: the shape alone does not tell "
                "channels-first from channels-last or tokens. Pass `neuron_axis=1` for (B, C, ...) or "
                "`neuron_axis=-1` for (B, ..., C)."
            )
        if not -x.dim() <= self.neuron_axis < x.dim():
            raise ValueError(
                f"Expected `neuron_axis` of {self.layer} to lie in [{-x.dim()}, {x.dim() - 1}] for shape {shape}, "
                f"but got {self.neuron_axis}."
            )
        axis = self.neuron_axis % x.dim()
        if axis == self.batch_axis:
            raise ValueError(
                f"The neuron axis of {self.layer} with shape {shape} is its batch axis ({axis}). "
                "Pass another `neuron_axis`."
            )
        return axis

    def _sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        if self.grid is None:
            return tuple(sizes)
        limit = self.grid**2 if len(sizes) == 1 else self.grid
        return tuple(min(limit, size) for size in sizes)

    def _pool_tokens(self, x: Tensor, mask: Tensor | None, grid: tuple[int, ...] | None) -> Tensor:
        """Drop the prefix of ``(B, C, T)`` and pool what is left as a map or as a sequence."""
        tokens = x.shape[-1] - self.prefix_tokens
        if tokens <= 0:
            raise ValueError(
                f"No token is left in {self.layer}: it has {x.shape[-1]} tokens and `prefix_tokens` is "
                f"{self.prefix_tokens}."
            )
        x = x[..., self.prefix_tokens :]
        if grid is not None:
            if math.prod(grid) != tokens:
                raise ValueError(
                    f"{self.layer} gives {tokens} tokens after {self.prefix_tokens} prefix tokens, which do not fill "
                    f"the token grid {grid} of the patches before it. Leave forwards that drop or merge tokens out by "
                    "`transfer.paused()`, or match layers without positions."
                )
            x = x.unflatten(-1, grid)  # type: ignore[no-untyped-call]
            return pool(x, self._sizes(x.shape[2:]), self._windows)
        if mask is None:
            return pool(x, self._sizes((tokens,)), self._windows)
        mask = mask[:, -tokens:] if mask.dim() == 2 and mask.shape[-1] == tokens + self.prefix_tokens else mask
        if mask.shape != (x.shape[0], tokens):
            raise ValueError(
                f"Expected the padding mask for {self.layer} to have shape {(x.shape[0], tokens)}, "
                f"but got {tuple(mask.shape)}."
            )
        return pool_valid(x, mask, self._sizes((tokens,))[0])
