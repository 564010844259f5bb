"""From a layer's output to its neurons: matrices whose rows are neurons and whose columns are observations."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.checks import check_count

__all__ = ["NeuronReader", "as_matrix", "match_positions", "neurons", "select_tensor"]

#: Maps of so many positions are pooled by one matrix product, which takes a third of the time of sums there.
SMALL_MAP = 64


def neurons(
    output: Any,
    *,
    neuron_axis: int | None = None,
    batch_axis: int = 0,
    grid: int | None = 4,
    prefix_tokens: int = 0,
    token_grid: tuple[int, int] | None = None,
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
        TypeError: If the output holds no floating-point tensor.

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
    if mask is not None and (tensor.dim() != 3 or neuron_axis not in (2, -1) or token_grid is not None):
        raise ValueError(
            f"Expected no `mask` for an output of shape {tuple(tensor.shape)} with neuron_axis={neuron_axis} and "
            f"token_grid={token_grid}: padding is left out of sequences (B, T, C) with neuron_axis=-1 alone."
        )
    if token_grid is None and tensor.dim() == 3 and neuron_axis in (2, -1) and mask is None:
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
    token_grid: tuple[int, int] | None = None
    select: str | int | None = None

    def __call__(self, output: Any, mask: Tensor | None = None) -> Tensor:
        """Read one output; ``mask`` is ``(B, T)`` and only used for a sequence of tokens."""
        x = select_tensor(output, self.select, where=self.layer)
        if hasattr(x, "device_mesh"):
            raise TypeError(
                f"{self.layer} gives a DTensor, whose neurons are spread over processes (tensor parallel), and a term "
                "of a part of them would be wrong. Choose a layer whose output is a plain tensor, such as one with "
                "`output_layouts=Replicate()` and `use_local_output=True`."
            )
        axis = self._axis(x)
        if any(size == 0 for number, size in enumerate(x.shape) if number != self.batch_axis):
            raise ValueError(f"{self.layer} is empty: its shape is {tuple(x.shape)}. Choose another layer.")
        if self.batch_axis:
            x = x.transpose(0, self.batch_axis)
            axis = self.batch_axis if axis == 0 else axis
        is_tokens = x.dim() == 3 and axis == 2
        x = x.movedim(axis, 1)
        if is_tokens:
            return self._pool_tokens(x, mask)
        if x.dim() == 2:
            # A layer that is overwritten in place by the next one must not change what was recorded.
            return _wide(x).clone() if x.dtype == _wide(x).dtype else _wide(x)
        return pool(x, self._sizes(x.shape[2:]))

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

    def _pool_tokens(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Drop the prefix of ``(B, C, T)`` and pool what is left as a map or as a sequence."""
        tokens = x.shape[-1] - self.prefix_tokens
        if tokens <= 0:
            raise ValueError(
                f"No token is left in {self.layer}: it has {x.shape[-1]} tokens and `prefix_tokens` is "
                f"{self.prefix_tokens}."
            )
        x = x[..., self.prefix_tokens :]
        if self.token_grid is not None:
            if self.token_grid[0] * self.token_grid[1] != tokens:
                raise ValueError(
                    f"{self.layer} gives {tokens} tokens after {self.prefix_tokens} prefix tokens, which do not fill "
                    f"the token grid {self.token_grid}. Inputs of one size per fit are expected."
                )
            x = x.unflatten(-1, self.token_grid)  # type: ignore[no-untyped-call]
            return pool(x, self._sizes(x.shape[2:]))
        if mask is None:
            return pool(x, self._sizes((tokens,)))
        mask = mask[:, -tokens:] if mask.dim() == 2 and mask.shape[-1] == tokens + self.prefix_tokens else mask
        if mask.shape != (x.shape[0], tokens):
            raise ValueError(
                f"Expected the padding mask for {self.layer} to have shape {(x.shape[0], tokens)}, "
                f"but got {tuple(mask.shape)}."
            )
        return _pool_valid(x, mask, self._sizes((tokens,))[0])


def pool(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Average-pool the positions of ``(B, C, *positions)`` to ``sizes``, in float32 or wider.

    The windows are those of adaptive average pooling. Reshapes and matrix products take its place, because its backward
    is not deterministic on CUDA.
    """
    shape = tuple(x.shape[2:])
    if shape == tuple(sizes):
        # The layer's output may be overwritten in place later.
        return _wide(x).clone() if _wide(x) is x else _wide(x)
    if math.prod(shape) <= SMALL_MAP:
        x = _wide(x)
        windows = functools.reduce(torch.kron, [_windows(*ends, x) for ends in zip(shape, sizes, strict=True)])
        return _product(x.flatten(2), windows).view(*x.shape[:2], *sizes)
    if any(size % target for size, target in zip(shape, sizes, strict=True)):
        x = _wide(x)
        for axis, target in enumerate(sizes, start=2):
            if x.shape[axis] != target:
                windows = _windows(x.shape[axis], target, x)
                x = _product(x.movedim(axis, -1), windows).movedim(-1, axis)
        return x
    count = math.prod(x.shape[2:]) // math.prod(sizes)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # One axis after the other, the outer ones first, each put back together at once: so the backward pass spreads the
    # gradient over the small axes first. Sums and one division at the end, since the backward of a mean divides a
    # gradient of the size of the whole map.
    for axis, target in enumerate(sizes, start=2):
        if x.shape[axis] != target:
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            x = x.reshape(*before, target, x.shape[axis] // target, *after).sum(axis + 1, dtype=wide)
    return x / count


def _product(x: Tensor, windows: Tensor) -> Tensor:
    """``x @ windows`` in the precision that both have, where autocast would take a lower one."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ windows


def _windows(size: int, target: int, like: Tensor) -> Tensor:
    """``(size, target)`` matrix of adaptive average pooling, built on the device to avoid a copy from the host."""
    cell = torch.arange(target, device=like.device)
    start, stop = cell * size // target, ((cell + 1) * size + target - 1) // target
    position = torch.arange(size, device=like.device)[:, None]
    inside = ((position >= start) & (position < stop)).to(like.dtype)
    return inside / inside.sum(0)


def _pool_valid(x: Tensor, mask: Tensor, target: int) -> Tensor:
    """Pool ``(B, C, T)`` to ``target`` segments of each sample's own valid tokens."""
    x = _wide(x)
    valid = mask.to(torch.bool)
    length = valid.sum(1, keepdim=True).clamp_min(1)
    rank = (valid.cumsum(1) - 1)[:, :, None]
    cell = torch.arange(target, device=x.device)
    start, stop = cell * length // target, ((cell + 1) * length + target - 1) // target
    inside = ((rank >= start[:, None]) & (rank < stop[:, None]) & valid[:, :, None]).to(x.dtype)
    return _product(x.masked_fill(~valid[:, None], 0.0), inside / inside.sum(1, keepdim=True).clamp_min(1))


def match_positions(student: Tensor, teacher: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Bring two readings ``(B, C, *positions)`` to the same positions: the smaller of the two along each axis.

    Args:
        student: ``(B, N, *positions)``.
        teacher: ``(B, M, *positions)``. A vector ``(B, M)`` counts as a single position.
        where: How errors name the pair.

    Returns:
        Neuron matrices ``(N, n)`` and ``(M, n)`` whose columns are the same observations.

    Raises:
        ValueError: If the samples differ in number or the positions cannot be paired.
    """
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)} as (batch, neurons, *positions)"
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{where}: the batch sizes differ ({shapes}). Observations are paired one to one, so teacher and student "
            "must see the same samples. Check `teacher_inputs` and layers that fold positions into the batch."
        )
    if student.shape[2:] == teacher.shape[2:]:
        return as_matrix(student), as_matrix(teacher)
    if student.dim() == 2 or teacher.dim() == 2:
        spatial = teacher if student.dim() == 2 else student
        pooled = pool(spatial, (1,) * (spatial.dim() - 2)).flatten(1)
        student, teacher = (student, pooled) if student.dim() == 2 else (pooled, teacher)
        return as_matrix(student), as_matrix(teacher)
    if student.dim() != teacher.dim():
        raise ValueError(
            f"{where}: the positions cannot be paired ({shapes}): one side is a map and the other a sequence. "
            "Pair layers of the same kind, or 'penultimate', which has no positions."
        )
    sizes = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    return as_matrix(pool(student, sizes)), as_matrix(pool(teacher, sizes))


def as_matrix(reading: Tensor) -> Tensor:
    """``(B, C, *positions)`` to ``(C, B * positions)``."""
    return reading.movedim(1, 0).flatten(1)


def select_tensor(output: Any, select: str | int | None, where: str) -> Tensor:
    """The floating-point tensor that an output is or holds; see ``select`` of :func:`neurons`."""
    if select is not None and not isinstance(output, Tensor):
        try:
            output = output[select]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{where}: its output has no {select!r}; {_contents(output)}.") from error
    if isinstance(output, Mapping):
        raise TypeError(f"{where}: its output is a mapping; {_contents(output)}. Choose one with `select=`.")
    if isinstance(output, (tuple, list)):
        tensors = [item for item in output if isinstance(item, Tensor)]
        if len(tensors) != 1 or any(not (item is None or isinstance(item, Tensor)) for item in output):
            raise TypeError(f"{where}: its output is not one tensor; {_contents(output)}. Choose one with `select=`.")
        output = tensors[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"{where}: expected its output to be a tensor, but got {type(output).__name__}.")
    if not output.is_floating_point():
        raise TypeError(
            f"{where}: expected a floating-point output, but got {output.dtype} of shape {tuple(output.shape)}. "
            "Indices, masks and complex values are no activations; choose another layer."
        )
    return output


def _contents(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"it holds the keys {list(output)}"
    if isinstance(output, (tuple, list)):
        return f"it is a {type(output).__name__} of {[type(item).__name__ for item in output]}"
    return f"it is a {type(output).__name__}"


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
