"""Where parts of the input arrive in a layer: which samples and views its rows are, and how its maps lie."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.neurons.outputs import output_items, sequence_output
from lightning_otrt.reading.probes.profiles import mapped, profile, sums, uneven
from lightning_otrt.reading.torch_internals import add_forward_hook, is_in_backward, is_in_functional_transform
from lightning_otrt.reading.traced.arguments import Inputs, entered_tensor
from lightning_otrt.reading.traced.token_grid import find_token_grid

__all__ = ["Part", "Probed", "find_places", "is_map"]

#: A change has reached a row where a sum over it differs by so much, relative to the largest sum.
_REACHED = 1e-4
#: Maps of so many samples are kept; batches of half as many show all four changes of an image in one forward.
_SAMPLES = 16
#: So many sums over the channels stand for them.
_NUMBERS = 8
#: How strong a change of an image is, relative to its values.
_CHANGE = 0.5
#: The centre of the changes has to move by so much of half the map, and so many times as far as on the other axis.
_MOVED, _CLEAR = 0.2, 4.0


class Part(NamedTuple):
    """A tensor to look at: the name of the layer, ``":input"`` included, its key, and the axis of its neurons."""

    name: str
    select: str | int | None = None
    axis: int | None = None


@dataclass
class Probed:
    """What the changes showed of a tensor.

    Attributes:
        rows: For each of its rows, which of the changes reached it.
        is_turned: Whether the rows of the images lie along the columns of its maps, None where that is not clear.
    """

    rows: list[tuple[bool, ...]] = field(default_factory=list)
    is_turned: bool | None = None


class _Change(NamedTuple):
    """Inputs with a change; ``strips`` is the part of the image of each sample that has it, in turn."""

    inputs: Inputs
    strips: tuple[int, ...] = ()


def find_places(
    model: nn.Module,
    traced: Trace,
    rows: Iterable[Part],
    maps: Iterable[Part],
    inputs: Inputs,
    method: str = "",
) -> dict[Part, Probed]:
    """Run the network on inputs that differ in parts, and see which rows, and which side of the maps, these change.

    For rows the parts are samples, views along the second axis or in tensors of their own, and the four sides of the
    images: as many forwards as there are binary digits in their numbers. For maps alone it is one forward on images
    whose sides change, or four in batches of less than eight. What shows nothing is left out.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        rows: Tensors of which the rows are looked at.
        maps: Tensors of which the maps are looked at.
        inputs: Arguments of the root.
        method: Method of the root that is called in place of its forward.
    """
    row_parts, map_parts = tuple(dict.fromkeys(rows)), tuple(dict.fromkeys(maps))
    parts = tuple(dict.fromkeys((*row_parts, *map_parts)))
    if not parts:
        return {}
    changes = itertools.chain(
        _image_changes(traced, inputs, one_by_one=bool(row_parts)), _row_changes(traced, row_parts, inputs)
    )
    try:
        first = next(changes, None)
        if first is None:
            return {}
        before = _run(model, traced, parts, inputs, method)
        after = [
            (change.strips, _run(model, traced, parts, change.inputs, method))
            for change in itertools.chain([first], changes)
        ]
        found: dict[Part, Probed] = {}
        for part in parts:
            pairs = [(strips, before[part], seen[part]) for strips, seen in after if part in before and part in seen]
            if len(pairs) == len(after):
                reached = [_reached(first.rows, second.rows) for _, first, second in pairs]
                moves = [(strips, _moves(first.maps, second.maps)) for strips, first, second in pairs if strips]
                found[part] = Probed(list(zip(*reached, strict=True)), _is_turned(moves))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the parts of these inputs cannot be changed: nothing is shown
        return {}
    return found


def is_map(traced: Trace, part: Part) -> bool:
    """Whether a tensor is a map, or tokens on a grid, with two sides."""
    tensor = traced.tensor(part.name, part.select)
    if tensor is None or part.axis is None:
        return False
    if len(tensor.shape) == 3:
        is_tokens = part.axis % 3 == 2
        sizes = find_token_grid(traced, traced.layer(part.name), tensor).size if is_tokens else None
    else:
        sizes = tuple(n for axis, n in enumerate(tensor.shape) if axis not in (0, part.axis % len(tensor.shape)))
    return sizes is not None and len(sizes) in (2, 3) and min(sizes[-2:]) > 1


class _Seen(NamedTuple):
    """A number for each row of a tensor, and a few for each position ``(B, H, W, few)`` of its first maps, if any."""

    rows: Tensor
    maps: Tensor | None


def _run(model: nn.Module, traced: Trace, parts: Sequence[Part], inputs: Inputs, method: str) -> dict[Part, _Seen]:
    modules = named_layers(model)
    target, found = modules[traced.root], {}

    def note(part: Part, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensor = _tensor(part, module, args, kwargs, output)
        if tensor is not None:
            found[part] = _Seen(profile(tensor, 0), _as_maps(traced, part, tensor))

    with in_evaluation(target, all_tensors(inputs)), ExitStack() as hooks:
        for part in parts:
            module = modules[part.name.removesuffix(INPUT)]
            hooks.callback(add_forward_hook(module, functools.partial(note, part), with_kwargs=True).remove)
        args, kwargs = InputGuard(clones=True).copied(inputs)
        (getattr(target, method) if method else target)(*args, **kwargs)
    return found


def _tensor(part: Part, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
    """The tensor of a part, if it can be looked at."""
    if is_in_backward() or is_in_functional_transform():
        return None
    if part.name.endswith(INPUT):
        entered = entered_tensor(args, kwargs)
        given = [] if entered is None else [entered]
    else:
        items = [(key, item) for key, item in output_items(sequence_output(module, output)) if isinstance(item, Tensor)]
        given = [item for key, item in items if part.select in (None, key) or len(items) == 1]
    if len(given) != 1 or given[0].is_nested or not given[0].is_floating_point() or given[0].dim() < 2:
        return None
    return given[0].detach()


def _as_maps(traced: Trace, part: Part, tensor: Tensor) -> Tensor | None:
    known = traced.tensor(part.name, part.select)
    if known is None or part.axis is None or not is_map(traced, part) or tuple(tensor.shape) != known.shape:
        return None
    if tensor.dim() == 3:
        grid = find_token_grid(traced, traced.layer(part.name), known)
        assert grid.size is not None
        tokens = tensor.transpose(0, known.batch_axis)[:_SAMPLES, grid.prefix :]
        tensor = tokens.mT.unflatten(2, grid.size)  # type: ignore[no-untyped-call]
    else:
        tensor = tensor[:_SAMPLES].movedim(part.axis, 1)
    tensor = tensor.flatten(1, -3).float().movedim(1, -1)  # the times of a video beside its channels
    return sums(tensor, _NUMBERS)  # less than all channels


def _reached(before: Tensor, after: Tensor) -> list[bool]:
    if before.shape != after.shape:
        return []
    return ((after - before).abs() > _REACHED * before.abs().max()).tolist()


def _moves(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """Where the centre of the changes lies on both axes of each map, from -1 to 1: ``(B, 2)``; NaN without a change."""
    if before is None or after is None or before.shape != after.shape:
        return None
    change = (after - before).norm(dim=-1)
    total = change.sum((1, 2))
    ends = (torch.linspace(-1, 1, size, dtype=torch.float32, device=change.device) for size in change.shape[1:])
    centres = [change.sum(2 - axis) @ places / total for axis, places in enumerate(ends)]
    return torch.stack(centres, 1).cpu()


def _is_turned(moves: Sequence[tuple[tuple[int, ...], Tensor | None]]) -> bool | None:
    """Whether a change from the first to the last rows of the images shows along the columns of the maps.

    In which direction tells nothing: where positions are mixed, those without the change may react more to it.
    """
    by_side: dict[int, list[Tensor]] = {side: [] for side in range(4)}
    for strips, centres in moves:
        if centres is None:
            return None
        for sample, centre in enumerate(centres):
            if bool(centre.isfinite().all()):
                by_side[strips[sample % len(strips)]].append(centre)
    if not all(by_side.values()):
        return None
    first, last, left, right = (torch.stack(centres).mean(0) for centres in by_side.values())
    along, across = ((last - first) / 2).abs(), ((right - left) / 2).abs()
    axis = int(along.argmax())
    largest, others = torch.stack([along[axis], across[1 - axis]]), torch.stack([along[1 - axis], across[axis]])
    return bool(axis) if bool((largest > (_CLEAR * others).clamp_min(_MOVED)).all()) else None


def _image_changes(traced: Trace, inputs: Inputs, *, one_by_one: bool) -> Iterator[_Change]:
    """Images of which one side is changed: one after the other, or another one in each sample."""
    images = [tensor for tensor in all_tensors(inputs) if tensor.is_floating_point() and tensor.dim() in (4, 5)]
    if not images:
        return
    turns = [(0,), (1,), (2,), (3,)] if one_by_one or traced.batch_size < _SAMPLES // 2 else [(0, 1, 2, 3)]
    for strips in turns:
        yield _Change(mapped(inputs, functools.partial(_with_strips, shape=images[0].shape, strips=strips)), strips)


def _with_strips(images: Tensor, shape: torch.Size, strips: tuple[int, ...]) -> Tensor:
    """Images with a change at their first or last rows or columns; other tensors as they are."""
    if images.is_nested or images.shape != shape or not images.is_floating_point():
        return images
    changed = images.detach().clone()
    axes = _sides(tuple(images.shape))
    channels = min(set(range(1, images.dim())) - set(axes))
    size = _CHANGE * images.detach().float().square().mean().sqrt().clamp_min(1e-6)
    pattern = uneven(images.shape[channels], images.device).add(1.5) * size
    for start, strip in enumerate(strips):
        axis, is_last = axes[strip // 2], strip % 2
        width = max(1, images.shape[axis] // 4)
        place = changed[start :: len(strips)].narrow(axis, images.shape[axis] - width if is_last else 0, width)
        place.movedim(channels, -1).add_(pattern.to(changed.dtype))
    return changed


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """The axes of rows and columns: the last ones, unless the very last is far smaller, as one of channels."""
    dims = len(shape)
    return (dims - 3, dims - 2) if 4 * shape[-1] < min(shape[-3:-1]) else (dims - 2, dims - 1)


def _row_changes(traced: Trace, parts: Sequence[Part], inputs: Inputs) -> Iterator[_Change]:
    """Inputs in which some samples, or some views, are replaced by the one before each."""
    samples = traced.batch_size
    if not parts or not samples:
        return
    tensors = [traced.tensor(part.name, part.select) for part in parts]
    views = {tensor.shape[0] // samples for tensor in tensors if tensor is not None}
    along = {tensor.shape[1] for tensor in all_tensors(inputs) if tensor.dim() > 1 and tensor.shape[0] == samples}
    sizes = sorted(size for size in along if any(count % size == 0 for count in views))
    for axis, count in ((None, samples), *((1, size) for size in sizes)):
        for digit in _digits(count):
            change = functools.partial(_with_others, axis=axis, count=count, digit=digit)
            change_list = functools.partial(_list_with_others, axis=axis, count=count, digit=digit)
            yield _Change(mapped(inputs, change, change_list))
    shapes = [tensor.shape for tensor in all_tensors(inputs) if tensor.is_floating_point() and tensor.dim() > 1]
    for shape in dict.fromkeys(shapes):
        alike = [tensor for tensor in all_tensors(inputs) if tensor.shape == shape]
        for number in _digits(len(alike)):
            yield _Change(_with_other_tensors(inputs, alike, number))


def _digits(count: int) -> range:
    """The binary digits of the numbers below ``count``."""
    return range(max(count - 1, 0).bit_length())


def _with_others(tensor: Tensor, axis: int | None, count: int, digit: int) -> Tensor:
    """A tensor in which each index with this binary digit has what the one before it had; None: along the samples."""
    if tensor.is_nested or not tensor.dim():
        return tensor
    if axis is None:
        axis = next((place for place in range(min(2, tensor.dim())) if tensor.shape[place] == count), 0)
    if tensor.dim() <= axis or tensor.shape[axis] != count:
        return tensor
    return tensor.index_select(axis, torch.tensor(_others(count, digit), device=tensor.device))


def _list_with_others(items: list[int], axis: int | None, count: int, digit: int) -> list[int]:
    """The same for a list with a number for each sample."""
    return [items[other] for other in _others(count, digit)] if axis is None and len(items) == count else items


def _others(count: int, digit: int) -> list[int]:
    return [(index - (index >> digit & 1)) % count for index in range(count)]


def _with_other_tensors(inputs: Inputs, alike: Sequence[Tensor], digit: int) -> Inputs:
    """Inputs in which each of these tensors whose number has this binary digit is replaced by the one before it."""
    others = {id(tensor): alike[number - 1] if number >> digit & 1 else tensor for number, tensor in enumerate(alike)}
    return mapped(inputs, lambda tensor: others.get(id(tensor), tensor))
