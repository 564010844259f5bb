"""Pairs of teacher and student architectures, and the representations that transfer terms compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from examples.networks import STUDENT_WIDTHS, TEACHER_WIDTHS, ConvNet


@dataclass(frozen=True)
class Features:
    """What one forward of a network gives to a transfer term.

    Attributes:
        blocks: One tensor (samples, positions, neurons) per block.
        penultimate: What enters the head, (samples, neurons).
        logits: What leaves it.
    """

    blocks: list[Tensor]
    penultimate: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Pair:
    """Two architectures and their corresponding layers.

    Attributes:
        teacher: From the number of classes to a network.
        student: The same for the smaller one.
        layers: ``(student layer, teacher layer)`` of each block, shallow to deep.
        neuron_axis: Axis of the neurons in the outputs of those layers.
        teacher_lr: Highest learning rate of the teacher's training.
    """

    teacher: Callable[[int], nn.Module]
    student: Callable[[int], nn.Module]
    layers: tuple[tuple[str, str], ...]
    neuron_axis: int = 1
    teacher_lr: float = 1e-2


class Residual(nn.Module):
    """The basic block of He et al. (arXiv 1512.03385), with a projection where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = channels == width and stride == 1
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """A map of ``width`` channels."""
        return torch.relu(self.main(x) + self.skip(x))


class ResNet(nn.Module):
    """The residual networks of He et al. for 32 x 32 images: three stages of ``depth`` blocks, 6·depth + 2 layers."""

    def __init__(self, num_classes: int, depth: int, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = nn.Sequential()
        channels = widths[0]
        for index, width in enumerate(widths):
            strides = (1 if index == 0 else 2, *[1] * (depth - 1))
            blocks = [Residual(channels if i == 0 else width, width, stride) for i, stride in enumerate(strides)]
            self.stages.append(nn.Sequential(*blocks))
            channels = width
        self.head = nn.Linear(channels, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """From images (B, 1, H, W) to logits."""
        return self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))


class Transformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al., arXiv 2010.11929); it averages patch tokens, no class token."""

    def __init__(
        self, num_classes: int, width: int, depth: int, heads: int = 4, patch: int = 8, size: int = 32
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        layer = partial(
            nn.TransformerEncoderLayer, width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.Sequential(*(layer() for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """From images (B, 1, H, W) to logits."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


def _conv(widths: Sequence[int]) -> Callable[[int], nn.Module]:
    return partial(ConvNet, widths)


def _same(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names)


def _transformers(part: str = "") -> Pair:
    layers = _same([f"blocks.{block}{part}" for block in range(4)])
    teacher, student = (partial(Transformer, width=width, depth=4) for width in (64, 32))
    return Pair(teacher, student, layers, neuron_axis=-1, teacher_lr=2e-3)


_BLOCKS = _same([f"blocks.{block}" for block in range(3)])
PAIRS = {
    "conv": Pair(_conv(TEACHER_WIDTHS), _conv(STUDENT_WIDTHS), _BLOCKS),
    "wide": Pair(_conv((64, 128, 256)), _conv((16, 32, 64)), _BLOCKS),
    "residual": Pair(partial(ResNet, depth=3), partial(ResNet, depth=1), _same([f"stages.{i}" for i in range(3)])),
    "transformer": _transformers(),
    # The same networks, compared inside their blocks; the first dropout sees what the attention adds to the stream.
    "transformer-attention": _transformers(".dropout1"),
    "transformer-norm": _transformers(".norm2"),
    "transformer-mlp": _transformers(".linear1"),
}


class Taps:
    """Keeps what the blocks and the head of a network compute in each forward.

    Args:
        net: A network.
        layers: Names of its blocks.
        neuron_axis: Axis of the neurons in their outputs.
        head: Name of its linear head.
    """

    def __init__(self, net: nn.Module, layers: Sequence[str], neuron_axis: int, head: str = "head") -> None:
        self.neuron_axis = neuron_axis
        self.outputs: dict[str, Tensor] = {}
        self.layers = tuple(layers)
        self._handles = [net.get_submodule(name).register_forward_hook(self._keep(name)) for name in layers]
        self._handles.append(net.get_submodule(head).register_forward_hook(self._keep_head))

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.outputs[name] = output

        return keep

    def _keep_head(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.outputs["penultimate"], self.outputs["logits"] = args[0], output

    def take(self) -> Features:
        """The representations of the last forward."""
        blocks = [positions(self.outputs[name], self.neuron_axis) for name in self.layers]
        return Features(blocks, self.outputs["penultimate"], self.outputs["logits"])

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def tapped(net: nn.Module, layers: Sequence[str], neuron_axis: int, head: str = "head") -> Iterator[Taps]:
    """Hooks for the duration of a block."""
    taps = Taps(net, layers, neuron_axis, head)
    try:
        yield taps
    finally:
        taps.remove()


def positions(output: Tensor, neuron_axis: int) -> Tensor:
    """A layer's output as (samples, positions, neurons)."""
    moved = output.movedim(neuron_axis, -1)
    return moved.reshape(len(moved), -1, moved.shape[-1])


class CachedTeacher(nn.Module):
    """A teacher whose outputs on fixed images are computed once: exact, as it is in evaluation mode and they are fixed.

    It maps indices of images to logits; its modules ``layers.0``, ``layers.1``, ... give the maps of the blocks,
    (B, C, H, W), into which it folds the tokens of a transformer.

    Args:
        net: The teacher, with a linear ``head``.
        pair: Its layers.
        images: All images that a student will see.
    """

    def __init__(self, net: nn.Module, pair: Pair, images: Tensor) -> None:
        super().__init__()
        names = [teacher for _, teacher in pair.layers]
        found: list[list[Tensor]] = [[] for _ in range(len(names) + 1)]
        net.eval()
        with torch.no_grad(), tapped(net, names, pair.neuron_axis) as taps:
            for chunk in images.split(500):
                net(chunk)
                for kept, name in zip(found, [*names, "penultimate"], strict=True):
                    kept.append(taps.outputs[name])
        *blocks, penultimate = (torch.cat(kept) for kept in found)
        self.layers = nn.ModuleList(_Lookup(_as_map(block, pair.neuron_axis)) for block in blocks)
        self.penultimate = _Lookup(penultimate)
        self.head = net.get_submodule("head")

    def forward(self, indices: Tensor) -> Tensor:
        """Logits of images."""
        return self.features(indices).logits

    def features(self, indices: Tensor) -> Features:
        """All representations of images."""
        blocks = [positions(layer(indices), 1) for layer in self.layers]
        penultimate = self.penultimate(indices)
        return Features(blocks, penultimate, self.head(penultimate))


def _as_map(output: Tensor, neuron_axis: int) -> Tensor:
    """Maps stay; tokens (B, T, C) on a square become (B, C, H, W)."""
    if output.ndim == 4:
        return output
    side = math.isqrt(output.shape[1])
    return output.movedim(neuron_axis, 1).unflatten(2, (side, side))


class _Lookup(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Buffer(table)

    def forward(self, indices: Tensor) -> Tensor:
        return self.table[indices]
