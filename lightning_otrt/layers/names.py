"""Names of the modules of a model, as users write them: without the prefixes that wrappers add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from torch import Tensor, nn

from lightning_otrt.layers.pairs import INPUT, LayerPair

__all__ = [
    "ancestors",
    "child_names",
    "has_layers",
    "is_inside",
    "join_names",
    "listed",
    "named_layers",
    "named_tensors",
    "own_parameters",
    "primary_names",
    "unwrapped_name",
]

#: Names under which wrappers (torch.compile, FSDP, activation checkpointing) hold the module that they wrap.
_WRAPPED = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",  # what Fabric's `setup` returns holds the model twice
    "_original_module",
)
#: Wrappers by the name under which they hold it. Other models may have such a child, so their type has to be known.
_WRAPPERS = {
    "module": {"AveragedModel", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"},
    "base_model": {"PeftModel"},
    "model": {"BaseTuner"},
}


def listed(names: Sequence[str], at_most: int) -> str:
    """Names in the words of a message, and how many are left out.

    Example:
        >>> listed(["a", "b", "c"], 2), listed([], 2)
        ("'a', 'b' and 1 more", 'none')
    """
    shown = ", ".join(map(repr, names[:at_most])) or "none"
    return f"{shown} and {len(names) - at_most} more" if len(names) > at_most else shown


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names that users write, in order of definition.

    Prefixes of wrappers (DDP, torch.compile, FSDP, activation checkpointing) are left out: the name is that of the
    wrapped module. A module that is registered twice has two names.

    A wrapper with parameters of its own, such as the learned prompts of PEFT, is more than a wrapper: the name is that
    of the wrapper, and the module that it wraps has none. What is inside of that module has the same name in both
    cases.

    Example:
        >>> from torch import nn
        >>> list(named_layers(nn.Sequential(nn.DataParallel(nn.Sequential(nn.ReLU())))))
        ['', '0', '0.0']
    """
    found: dict[str, nn.Module] = {}
    users_names: dict[str, str] = {}
    #: Names of wrappers with parameters of their own.
    taken: set[str] = set()
    parents: dict[str, nn.Module] = {}
    for full_name, module in model.named_modules(remove_duplicate=False):
        parent, _, child = full_name.rpartition(".")
        if full_name == "":
            name = ""
        elif _is_wrapped(parents[parent], child):
            name = users_names[parent]
            if _has_own_parameters(parents[parent], module):
                taken.add(name)
        else:
            name = join_names(users_names[parent], child)
        users_names[full_name], parents[full_name] = name, module
        if name not in taken:
            found[name] = module
    return found


def named_tensors(model: nn.Module) -> dict[str, str]:
    """Parameters and buffers by name, each with a description, to recognise one that is given in place of a layer.

    Example:
        >>> from torch import nn
        >>> named_tensors(nn.Linear(2, 3))
        {'weight': 'Parameter of shape (3, 2)', 'bias': 'Parameter of shape (3,)'}
    """
    found = {}
    for name, module in named_layers(model).items():
        for key, parameter in module.named_parameters(recurse=False):
            found[join_names(name, key)] = _described("Parameter", parameter)
        for key, buffer in module.named_buffers(recurse=False):
            found[join_names(name, key)] = _described("buffer", buffer)
    return found


def _described(kind: str, tensor: Tensor) -> str:
    return f"lazy {kind}" if nn.parameter.is_lazy(tensor) else f"{kind} of shape {tuple(tensor.shape)}"


def primary_names(modules: Mapping[str, nn.Module], root: str) -> dict[int, str]:
    """One name for each module, by its ``id``: the first one inside ``root``, else the first one.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.ReLU())
        >>> model.again = model[0]
        >>> primary_names(named_layers(model), "")[id(model.again)]
        '0'
    """
    primary: dict[int, str] = {}
    for name, module in sorted(modules.items(), key=lambda item: not is_inside(item[0], root)):
        primary.setdefault(id(module), name)
    return primary


def has_layers(model: nn.Module, pairs: Sequence[LayerPair]) -> bool:
    """Whether a student has all student layers of the pairs."""
    return {pair.student.removesuffix(INPUT) for pair in pairs} <= named_layers(model).keys()


def child_names(model: nn.Module) -> list[str]:
    """Names of the direct children."""
    return [name for name in named_layers(model) if name and "." not in name]


def is_inside(name: str, root: str) -> bool:
    """Whether a name is that of ``root`` or of a module inside it."""
    return not root or name == root or name.startswith(f"{root}.")


def join_names(parent: str, child: str) -> str:
    """The qualified name of a child."""
    return f"{parent}.{child}" if parent else child


def unwrapped_name(name: str) -> str:
    """A name without what wrappers add to it.

    Example:
        >>> unwrapped_name("_orig_mod.net.module.layer4")
        'net.layer4'
    """
    return ".".join(part for part in name.split(".") if part not in ("module", *_WRAPPED))


def _is_wrapped(parent: nn.Module, child: str) -> bool:
    if child in _WRAPPERS:
        return not _WRAPPERS[child].isdisjoint(base.__name__ for base in type(parent).__mro__)
    return child in _WRAPPED


def _has_own_parameters(wrapper: nn.Module, wrapped: nn.Module) -> bool:
    """Whether a wrapper has parameters that the module inside of it does not have."""
    others = (child for child in wrapper.children() if child is not wrapped)
    own = {id(each) for each in chain(wrapper.parameters(recurse=False), *(other.parameters() for other in others))}
    return bool(own) and not own <= {id(each) for each in wrapped.parameters()}


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a named module that are in none of the named modules inside of it.

    Args:
        module: A value of :func:`named_layers`.

    Example:
        >>> from torch import nn
        >>> [tuple(each.shape) for each in own_parameters(nn.Sequential(nn.Linear(2, 3)))]
        []
        >>> [tuple(each.shape) for each in own_parameters(nn.DataParallel(nn.Linear(2, 3)))]
        [(3, 2), (3,)]
    """
    yield from module.parameters(recurse=False)
    for name, child in module.named_children():
        if _is_wrapped(module, name):
            yield from own_parameters(child)


def ancestors(name: str) -> list[str]:
    """Names of the modules around a module, without the whole model.

    Example:
        >>> ancestors("net.layer4.0")
        ['net', 'net.layer4']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
