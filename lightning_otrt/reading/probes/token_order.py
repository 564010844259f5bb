"""Whether tokens lie row by row on the grid of their patches: it shows where a change of one patch arrives."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.probes.profiles import layer_tensors, uneven
from lightning_otrt.reading.torch_internals import add_forward_hook, is_in_backward, is_in_functional_transform
from lightning_otrt.reading.traced.arguments import Inputs
from lightning_otrt.reading.traced.token_grid import TokenGrid, find_token_grid

__all__ = ["settle_token_order"]

#: Positions that are changed, each in a sample of its own as far as the batch has so many.
_PROBES = 8
#: Size of a change relative to the values of the map. Small, so that tokens that a network sorts keep their order.
_CHANGE, _CHANGE_OF_HALF = 1e-2, 0.25
#: A change has arrived at a token where it is so many times the mean of the others.
_CLEAR = 3.0
#: Windows that overlap hand it on to neighbours: so much of the largest one counts as the same.
_NEAR = 0.75


class _Watched(NamedTuple):
    """Tokens that may be the positions of a map."""

    name: str
    tensor: TracedTensor
    grid: TokenGrid

    @property
    def size(self) -> tuple[int, ...]:
        assert self.grid.size is not None
        return self.grid.size


class _Source(NamedTuple):
    """A map that is changed: the layer that gives it, and how many of its positions make one of the grid, by axis."""

    name: str
    size: tuple[int, ...]
    merged: tuple[int, ...]


def settle_token_order(
    model: nn.Module, traced: Trace, names: Iterable[str], inputs: Inputs, method: str = ""
) -> Trace:
    """The trace with those of the layers whose patches are not shown to lie row by row.

    As many tokens as a map has positions may lie in any order: Hiera puts them in that of its mask units, and other
    networks sort them. So the network runs again, with a small change at one position of the map that the tokens come
    from, a different one in each sample. It has to arrive at the token of that position. Where a layer mixes all
    tokens, the order is that of what enters it.

    Networks without such layers cost nothing, others two forwards or a few more for each map.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        names: Names of the layers that are to be read, with ``":input"`` for what enters.
        inputs: Arguments of the root.
        method: Method of the root that is called in place of its forward.
    """
    found = (_watched(traced, name) for name in dict.fromkeys(names))
    wanted = [watched for watched in found if watched is not None]
    unordered = {watched.name: watched for watched in wanted}
    # The nearest map first, where a change arrives undisturbed; but that one may lead to keys and values alone.
    for find in (_own_source, _first_source):
        by_source: dict[_Source, list[_Watched]] = {}
        for watched in unordered.values():
            source = find(traced, watched)
            if source is not None:
                by_source.setdefault(source, []).append(watched)
        for source, layers in by_source.items():
            around = {layer.name: [layer, *_inputs_around(traced, layer)] for layer in layers}
            try:
                verdicts = _probe(
                    model, traced, source, [each for near in around.values() for each in near], inputs, method
                )
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the map of this network cannot be changed: the order is not known
                continue
            for name, near in around.items():
                decided = (_decide(verdicts.get(each.name, [])) for each in near)
                if next((verdict for verdict in decided if verdict is not None), False):
                    del unordered[name]
    return replace(traced, unordered_tokens=tuple(dict.fromkeys((*traced.unordered_tokens, *sorted(unordered)))))


def _watched(traced: Trace, name: str) -> _Watched | None:
    """The tokens of a layer, if they are on a grid whose order matters."""
    tensor = traced.tensor(name)
    if tensor is None or len(tensor.shape) != 3:
        return None
    grid = find_token_grid(traced, traced.layer(name), tensor)
    return _Watched(name, tensor, grid) if grid.size is not None and math.prod(grid.size) > 2 else None


def _inputs_around(traced: Trace, watched: _Watched) -> list[_Watched]:
    """What enters the layer and the modules around it, the nearest first, where these are as many tokens."""
    parts = watched.name.removesuffix(INPUT).split(".")
    names = [".".join(parts[:end]) + INPUT for end in range(len(parts), 0, -1)]
    found = (_watched(traced, name) for name in names if name != watched.name)
    return [each for each in found if each is not None and each.size == watched.size]


def _own_source(traced: Trace, watched: _Watched) -> _Source | None:
    """The map that is taken for that of the tokens."""
    return _source(traced.layer(watched.grid.source), watched)


def _first_source(traced: Trace, watched: _Watched) -> _Source | None:
    """The first map of a convolution, of which the network makes all others."""
    convs = [layer for layer in traced.layers if layer.order is not None and layer.role in ("conv", "pointwise")]
    sources = (_source(layer, watched) for layer in sorted(convs, key=lambda layer: layer.order or 0))
    return next((source for source in sources if source is not None), None)


def _source(layer: TracedLayer, watched: _Watched) -> _Source | None:
    tensor, size = layer.output, watched.size
    if tensor is None or len(tensor.positions) != len(size) or tensor.shape[0] != _samples(watched):
        return None
    if any(all_of % part for all_of, part in zip(tensor.positions, size, strict=True)):
        return None
    merged = (all_of // part for all_of, part in zip(tensor.positions, size, strict=True))
    return _Source(layer.name, size, tuple(merged))


def _samples(watched: _Watched) -> int:
    return watched.tensor.shape[watched.tensor.batch_axis]


def _probe(
    model: nn.Module,
    traced: Trace,
    source: _Source,
    watched: Sequence[_Watched],
    inputs: Inputs,
    method: str,
) -> dict[str, list[int]]:
    """For each tensor of tokens where the changes of single positions arrived, see :func:`_verdicts`."""
    cells, samples = _cells(math.prod(source.size)), _samples(watched[0])
    by_name = {each.name: each for each in watched if _samples(each) == samples}
    run = functools.partial(_run, model, traced, source, by_name, inputs, method)
    before = run([])
    found: dict[str, list[int]] = {name: [] for name in by_name}
    for start in range(0, len(cells), samples):
        changed = cells[start : start + samples]
        after = run(changed)
        for name in before.keys() & after.keys():
            found[name] += _verdicts(by_name[name].grid.prefix, before[name], after[name], changed)
    return found


def _cells(positions: int) -> list[int]:
    """Positions all over a grid, far from each other."""
    golden = (math.sqrt(5) - 1) / 2
    return list(dict.fromkeys(int(positions * ((number + 1) * golden % 1)) for number in range(_PROBES)))


def _run(
    model: nn.Module,
    traced: Trace,
    source: _Source,
    watched: dict[str, _Watched],
    inputs: Inputs,
    method: str,
    cells: Sequence[int],
) -> dict[str, Tensor]:
    """The watched tokens ``(B, T, C)`` of the first samples, where each of these has a change at one position."""
    modules = named_layers(model)
    target, found = modules[traced.root], {}

    def change(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if is_in_backward() or is_in_functional_transform() or not isinstance(output, Tensor):
            return None
        return _changed(output, traced.layer(source.name).neuron_axis or 1, source, cells)

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for key, tensor in layer_tensors(name, module, args, kwargs, output):
            if key in watched and tensor.shape == watched[key].tensor.shape:
                tokens = tensor.detach().transpose(0, watched[key].tensor.batch_axis)
                found[key] = tokens[:_PROBES].float().clone()

    args, kwargs = InputGuard(clones=True).copied(inputs)
    with in_evaluation(target, all_tensors(inputs)), ExitStack() as hooks:
        hooks.callback(add_forward_hook(modules[source.name], change).remove)
        for name in dict.fromkeys(name.removesuffix(INPUT) for name in watched):
            hooks.callback(add_forward_hook(modules[name], functools.partial(note, name), with_kwargs=True).remove)
        (getattr(target, method) if method else target)(*args, **kwargs)
    return found


def _changed(output: Tensor, neuron_axis: int, source: _Source, cells: Sequence[int]) -> Tensor:
    """A map with a change at one position of the grid in each of the first samples."""
    changed = output.detach().clone()
    values = changed.movedim(neuron_axis, 1)
    share = _CHANGE if output.element_size() > 2 else _CHANGE_OF_HALF
    scale = share * output.detach().float().square().mean().sqrt().clamp_min(1e-6)
    pattern = uneven(values.shape[1], output.device) * scale
    for sample, cell in enumerate(cells):
        place: list[slice] = []
        for size, merged in zip(reversed(source.size), reversed(source.merged), strict=True):
            cell, index = divmod(cell, size)
            place.insert(0, slice(index * merged, (index + 1) * merged))
        values[sample][(slice(None), *place)] += pattern.to(values.dtype).reshape(-1, *[1] * len(place))
    return changed


def _verdicts(prefix: int, before: Tensor, after: Tensor, cells: Sequence[int]) -> list[int]:
    """For each sample: 1 where its change is at the token of its position, -1 at another one, 0 where neither shows.

    Samples in which nothing changed are left out.
    """
    change = (after - before).norm(dim=2)[: len(cells), prefix:]
    at_token = change.gather(1, torch.tensor(cells, device=change.device)[:, None])[:, 0]
    largest = change.amax(1)
    others = (change.sum(1) - largest) / (change.shape[1] - 1)
    is_there = at_token >= torch.where(largest > _CLEAR * others, _NEAR, 1.0) * largest
    is_elsewhere = (largest > _CLEAR * others) & (at_token < largest / 2)
    verdicts = is_there.int() - is_elsewhere.int()
    return [int(verdict) for verdict in verdicts[largest > 0].tolist()]


def _decide(verdicts: Sequence[int]) -> bool | None:
    """Whether the changes arrived where they should; None where too few of them show it."""
    there, elsewhere = verdicts.count(1), verdicts.count(-1)
    if 2 * there > len(verdicts):
        return True
    return False if elsewhere > there and 4 * elsewhere > len(verdicts) else None
