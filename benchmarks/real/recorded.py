"""What the frozen teacher computes on the training samples, once: for this library's term and for the rivals' losses.

The samples are fixed, views included, and the teacher is in evaluation mode, so that nothing is lost. Feature maps are
kept averaged to 4 × 4, as the transport term, FitNets and CKA compare them here; attention maps are averaged after
their mean square over neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.evidence.networks import Features, positions
from benchmarks.real.data import Batch, Samples
from lightning_otrt import LayerPair, RepresentationTransfer

GRID = 4
#: Samples of the batch on which the default chooses layers.
_FIRST = 32


def default_pairs(student: nn.Module, teacher: nn.Module, samples: Samples) -> tuple[LayerPair, ...]:
    """The layers that ``layers="auto"`` chooses: those of every method."""
    net = copy.deepcopy(student).train()
    transfer = RepresentationTransfer(teacher)
    with transfer.attached(net):
        samples.batch(torch.arange(min(_FIRST, len(samples)), device=samples.device))(net)
        transfer.loss()
    return tuple(transfer.pairs)


def pooled(output: Tensor) -> Tensor:
    """A map (B, C, H, W) averaged to 4 × 4 where it is larger; tokens (B, T, C) as they are."""
    if output.ndim == 4 and min(output.shape[2:]) > GRID:
        return F.adaptive_avg_pool2d(output, GRID)
    return output


def attention(output: Tensor, mask: Tensor | None) -> Tensor:
    """The root of the mean square over neurons (B, positions, 1); at padding 0."""
    if output.ndim == 4:
        squares = pooled(output.square().mean(1, keepdim=True)).flatten(2).movedim(1, -1)
    else:
        squares = output.square().mean(-1, keepdim=True)
    # The root has no gradient at 0.
    root = squares.clamp_min(1e-12).sqrt()
    return root if mask is None else root * mask[..., None]


def observations(output: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's output as (samples, positions, neurons); of texts each valid token is a sample."""
    if mask is not None:
        return output[mask][:, None]
    return positions(pooled(output), 1 if output.ndim == 4 else -1)


@dataclass(frozen=True)
class Recorded:
    """The teacher's outputs on some samples.

    Attributes:
        pairs: The layers, as the default chose them.
        layers: Pooled output of each teacher layer.
        attention: Its attention map.
        output: What the teacher returns.
    """

    pairs: tuple[LayerPair, ...]
    layers: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]
    output: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: nn.Module, pairs: tuple[LayerPair, ...], samples: Samples) -> Recorded:
        """Run the teacher."""
        layers: list[list[Tensor]] = [[] for _ in pairs]
        maps: list[list[Tensor]] = [[] for _ in pairs]
        outputs = []
        with Taps(teacher, [pair.teacher for pair in pairs]) as taps:
            for batch in samples.chunks(64):
                outputs.append(batch(teacher))
                for index, output in enumerate(taps.outputs):
                    layers[index].append(pooled(output).clone())
                    maps[index].append(attention(output, batch.mask))
        return cls(pairs, tuple(map(torch.cat, layers)), tuple(map(torch.cat, maps)), torch.cat(outputs))

    def features(self, indices: Tensor, mask: Tensor | None, *, maps: bool = False) -> Features:
        """What the losses of rivals see of the teacher."""
        if maps:
            blocks = [layer[indices] for layer in self.attention]
        else:
            blocks = [observations(layer[indices], mask) for layer in self.layers]
        output = self.output[indices]
        return Features(blocks, output, output)


class Replay(nn.Module):
    """Stands for the teacher: its layers give what the teacher gave on the samples of these indices."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self.recorded = recorded
        self.layers = nn.ModuleList(nn.Identity() for _ in recorded.pairs)
        #: The samples of the student's next forward.
        self.indices = torch.empty(0, dtype=torch.long)

    @property
    def pairs(self) -> list[LayerPair]:
        """The same pairs of layers, with the names that they have here."""
        return [replace(pair, teacher=f"layers.{index}") for index, pair in enumerate(self.recorded.pairs)]

    def inputs(self, *args: object, **arguments: Any) -> dict[str, Any]:
        """Its own inputs where the student gets these: ``teacher_inputs`` of a transfer."""
        masks = {name: value for name, value in arguments.items() if name == "attention_mask"}
        return {"indices": self.indices, **masks}

    def forward(self, indices: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """From indices, with the mask of their tokens, to the teacher's output."""
        for layer, kept in zip(self.layers, self.recorded.layers, strict=True):
            layer(kept[indices])
        return self.recorded.output[indices]


class Taps:
    """Keeps the outputs of layers, in order, inside a ``with`` block."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        self._net, self._names = net, names
        self._found: dict[int, Tensor] = {}

    def __enter__(self) -> Taps:
        self._stack = ExitStack()
        for index, name in enumerate(self._names):
            handle = self._net.get_submodule(name).register_forward_hook(self._keep(index))
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _keep(self, index: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            self._found[index] = output

        return keep

    @property
    def outputs(self) -> list[Tensor]:
        """Those of the last forward."""
        return [self._found[index] for index in range(len(self._names))]

    def features(self, batch: Batch, logits: Tensor, *, maps: bool = False) -> Features:
        """What the losses of rivals see of the student."""
        see = attention if maps else observations
        return Features([see(output, batch.mask) for output in self.outputs], logits, logits)
