"""One forward of a model, watched: which modules ran, in what order, and along which axis their neurons lie.

The model is the same before and after: no random number used up, no statistic or flag changed, no hook left.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.pairs import WRAPPER_NAMES, LayerPair, Trace, TracedLayer, TracedTensor

__all__ = ["format_pairs", "in_evaluation", "named_layers", "named_tensors", "trace", "unchanged"]

_TRANSPARENT_PARENTS = {"AveragedModel", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
_PREFIX_TOKENS = ("cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens")
_CHANNELS_FIRST = re.compile(
    r"_ConvNd|_BatchNorm|_InstanceNorm|GroupNorm|LocalResponseNorm|\w*Norm\w*2[dD]|\w*ChannelsFirst"
    r"|(Adaptive|Fractional)?(Max|Avg|LP)Pool[123]d|(Max)?Unpool[123]d|Upsample|Pixel(Uns|S)huffle"
)
_CHANNELS_LAST = re.compile(
    r"Linear|Conv1D|\w*LayerNorm|\w*RMSNorm|Embedding|MultiheadAttention|Transformer(En|De)coderLayer|RNNBase"
)
_POOL = re.compile(r"\w*(Max|Avg|LP|Adaptive)Pool\w*")
_PASSIVE = {"Flatten", "Identity", "LogSoftmax", "ReLU", "Sigmoid", "Softmax"}
_ELEMENTWISE = {"DropPath", "Identity", "LayerScale", "StochasticDepth"}
_ELEMENTWISE_HOMES = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


def trace(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, root: str = ""
) -> Trace:
    """Run one forward of ``root`` inside ``model`` and note what every module did.

    The forward runs without gradient and in evaluation mode; flags, buffers and random number generators are as before
    afterwards, also when it fails.

    Args:
        model: The whole model; names in the trace are relative to it.
        args: Positional arguments of the forward of ``root``.
        kwargs: Its keyword arguments.
        root: Name of the module to run, ``""`` for ``model`` itself.

    Returns:
        The trace. Modules outside ``root`` are in it, as modules that did not run.

    Raises:
        ValueError: If there is no module ``root``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> seen = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.randn(2, 3, 8, 8),))
        >>> seen.layer("1").output_shape, seen.layer("1").neuron_axis
        ((2, 4, 6, 6), 1)
    """
    modules = named_layers(model)
    if root not in modules:
        raise ValueError(f"No module {root!r} in {type(model).__name__} to run. Its children: {_children(model)}.")
    primary = _primary_names(modules, root)
    target = modules[root]
    inputs = list(_tensors((tuple(args), dict(kwargs or {}))))
    watch = _Watch(batch_size=inputs[0].shape[0] if inputs and inputs[0].dim() else 0)
    with in_evaluation(target, inputs), ExitStack() as hooks:
        for name, module in modules.items():
            if primary[id(module)] == name and _is_inside(name, root):
                before = module.register_forward_pre_hook(partial(watch.enter, name))
                hooks.callback(before.remove)
                after = module.register_forward_hook(partial(watch.leave, name))
                hooks.callback(after.remove)
        returned = list(_tensors(target(*args, **(kwargs or {}))))
        layers = tuple(
            watch.layer(name, module, returned) for name, module in modules.items() if primary[id(module)] == name
        )
    first = inputs[0] if inputs else None
    is_image = first is not None and first.dim() == 4 and first.is_floating_point()
    return Trace(
        layers=layers,
        root=primary[id(target)],
        aliases=tuple((name, primary[id(m)]) for name, m in modules.items() if primary[id(m)] != name),
        output_shapes=tuple(tuple(tensor.shape) for tensor in returned),
        batch_size=watch.batch_size,
        input_is_image=is_image,
        image_size=(first.shape[2], first.shape[3]) if first is not None and is_image else None,
        prefix_tokens=_prefix_tokens(target),
    )


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names that users write, in order of definition.

    Prefixes of wrappers (DDP, torch.compile, FSDP, activation checkpointing) are left out: the name is that of the
    wrapped module. A module that is registered twice has two names.

    Example:
        >>> from torch import nn
        >>> list(named_layers(nn.Sequential(nn.DataParallel(nn.Sequential(nn.ReLU())))))
        ['', '0', '0.0']
    """
    modules: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        modules[name] = module
        for child_name, child in module._modules.items():  # `named_children` leaves second names out
            if child is not None:
                walk(name if _is_wrapper(module, child_name) else _join(name, child_name), child)

    walk("", model)
    return modules


def named_tensors(model: nn.Module) -> dict[str, str]:
    """Parameters and buffers by name, with what they are in words, so that one given for a layer can be recognised.

    Example:
        >>> from torch import nn
        >>> named_tensors(nn.Linear(2, 3))
        {'weight': 'Parameter of shape (3, 2)', 'bias': 'Parameter of shape (3,)'}
    """
    found = {}
    for name, module in named_layers(model).items():
        for key, parameter in module.named_parameters(recurse=False):
            found[_join(name, key)] = f"Parameter of shape {tuple(parameter.shape)}"
        for key, buffer in module.named_buffers(recurse=False):
            found[_join(name, key)] = f"buffer of shape {tuple(buffer.shape)}"
    return found


def format_pairs(pairs: Sequence[LayerPair], student: Trace, teacher: Trace) -> str:
    """The chosen pairs as a table with types, shapes and neuron axes, for the log.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> seen = trace(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (torch.randn(4, 6),))
        >>> print(format_pairs([LayerPair("0", "0", neuron_axis=(1, 1))], seen, seen))
        student      shape  axis  teacher      shape  axis  weight
        0 (Linear)  (4, 5)     1  0 (Linear)  (4, 5)     1       1
    """
    rows = [["student", "shape", "axis", "teacher", "shape", "axis", "weight"]]
    for pair in pairs:
        axes = pair.neuron_axis if isinstance(pair.neuron_axis, tuple) else (pair.neuron_axis,) * 2
        cells: list[str] = []
        for name, seen, axis in ((pair.student, student, axes[0]), (pair.teacher, teacher, axes[1])):
            tensor = seen.tensor(name, pair.select)
            shown = tensor.neuron_axis if axis is None and tensor else axis
            cells += [f"{name} ({seen.layer(name).kind})", str(tensor.shape if tensor else "?"), str(shown)]
        rows.append([*cells, f"{pair.weight:.3g}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _is_inside(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _is_wrapper(module: nn.Module, child_name: str) -> bool:
    if child_name == "module":  # a plausible name in any model, so the parent has to be a known wrapper
        return not _TRANSPARENT_PARENTS.isdisjoint(_type_names(module))
    return child_name in WRAPPER_NAMES


def _type_names(module: nn.Module) -> list[str]:
    return [base.__name__ for base in type(module).__mro__]


def _children(model: nn.Module) -> str:
    return ", ".join(repr(name) for name in named_layers(model) if name and "." not in name) or "none"


def _primary_names(modules: Mapping[str, nn.Module], root: str) -> dict[int, str]:
    """The name by which each module goes: its first one, with those inside the root preferred."""
    primary: dict[int, str] = {}
    for name, module in sorted(modules.items(), key=lambda item: not _is_inside(item[0], root)):
        primary.setdefault(id(module), name)
    return primary


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _prefix_tokens(model: nn.Module) -> int:
    sizes = (p.shape for name, p in model.named_parameters() if name.rpartition(".")[2] in _PREFIX_TOKENS)
    return sum(shape[1] if len(shape) == 3 else 1 for shape in sizes)


@contextmanager
def unchanged(model: nn.Module, inputs: Iterable[Tensor] = ()) -> Iterator[None]:
    """Leave modes, buffers and random number generators as they were, whatever runs inside."""
    modules = list(model.modules())
    flags = [module.training for module in modules]
    buffers = [{name: (b, None if b is None else b.clone()) for name, b in m._buffers.items()} for m in modules]
    tensors = [*inputs, *model.parameters(), *model.buffers()]
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, flag, saved in zip(modules, flags, buffers, strict=True):
                    module.training = flag
                    _restore(module, saved)


@contextmanager
def in_evaluation(model: nn.Module, inputs: Iterable[Tensor] = ()) -> Iterator[None]:
    """Evaluation mode without gradient, after which nothing of the model or of the random numbers has changed."""
    with ExitStack() as stack:
        stack.enter_context(unchanged(model, inputs))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_casts_forgotten())
        if "torch._dynamo" in sys.modules:
            # A compiled call made before skips hooks; what was never imported has compiled nothing.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Flags are set one by one: `train` and `eval` may be overridden, to keep parts frozen or to merge weights.
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def _casts_forgotten() -> Iterator[None]:
    """Keep no weights cast by autocast: torch 2.6 would take those made without gradient for the step itself, too."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _restore(module: nn.Module, saved: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> None:
    for name in [name for name in module._buffers if name not in saved]:
        del module._buffers[name]
    for name, (buffer, value) in saved.items():
        # Writing raises the version that autograd checks, so only what changed is written.
        if buffer is not None and value is not None and not torch.equal(buffer, value):
            buffer.copy_(value)
        module._buffers[name] = buffer


@dataclass
class _Frame:
    """A module that is running."""

    module: nn.Module
    input: Tensor | None
    input_axis: int | None
    source: _Source | None
    votes: list[tuple[tuple[int, ...], int]] = field(default_factory=list)


@dataclass
class _Source:
    """Where a tensor came from. The reference is weak: watching a model must not keep its activations."""

    tensor: Callable[[], Tensor | None]
    layer: str
    neuron_axis: int | None
    batch_axis: int


class _Watch:
    """The hooks of one traced forward, and what they saw."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._seen: dict[str, TracedLayer] = {}
        self._outputs: dict[str, list[Callable[[], Tensor | None]]] = {}
        self._frames: list[_Frame] = []
        self._sources: dict[int, _Source] = {}
        self._completed = 0

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook."""
        if _in_backward():
            return
        tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
        source = self._source(tensor)
        axis = None
        if tensor is not None:
            rule = _axis_rule(module, tensor.dim())
            axis = rule if rule is not None else _from_source(source, tensor.dim())
            for frame in self._frames:
                # What a container passes on to a layer of known type has the axis that this layer expects.
                if frame.input is tensor and frame.input_axis is None:
                    frame.input_axis = axis
        self._frames.append(_Frame(module, tensor, axis, source))

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        if _in_backward():
            return
        frame = self._frames.pop()
        while frame.module is not module:  # a forward that failed, and whose caller went on
            frame = self._frames.pop()
        parts = [(key, value) for key, value in _items(output) if isinstance(value, Tensor)]
        traced = tuple((key, self._traced(module, frame, value)) for key, value in parts)
        single = traced[0][1] if len(traced) == 1 and not isinstance(output, Mapping) else None
        known = self._seen.get(name)
        made = self._source(parts[0][1]) if single is not None and next(module.children(), None) is not None else None
        self._seen[name] = TracedLayer(
            name=name,
            kind=type(module).__name__,
            order=self._completed,
            calls=known.calls + 1 if known else 1,
            input=self._traced_input(frame),
            output=single,
            output_kind=_describe(output),
            parts=() if isinstance(output, Tensor) else traced,
            producer=frame.source.layer if frame.source else None,
            maker=made.layer if made is not None else name,
        )
        self._outputs[name] = [weakref.ref(value) for _, value in parts]
        self._completed += 1
        for (_, value), (_, seen) in zip(parts, traced, strict=True):
            self._note(name, module, value, seen)

    def layer(self, name: str, module: nn.Module, returned: Sequence[Tensor]) -> TracedLayer:
        """All that is known of a module once the forward is over and has returned tensors."""
        seen = self._seen.get(name, TracedLayer(name, kind=type(module).__name__))
        outputs = [reference() for reference in self._outputs.get(name, [])]
        is_returned = any(output is tensor for output in outputs if output is not None for tensor in returned)
        is_container = next(module.children(), None) is not None
        return replace(seen, is_container=is_container, role=_role(module), gives_model_output=is_returned)

    def _note(self, name: str, module: nn.Module, value: Tensor, seen: TracedTensor) -> None:
        if _axis_rule(module, value.dim()) is not None and seen.neuron_axis is not None:
            for frame in self._frames:
                frame.votes.append((seen.shape, seen.neuron_axis))
        known = self._source(value)
        if known is not None and next(module.children(), None) is not None:
            name = known.layer  # a container that hands on what its last child made
        self._sources[id(value)] = _Source(weakref.ref(value), name, seen.neuron_axis, seen.batch_axis)

    def _source(self, tensor: Tensor | None) -> _Source | None:
        source = self._sources.get(id(tensor))
        return source if source is not None and source.tensor() is tensor else None

    def _traced_input(self, frame: _Frame) -> TracedTensor | None:
        if frame.input is None:
            return None
        return _traced(frame.input, frame.input_axis, self._batch_axis(frame.module, frame, frame.input))

    def _traced(self, module: nn.Module, frame: _Frame, value: Tensor) -> TracedTensor:
        return _traced(value, self._neuron_axis(module, frame, value), self._batch_axis(module, frame, value))

    def _neuron_axis(self, module: nn.Module, frame: _Frame, value: Tensor) -> int | None:
        rule = _axis_rule(module, value.dim())
        if rule is not None:
            return rule
        source = self._source(value)
        if source is not None and source.neuron_axis is not None:
            return source.neuron_axis
        shape = tuple(value.shape)
        votes = {axis for voted, axis in frame.votes if voted == shape}
        if not votes:  # branches that were concatenated along the neurons
            votes = {axis for voted, axis in frame.votes if _without(voted, axis) == _without(shape, axis)}
        if votes:
            return votes.pop() if len(votes) == 1 else None
        is_leaf = next(module.children(), None) is None
        if is_leaf and frame.source is not None and frame.input is not None and frame.input.shape == value.shape:
            axis = frame.source.neuron_axis
            # An unknown layer may permute, which its shape shows unless another axis is as long.
            if axis is not None and (_is_elementwise(module) or list(value.shape).count(value.shape[axis]) == 1):
                return axis
        return None

    def _batch_axis(self, module: nn.Module, frame: _Frame, value: Tensor) -> int:
        if value.dim() != 3:
            return 0
        for running in (module, *(outer.module for outer in reversed(self._frames))):
            if isinstance(getattr(running, "batch_first", None), bool):
                return 0 if running.batch_first else 1
        source = self._source(value) or frame.source
        if source is not None and source.batch_axis == 1:
            return 1
        return 1 if value.shape[0] != self.batch_size and value.shape[1] == self.batch_size else 0


def _in_backward() -> bool:
    # A forward that takes a gradient within it runs checkpointed layers once more, which is no second call.
    return torch._C._current_graph_task_id() != -1


def _axis_rule(module: nn.Module, dims: int) -> int | None:
    """The axis of the neurons that follows from the type of a module, for a tensor of so many axes."""
    if dims < 2:
        return None
    if dims == 2:
        return 1
    if getattr(module, "data_format", None) == "channels_first":
        return 1
    normalized = getattr(module, "normalized_shape", ())
    for name in _type_names(module):
        if _CHANNELS_FIRST.fullmatch(name):
            return 1
        if _CHANNELS_LAST.fullmatch(name):
            return None if isinstance(normalized, tuple) and len(normalized) > 1 else dims - 1
    return None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], -1, *shape[axis + 1 :])


def _from_source(source: _Source | None, dims: int) -> int | None:
    return 1 if dims == 2 else source.neuron_axis if source is not None else None


def _is_elementwise(module: nn.Module) -> bool:
    return not _ELEMENTWISE.isdisjoint(_type_names(module)) or any(
        base.__module__ in _ELEMENTWISE_HOMES for base in type(module).__mro__
    )


def _role(module: nn.Module) -> str:
    names = _type_names(module)
    if "Linear" in names or "Conv1D" in names:
        return "linear"
    if "_ConvNd" in names:
        return "pointwise" if set(getattr(module, "kernel_size", ())) == {1} else "conv"
    if "_DropoutNd" in names:
        return "dropout"
    if any(_POOL.fullmatch(name) for name in names):
        return "pool"
    return "passive" if names[0] in _PASSIVE else ""


def _items(output: Any) -> list[tuple[str | int, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    return [(0, output)]


def _describe(output: Any) -> str:
    """``"Tensor"``, ``"tuple(Tensor, None)"`` or ``"dict(last_hidden_state)"``."""
    if isinstance(output, Tensor):
        return "Tensor"
    if not isinstance(output, (Mapping, tuple, list)):
        return type(output).__name__
    items = [str(key) if isinstance(output, Mapping) else _describe_item(value) for key, value in _items(output)]
    return f"{type(output).__name__}({', '.join(items)})"


def _describe_item(value: Any) -> str:
    return "None" if value is None else "Tensor" if isinstance(value, Tensor) else type(value).__name__


def _traced(value: Tensor, neuron_axis: int | None, batch_axis: int) -> TracedTensor:
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return TracedTensor(shape, dtype, value.is_floating_point(), neuron_axis, batch_axis)
