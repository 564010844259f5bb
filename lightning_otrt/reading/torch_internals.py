"""The only uses of private parts of torch by `reading/` and `teacher/`: what torch has no public function for.

``tests/reading/test_torch_internals.py`` fails where a new version of torch changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

__all__ = [
    "add_forward_hook",
    "add_forward_pre_hook",
    "all_buffers",
    "child_of",
    "forward_hook_tables",
    "has_freed_graph",
    "is_compiled",
    "is_in_backward",
    "is_in_functional_transform",
    "lightning_base",
    "module_tables",
    "remove_hook",
    "tensor_tables",
    "unwrapped",
    "version_of",
    "without_earlier_pre_hooks",
    "without_weight_caches",
]


def is_in_backward() -> bool:
    """Whether this code runs inside a backward pass, as the recomputation of activation checkpointing does.

    ``torch.utils.checkpoint`` uses the same private function, which returns -1 outside of a backward pass.
    ``torch.compile`` cannot compile it; code that is being compiled is in a forward.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_in_functional_transform() -> bool:
    """Whether this code runs inside ``torch.func.grad``, ``vmap`` or another transform: its tensors never leave it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def without_earlier_pre_hooks(module: nn.Module, kind: type) -> Iterator[None]:
    """Take off the forward pre-hooks of a module that run before its first one of a type; all stay if there is none.

    What the hook of that type gets has gone through them, and would go through them a second time. With them go the
    forward hooks of the same objects: what FSDP gathers before a forward it frees after it, and the forward that runs
    is not over. Forward hooks that are methods of a module stay, since they may change the output.
    """
    before, after = module._forward_pre_hooks, module._forward_hooks
    place = next((place for place, hook in enumerate(before.values()) if isinstance(hook, kind)), 0)
    earlier = list(before)[:place]
    owners = [getattr(before[number], "__self__", None) for number in earlier]
    owners = [owner for owner in owners if owner is not None and not isinstance(owner, nn.Module)]
    ends = [number for number, hook in after.items() if any(getattr(hook, "__self__", None) is one for one in owners)]
    saved = dict(before), dict(after)
    for hooks, numbers in ((before, earlier), (after, ends)):
        for number in numbers:
            hooks.pop(number)
    try:
        yield
    finally:
        for hooks, own, taken in zip((before, after), saved, (earlier, ends), strict=True):
            # In the order that they had, which is that in which they run.
            kept = {number: hook for number, hook in own.items() if number in taken or number in hooks}
            others = dict(hooks)
            hooks.clear()
            hooks.update({**kept, **others})


def version_of(tensor: Tensor) -> int:
    """A number that every write to a tensor raises, but for writes to its ``data``; 0 for inference tensors.

    These have none.
    """
    return 0 if tensor.is_inference() else tensor._version


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of one that ``torch.compile`` returned; any other module itself."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """The child of a module that is registered under a name; None if there is none."""
    return module._modules.get(name)


def all_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name. Unlike ``named_buffers`` it includes those that are None."""
    return dict(module._buffers.items())


def forward_hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """The tables of a module's forward pre-hooks and forward hooks, of whoever registered them, and of their flags."""
    of_hooks: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    flags: list[dict[int, Any]] = [module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs]
    return [*of_hooks, *flags, module._forward_hooks_always_called]


def lightning_base(kind: type) -> type | None:
    """``LightningModule`` of the package that a class takes it from, without an import of either; None for others."""
    bases = (base for base in kind.__mro__ if base.__name__ == "LightningModule")
    return next((base for base in bases if base.__module__.startswith(("lightning.", "pytorch_lightning."))), None)


def module_tables(module: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries that hold the attributes of a module, its children, and its forward pre-hooks and hooks."""
    tables: list[Any] = [vars(module), module._modules, module._forward_pre_hooks, module._forward_hooks]
    return tables


def tensor_tables(module: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries that hold the parameters, buffers and children of a module."""
    tables: list[Any] = [module._parameters, module._buffers, module._modules]
    return tables


def remove_hook(module: nn.Module, hook: Any) -> None:
    """Take a hook off a module without the handle that its registration gave, which a copy of the module lacks."""
    tables = forward_hook_tables(module)
    numbers = [number for table in tables[:2] for number, known in table.items() if known is hook]
    for table in tables:
        for number in numbers:
            table.pop(number, None)


@contextmanager
def _without_parametrization_cache() -> Iterator[None]:
    """Neither use nor fill the cache of ``parametrize.cached()`` inside the block.

    A forward without gradient would leave weights in it that carry none, and training would go on with these.
    """
    state: Any = parametrize
    before, state._cache_enabled = state._cache_enabled, 0
    try:
        yield
    finally:
        state._cache_enabled = before


@contextmanager
def without_weight_caches() -> Iterator[None]:
    """Neither use nor fill what torch keeps of computed weights inside the block: those of autocast, too.

    Autocast of torch 2.6 would reuse weights that were cast without gradient, in a forward that is trained.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with _without_parametrization_cache():
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


def has_freed_graph(tensors: Iterable[Tensor]) -> bool:
    """Whether a backward pass through the graph of one of the tensors would fail, because an earlier one freed it.

    Nothing is computed: what is saved by hooks, as those of activation checkpointing, is not unpacked. Older versions
    of torch do not tell what is saved by hooks, and for them the answer may be False.
    """
    nodes = [tensor.grad_fn for tensor in tensors]
    known: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if any(_is_freed(node, name) for name in dir(node) if name.startswith("_raw_saved_")):
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def _is_freed(node: Any, name: str) -> bool:
    try:
        saved = getattr(node, name)
        # What is freed has no data, and neither has what was None from the start. Reading it tells them apart.
        for part in saved if isinstance(saved, (list, tuple)) else [saved]:
            if getattr(part, "data", part) is None and part.unpack_hook is None:
                getattr(node, name.removeprefix("_raw"))
    except RuntimeError as error:
        return "already been freed" in str(error)
    return False


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile`` was called on the module, a part of it or a method of these."""
    return any(
        hasattr(part, "_orig_mod")
        or part._compiled_call_impl is not None
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(part).values())
        for part in module.modules()
    )


def add_forward_hook(module: nn.Module, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
    """``module.register_forward_hook``, which script modules refuse although calls of theirs from Python run hooks.

    Hooks of modules that TorchScript calls inside itself do not run.
    """
    return nn.Module.register_forward_hook(module, hook, **options)


def add_forward_pre_hook(module: nn.Module, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
    """The same for ``module.register_forward_pre_hook``."""
    return nn.Module.register_forward_pre_hook(module, hook, **options)
