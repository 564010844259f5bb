"""A forward in evaluation mode that leaves a model and the random number generators as they were."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_otrt.random_numbers import Generator, random_numbers_restored
from lightning_otrt.reading.extra_forwards.plain_state import PlainState
from lightning_otrt.reading.torch_internals import all_buffers, without_weight_caches

__all__ = ["in_evaluation", "state_restored"]


@contextmanager
def in_evaluation(model: nn.Module, inputs: Iterable[Tensor] = ()) -> Iterator[list[Generator]]:
    """Evaluation mode without gradient inside the block; see :func:`state_restored` for what is restored after it.

    Args:
        model: The model that runs in the block.
        inputs: Its inputs; the random number generators of their CUDA devices are restored too.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> with in_evaluation(net):
        ...     net.training, net[0].training
        (False, False)
        >>> net.training
        True
    """
    with ExitStack() as stack:
        generators = stack.enter_context(state_restored(model, inputs))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_weight_caches())
        if "torch._dynamo" in sys.modules:
            # Code compiled earlier would skip new hooks. If Dynamo was never imported, nothing is compiled.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Flags are set one by one: `train` and `eval` may be overridden, to keep parts frozen or to merge weights.
        for module in _with_flags(model):
            module.training = False
        yield generators


@contextmanager
def state_restored(model: nn.Module, inputs: Iterable[Tensor] = ()) -> Iterator[list[Generator]]:
    """Restore what a forward changes after the block, also where it raises.

    That is training flags, buffers, random number generators of CPU and CUDA, plain attributes of modules, and what
    forward hooks of users write to, see ``plain_state.py``. The block gets the random number generators that modules
    have of their own.

    Args:
        model: The model that runs in the block.
        inputs: Its inputs; the random number generators of their CUDA devices are restored too.
    """
    modules = list(model.modules())
    flags = [(module, module.training) for module in _with_flags(model)]
    buffers = [
        {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in all_buffers(module).items()}
        for module in modules
    ]
    tensors = [*inputs, *model.parameters(), *model.buffers()]
    plain = PlainState(modules)
    with random_numbers_restored(tensors):
        try:
            yield plain.generators
        finally:
            with torch.no_grad():
                plain.restore()
                for module, flag in flags:
                    module.training = flag
                for module, saved in zip(modules, buffers, strict=True):
                    _restore_buffers(module, saved)


def _with_flags(model: nn.Module) -> list[nn.Module]:
    """The modules with a flag ``training``: frozen script modules have none."""
    return [module for module in model.modules() if hasattr(module, "training")]


def _restore_buffers(module: nn.Module, saved: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> None:
    for name in all_buffers(module).keys() - saved.keys():
        delattr(module, name)
    now = all_buffers(module)
    for name, (buffer, value) in saved.items():
        # Autograd checks the version of a tensor, which every write raises. So only changed values are written.
        if buffer is not None and value is not None and not torch.equal(buffer, value):
            if buffer.shape != value.shape:  # observers of quantization grow their buffers in the first forward
                buffer.resize_(value.shape)
            buffer.copy_(value)
        if name not in now:
            module.register_buffer(name, buffer)
        elif now[name] is not buffer:
            setattr(module, name, buffer)
