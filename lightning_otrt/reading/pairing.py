"""From the first inputs of student and teacher to pairs of layers and how each of them is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.automatic import resolve_layers, select_layers
from lightning_otrt.layers.comparable import comparable_layers, match_in_order
from lightning_otrt.layers.grammar import check_names
from lightning_otrt.layers.pairs import INPUT, LayerPair, LayerSpec, Trace
from lightning_otrt.reading.neurons import NeuronReader, match_positions, pool
from lightning_otrt.reading.recorder import Recorder, View, padding_mask
from lightning_otrt.reading.tracer import format_pairs, in_evaluation, named_layers, named_tensors, trace
from lightning_otrt.transport.distance import transport_distance

__all__ = ["Observer", "Pairing", "can_be_compared", "can_be_root", "check_layers", "match_layers", "pair_layers"]

SIDES = ("student", "teacher")
#: Positions by which layers are compared for "matched".
MATCHING_GRID = 4


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
        axes = pair.neuron_axis
        axis = axes[0 if side == "student" else 1] if isinstance(axes, tuple) else axes
        return layer_reader(side, getattr(self, side), getattr(pair, side), axis, grid, pair.select)


def layer_reader(
    side: str, seen: Trace, name: str, axis: int | None, grid: int | None, select: str | int | None = None
) -> NeuronReader:
    """How a layer is read, from what a traced forward showed of it.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        seen: Trace of its network.
        name: ``"name"`` or ``"name:input"``.
        axis: Axis of the neurons.
        grid: See :func:`lightning_otrt.reading.neurons`.
        select: Key or index of the tensor, where the layer gives several.
    """
    tensor = seen.tensor(name, select)
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
        select=None if name.endswith(INPUT) else select,
    )


class Observer:
    """Reads layers of one network in forwards that are run for it; :meth:`remove` takes its hooks off.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        model: The network.
        seen: Trace of the network.
        layers: Names with their neuron axes.
        grid: See :func:`lightning_otrt.reading.neurons`.
    """

    def __init__(self, side: str, model: nn.Module, seen: Trace, layers: Mapping[str, int], grid: int | None) -> None:
        modules = named_layers(model)
        self.side, self.names = side, tuple(layers)
        self._recorder = Recorder(lambda *_: False)
        self._recorder.watch_student(
            {
                name: (name, modules[name.removesuffix(INPUT)], layer_reader(side, seen, name, axis, grid))
                for name, axis in layers.items()
            }
        )

    def __call__(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Readings ``(B, C, *positions)`` by name of the forward ``run(*args, **kwargs)``.

        Raises:
            ValueError: If a layer did not run once.
        """
        self._recorder.current = view = View("", student_mask=padding_mask(args, kwargs))
        try:
            run(*args, **kwargs)
        finally:
            self._recorder.current = None
        for name in self.names:
            calls = len(view.student.get(name, ()))
            if calls != 1:
                raise ValueError(
                    f"The {self.side} layer {name!r} ran {calls} times in this forward, but once in the first one. A "
                    "representation is one call; leave the layer out, or name its parent."
                )
        return {name: calls[0] for name, calls in view.student.items()}

    def remove(self) -> None:
        """Take the hooks off."""
        self._recorder.remove()


def pair_layers(
    layers: LayerSpec,
    student: nn.Module,
    root: str,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    teacher: nn.Module,
    teacher_inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    known: tuple[LayerPair, ...] | None = None,
) -> Pairing:
    """Trace one forward of each network and choose the pairs.

    Args:
        layers: The user's choice.
        student: The student.
        root: Name of its submodule that gets ``inputs``.
        inputs: Positional and keyword arguments of that submodule.
        teacher: The teacher.
        teacher_inputs: Its arguments.
        known: Resolved pairs of both networks to go on with, instead of a choice.

    Raises:
        ValueError: If a layer cannot be recorded, or no pair can be found.
    """
    seen = trace(student, *inputs, root=root)
    taught = _trace_teacher(teacher, teacher_inputs, student, root)
    if known is not None:
        return Pairing(known, seen, taught)

    def matched() -> list[tuple[str, str]]:
        networks = (named_layers(student)[root], *inputs), (teacher, *teacher_inputs)
        return match_layers((seen, taught), (student, teacher), networks)

    return Pairing(resolve_layers(layers, seen, taught, matched), seen, taught)


def match_layers(
    traces: tuple[Trace, Trace],
    models: tuple[nn.Module, nn.Module],
    runs: tuple[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]], ...],
) -> list[tuple[str, str]]:
    """The blocks of the student with those layers of the teacher that are closest to them on one batch, in order.

    Distances are those of the correlation cost, in evaluation mode; the pairing is that of :func:`match_in_order`.

    Args:
        traces: Traces of student and teacher.
        models: The two networks.
        runs: For each, the module to run with its positional and keyword arguments.

    Raises:
        ValueError: If no student layer can be compared with a teacher layer.
    """
    student, teacher = traces
    candidates = [name for name in comparable_layers(teacher) if _positions(teacher, name) > 1]
    chosen = select_layers(["blocks"], student, "student"), select_layers(candidates, teacher, "teacher")
    readings = []
    for side, model, seen, layers, (module, args, kwargs) in zip(SIDES, models, traces, chosen, runs, strict=True):
        observer = Observer(side, model, seen, layers, MATCHING_GRID)
        try:
            with in_evaluation(module):
                readings.append(observer(module, args, kwargs))
        finally:
            observer.remove()
    # Over fewer observations distances come out smaller, so all layers are read at the same positions.
    every = [reading for side in readings for reading in side.values()]
    shapes = {reading.dim(): [r.shape[2:] for r in every if r.dim() == reading.dim()] for reading in every}
    sizes = {dims: [min(axis) for axis in zip(*found, strict=True)] for dims, found in shapes.items()}
    alike = [{name: pool(reading, sizes[reading.dim()]) for name, reading in side.items()} for side in readings]
    distances = torch.full((len(chosen[0]), len(chosen[1])), math.nan)
    for row, y in enumerate(alike[0].values()):
        for column, x in enumerate(alike[1].values()):
            if can_be_compared(y, x):
                distances[row, column] = transport_distance(*match_positions(y, x, "matched")).value
    pairs = match_in_order(distances)
    if not pairs:
        raise ValueError(
            f'"matched" found no pair: none of the student layers {list(chosen[0])} can be compared with one of the '
            f"teacher layers {list(chosen[1])}. Name the pairs."
        )
    return [(list(chosen[0])[row], list(chosen[1])[column]) for row, column in pairs]


def _positions(seen: Trace, name: str) -> int:
    tensor = seen.tensor(name)
    return math.prod(tensor.positions) if tensor is not None else 0


def can_be_compared(student: Tensor, teacher: Tensor) -> bool:
    """Whether two readings ``(B, C, *positions)`` have positions that can be paired: not a map with a sequence."""
    return student.dim() == teacher.dim() or 2 in (student.dim(), teacher.dim())


def _trace_teacher(
    teacher: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]], student: nn.Module, root: str
) -> Trace:
    try:
        return trace(teacher, *inputs)
    except Exception as error:
        args, kwargs = inputs
        given = [_describe(value) for value in args] + [f"{name}={_describe(value)}" for name, value in kwargs.items()]
        whose = f"{root!r} of the student" if root else "the student"
        # One string with the original words: finders of batch sizes look for "out of memory" there.
        raise RuntimeError(
            f"The teacher ({type(teacher).__name__}) failed on ({', '.join(given)}), from the inputs of {whose} "
            f"({type(student).__name__}). {type(error).__name__}: {error}. If it needs other inputs, make them by "
            "`teacher_inputs`, a function of the student's; if another module of the student gets them, name it as "
            "`student_root`."
        ) from error


def _describe(value: Any) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
    )


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
        student_kind=type(student).__name__,
        teacher_kind=type(teacher).__name__,
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
