"""From the first inputs of student and teacher to pairs of layers and how each of them is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_otrt.layers import INPUT, LayerPair, LayerSpec, Trace, check_names
from lightning_otrt.neurons import NeuronReader
from lightning_otrt.selection import resolve_layers
from lightning_otrt.tracing import format_pairs, named_layers, named_tensors, trace

__all__ = ["Pairing", "can_be_root", "check_layers", "pair_layers"]


@dataclass(frozen=True)
class Pairing:
    """Resolved pairs with what a traced forward showed of both networks.

    Args:
        pairs: The pairs, with full names and weights that sum to 1.
        student: Trace of the student.
        teacher: Trace of the teacher.
    """

    pairs: tuple[LayerPair, ...]
    student: Trace
    teacher: Trace

    def readers(self, side: str, model: nn.Module, grid: int | None) -> dict[str, tuple[str, nn.Module, NeuronReader]]:
        """What to record of one side: key of the pair -> (name, module, reader)."""
        modules = named_layers(model)
        found = {}
        for index, pair in enumerate(self.pairs):
            name = getattr(pair, side)
            found[str(index)] = (name, modules[name.removesuffix(INPUT)], self._reader(side, pair, grid))
        return found

    def table(self) -> str:
        """The pairs as a table with types and shapes."""
        return format_pairs(self.pairs, self.student, self.teacher)

    def _reader(self, side: str, pair: LayerPair, grid: int | None) -> NeuronReader:
        seen: Trace = getattr(self, side)
        name: str = getattr(pair, side)
        tensor = seen.tensor(name, pair.select)
        axes = pair.neuron_axis
        axis = axes[0 if side == "student" else 1] if isinstance(axes, tuple) else axes
        prefix, token_grid = 0, None
        if tensor is not None and len(tensor.shape) == 3 and axis in (2, -1) and seen.image_size is not None:
            prefix, token_grid = _token_grid(tensor.shape[1 - tensor.batch_axis], seen.prefix_tokens, seen.image_size)
        return NeuronReader(
            layer=f"{side} layer {name!r}",
            neuron_axis=axis,
            batch_axis=0 if tensor is None else tensor.batch_axis,
            grid=grid,
            prefix_tokens=prefix,
            token_grid=token_grid,
            select=None if name.endswith(INPUT) else pair.select,
        )


def pair_layers(
    layers: LayerSpec,
    student: nn.Module,
    root: str,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    teacher: nn.Module,
    teacher_inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
) -> Pairing:
    """Trace one forward of each network and choose the pairs.

    Args:
        layers: The user's choice.
        student: The student.
        root: Name of its submodule that gets ``inputs``.
        inputs: Positional and keyword arguments of that submodule.
        teacher: The teacher.
        teacher_inputs: Its arguments.

    Raises:
        ValueError: If a layer cannot be recorded, or no pair can be found.
    """
    seen = trace(student, *inputs, root=root)
    taught = trace(teacher, *teacher_inputs)
    return Pairing(resolve_layers(layers, seen, taught), seen, taught)


def check_layers(layers: LayerSpec, student: nn.Module, teacher: nn.Module, root: str | None) -> None:
    """Check what can be checked of the user's choice before any forward.

    Raises:
        TypeError: If an element of ``layers`` is none of the accepted forms.
        ValueError: If a name does not exist, or ``root`` does not.
    """
    modules = named_layers(student)
    if root is not None and root not in modules:
        raise ValueError(
            f"Expected `student_root` to name a module of the student ({type(student).__name__}), but got {root!r}. "
            f"Its children: {[name for name in modules if name and '.' not in name]}."
        )
    check_names(
        layers,
        list(modules),
        list(named_layers(teacher)),
        root,
        student_tensors=named_tensors(student),
        teacher_tensors=named_tensors(teacher),
    )


def can_be_root(name: str, layers: LayerSpec, student: nn.Module, teacher: nn.Module) -> bool:
    """Whether a module is one whose inputs the teacher could get: trained, and holding all layers that are named."""
    modules = named_layers(student)
    module = modules[name]
    if not any(parameter.requires_grad for parameter in module.parameters()) or next(module.children(), None) is None:
        return False
    inside = [known for known in modules if not name or known == name or known.startswith(f"{name}.")]
    try:
        check_names(layers, inside, list(named_layers(teacher)), name)
    except ValueError:
        return False
    return True


def _token_grid(tokens: int, declared: int, image: tuple[int, int]) -> tuple[int, tuple[int, int] | None]:
    """How many tokens of an image are a prefix, and the rows and columns of the others.

    The declared prefix is tried first; some models add it only later, so that none is the second guess.
    """
    for prefix in dict.fromkeys((declared, 0)):
        left = tokens - prefix
        if left < 1:
            continue
        rows = round(math.sqrt(left * image[0] / image[1]))
        if rows and left % rows == 0 and math.isclose(rows * image[1], left // rows * image[0], rel_tol=0.1):
            return prefix, (rows, left // rows)
    return declared if tokens > declared else 0, None
