"""Recurrent states among the tensors of a forward: what a network goes on from, in place of samples or a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["StateShapes", "without_states"]


@dataclass(frozen=True)
class StateShapes:
    """The shapes that the states of a network's recurrent modules have, as far as their types tell.

    Args:
        layers: ``(layers * directions, width)`` of each ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``, whose states are
            ``(layers * directions, B, width)``. An LSTM with a projection has two widths.
        cells: Widths of the cells, whose states are ``(B, width)``.
    """

    layers: frozenset[tuple[int, int]] = frozenset()
    cells: frozenset[int] = frozenset()

    @classmethod
    def of(cls, module: nn.Module) -> StateShapes:
        """Those of all recurrent modules inside of a module.

        Example:
            >>> StateShapes.of(nn.Sequential(nn.GRU(4, 8, num_layers=2, bidirectional=True))).layers
            frozenset({(4, 8)})
        """
        layers: set[tuple[int, int]] = set()
        cells: set[int] = set()
        for inner in module.modules():
            if isinstance(inner, nn.RNNBase):
                count = inner.num_layers * (2 if inner.bidirectional else 1)
                layers |= {(count, width) for width in (inner.hidden_size, inner.proj_size) if width}
            elif isinstance(inner, nn.RNNCellBase):
                cells.add(inner.hidden_size)
        return cls(frozenset(layers), frozenset(cells))

    def samples(self, tensor: Tensor) -> int | None:
        """The number of samples of a tensor that has the shape of a layer's state; None for other shapes."""
        if tensor.is_nested or tensor.dim() != 3 or not tensor.is_floating_point():
            return None
        return tensor.shape[1] if (tensor.shape[0], tensor.shape[2]) in self.layers else None

    def are_states(self, tensors: Sequence[Tensor], others: Iterable[Tensor]) -> bool:
        """Whether all of these tensors have the shape of a state, and others have as many samples.

        The others keep a batch of as many sequences as the network has layers from being one.
        """
        counts = {self.samples(tensor) for tensor in tensors}
        if len(counts) != 1 or None in counts:
            return False
        (count,) = counts
        return any(count in other.shape[:2] for other in others if not other.is_nested and self.samples(other) is None)

    def are_cell_states(self, tensors: Sequence[Tensor], others: Iterable[Tensor]) -> bool:
        """The same for the states ``(B, width)`` of cells."""
        shapes = {tuple(tensor.shape) for tensor in tensors if not tensor.is_nested}
        if len(shapes) != 1:
            return False
        (shape,) = shapes
        is_state = len(shape) == 2 and shape[1] in self.cells
        return is_state and any(shape[0] in other.shape[:2] for other in others if not other.is_nested)


def without_states(module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors by which samples may be counted: states ``(layers, B, width)`` of recurrent modules have no vote.

    Args:
        module: The network.
        tensors: What enters and leaves it.

    Example:
        >>> import torch
        >>> words, state = torch.zeros(8, 6), torch.zeros(2, 8, 5)
        >>> [tuple(kept.shape) for kept in without_states(nn.LSTM(4, 5, num_layers=2), [words, state, state])]
        [(8, 6)]
    """
    shapes = StateShapes.of(module)
    if not shapes.layers:
        return list(tensors)
    return [tensor for tensor in tensors if not shapes.are_states([tensor], tensors)]
