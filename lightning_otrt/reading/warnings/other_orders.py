"""Warnings where student and teacher hold the views of a sample, or the two axes of a map, in another order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.trace import Trace
from lightning_otrt.notices import warn
from lightning_otrt.reading.probes.input_places import Part, Probed, find_places, is_map
from lightning_otrt.reading.traced.network_call import NetworkCall

__all__ = ["OrderedSide", "warn_of_other_orders"]


class OrderedSide(NamedTuple):
    """A network that is called, with its trace."""

    call: NetworkCall
    trace: Trace


def warn_of_other_orders(
    pairs: Sequence[LayerPair], student: OrderedSide, teacher: OrderedSide, grid: int | None
) -> None:
    """Warn once of rows and of maps whose order in one network is not that in the other one.

    Where layers hold several rows for each sample, as of views, frames or crops, one network may have all views of a
    sample side by side and the other one all samples of a view. One may have swapped the axes of its maps.
    Both keep all sizes. So both networks run on inputs that differ in parts, see ``probes/input_places.py``. Pairs of
    other layers cost nothing. Nothing is looked at where weights are spread over processes: all of these have to run as
    many forwards, and their batches may differ.

    Args:
        pairs: The resolved pairs.
        student: The student.
        teacher: The teacher.
        grid: Positions that are kept along each axis; the order of those of a map matters from 2 on.
    """
    sides = student, teacher
    if any(_is_sharded(side.call.model) for side in sides):
        return
    own = [tuple(map(_part, (pair, pair), (0, 1))) for pair in pairs]
    rows = [parts for parts in own if _may_differ_in_rows(sides, parts)]
    wide = [parts for parts in own if grid != 1 and all(map(_is_map, sides, parts))]
    maps = [parts for parts in wide if parts in rows or (_have_samples(sides, parts) and _are_in_order(sides, parts))]
    seen = [
        find_places(
            side.call.model,
            side.trace,
            [each[place] for each in rows],
            [each[place] for each in maps],
            side.call.inputs,
            side.call.method,
        )
        for place, side in enumerate(sides)
    ]
    found: dict[str, list[str]] = {"rows": [], "maps": []}
    for parts in own:
        if parts[0] not in seen[0] or parts[1] not in seen[1]:
            continue
        first, second = seen[0][parts[0]], seen[1][parts[1]]
        name = f"{parts[0].name} -> {parts[1].name}"
        if parts in rows and _have_other_rows(first, second):
            found["rows"].append(name)
        elif parts in maps and {first.is_turned, second.is_turned} == {True, False}:
            found["maps"].append(name)
    if found["rows"]:
        warn(
            f"The layers of the pairs {found['rows']} have several rows for each sample, such as its views, frames or "
            "crops, and student and teacher hold them in another order, as `torch.cat([first, second])` and "
            "`torch.stack([first, second], 1).flatten(0, 1)` do. Different views are matched. Give both networks the "
            "same order, or match layers with one row for each sample.",
        )
    if found["maps"]:
        warn(
            f"The layers of the pairs {found['maps']} give maps with height and width in another order, as where one "
            "network swaps them: rows of the images lie along the rows of the maps on one side, and along the columns "
            "on the other side. Different positions are matched. Give both networks the same order, or pass grid=1.",
        )


def _is_sharded(model: nn.Module) -> bool:
    """Whether its weights are spread over processes: by FSDP, as DTensors, or by DeepSpeed."""
    is_wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return is_wrapped or any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


def _part(pair: LayerPair, place: int) -> Part:
    return Part((pair.student, pair.teacher)[place], pair.select, pair.axes[place])


def _is_map(side: OrderedSide, part: Part) -> bool:
    return is_map(side.trace, part)


def _rows(side: OrderedSide, part: Part) -> int:
    """The number of rows, 0 where these are not along the first axis."""
    tensor = side.trace.tensor(part.name, part.select)
    return 0 if tensor is None or tensor.batch_axis else tensor.shape[0]


def _may_differ_in_rows(sides: tuple[OrderedSide, OrderedSide], parts: tuple[Part, ...]) -> bool:
    """Whether both layers have as many rows, and several for each sample."""
    rows, samples = set(map(_rows, sides, parts)), {side.trace.batch_size for side in sides}
    if len(rows) > 1 or len(samples) > 1:
        return False
    count, batch = rows.pop(), samples.pop()
    return bool(batch) and count > batch and count % batch == 0


def _have_samples(sides: tuple[OrderedSide, OrderedSide], parts: tuple[Part, ...]) -> bool:
    """Whether both layers have one map for each sample."""
    tensors = [side.trace.tensor(part.name, part.select) for side, part in zip(sides, parts, strict=True)]
    return all(
        tensor is not None and tensor.shape[tensor.batch_axis] == side.trace.batch_size
        for tensor, side in zip(tensors, sides, strict=True)
    )


def _are_in_order(sides: tuple[OrderedSide, OrderedSide], parts: tuple[Part, ...]) -> bool:
    """Whether both layers hold the samples as the inputs do. If not, another warning says so."""
    return not any(part.name in side.trace.reordered for side, part in zip(sides, parts, strict=True))


def _have_other_rows(first: Probed, second: Probed) -> bool:
    """Whether the rows are the same but stand in other places.

    A few rows may not show a change, as where all neurons are zero before and after it. Then most have to stand
    elsewhere.
    """
    rows = len(first.rows)
    if rows != len(second.rows):
        return False
    common = (Counter(first.rows) & Counter(second.rows)).total()
    in_place = sum(one == other for one, other in zip(first.rows, second.rows, strict=True))
    return in_place < rows if common == rows else 4 * common >= 3 * rows and 2 * in_place <= common
