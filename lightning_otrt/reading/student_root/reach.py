"""How much of a student lies before the recorded layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_otrt.layers.automatic import block_names
from lightning_otrt.layers.head import penultimate_names
from lightning_otrt.layers.names import is_inside, named_layers, own_parameters, primary_names
from lightning_otrt.layers.pairs import INPUT, LayerPair
from lightning_otrt.layers.trace import Trace

__all__ = ["describe_frozen", "describe_reach", "layers_of_parameters", "leads_to"]


def describe_reach(student: nn.Module, trace: Trace, pairs: Sequence[LayerPair], method: str = "") -> str:
    """The root, and how many of the student's trained tensors lie before the recorded layers.

    Where these are half of them or fewer, it says where the others are.

    Args:
        student: The student.
        trace: Its traced forward.
        pairs: The resolved pairs.
        method: Method of the root that is called in place of its forward.

    Example:
        >>> import torch
        >>> from lightning_otrt.reading.tracer import trace
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2))
        >>> describe_reach(net, trace(net, (torch.zeros(3, 4),)), [LayerPair("1", "1")])
        'root: the whole student; 4 of 6 trained tensors lie before the recorded layers'
    """
    trained: dict[int, bool] = {}
    ran: set[int] = set()
    for name, parameter, is_before in layers_of_parameters(student, trace, pairs):
        if parameter.requires_grad:
            trained[id(parameter)] = trained.get(id(parameter), False) or is_before
            ran |= {id(parameter)} if trace.layer(name).calls else set()
    called = f"{trace.root}:{method}" if method else trace.root
    root = repr(called) if called else "the whole student"
    before, total = sum(trained.values()), len(trained)
    line = f"root: {root}; {before} of {total} trained tensors lie before the recorded layers"
    if 2 * before > total:
        return line
    if not before:
        return f"{line}: what leads to them is frozen, or in no module that is called."
    after = sum(key in ran and not is_before for key, is_before in trained.items())
    idle = total - before - after
    others = {"run after them": after, "are in modules that the root does not call in evaluation mode": idle}
    line += f". Of the others {' and '.join(f'{count} {where}' for where, count in others.items() if count)}."
    if not (block_names(trace) and penultimate_names(trace)):
        return line
    return f'{line} Later layers, such as those of ["blocks", "penultimate"], let the term train more.'


def describe_frozen(student: nn.Module, trace: Trace, pairs: Sequence[LayerPair]) -> str:
    """What to say where all that leads to the recorded layers is frozen; empty where it is not.

    Args:
        student: The student.
        trace: Its traced forward.
        pairs: The resolved pairs.

    Example:
        >>> import torch
        >>> from lightning_otrt.reading.tracer import trace
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
        >>> _ = net[0].requires_grad_(False)
        >>> describe_frozen(net, trace(net, (torch.zeros(3, 4),)), [LayerPair("0", "0")])[:69]
        "The transfer term is constant: the student layers ['0'] and all 2 par"
    """
    found = layers_of_parameters(student, trace, pairs)
    before = {id(parameter): parameter.requires_grad for _, parameter, is_before in found if is_before}
    if not before or any(before.values()):
        return ""
    others = list(dict.fromkeys(name for name, parameter, _ in found if parameter.requires_grad))
    elsewhere = f"What is trained comes after them or beside them: {others[:8]}. " if others else ""
    layers = list(dict.fromkeys(pair.student for pair in pairs))
    return (
        f"The transfer term is constant: the student layers {layers} and all {len(before)} parameters that lead to "
        f"them are frozen (requires_grad=False). {elsewhere}"
        "The term cannot train frozen weights: unfreeze the blocks that it is to train (`requires_grad_(True)`), or "
        "name layers behind trained ones. While the backbone is frozen on purpose, as before BackboneFinetuning "
        "unfreezes it, a `schedule` of 0 leaves the term out."
    )


def layers_of_parameters(
    student: nn.Module, trace: Trace, pairs: Sequence[LayerPair]
) -> list[tuple[str, nn.Parameter, bool]]:
    """The parameters with the name of their module, and whether it leads to a recorded layer."""
    modules = named_layers(student)
    names = primary_names(modules, trace.root)
    found = []
    # The modules by name, since a wrapper has no name of its own.
    for module in modules.values():
        name = names[id(module)]
        is_before = any(leads_to(name, pair.student, trace) for pair in pairs)
        found += [(name, parameter, is_before) for parameter in own_parameters(module)]
    return found


def leads_to(name: str, layer: str, trace: Trace) -> bool:
    """Whether a module ran before a recorded layer, is part of it or holds it.

    A module that is never called, such as the projections of ``nn.MultiheadAttention``, counts as the module around it,
    which uses its weights. Where that one holds the recorded layer, it is not known when, and the answer is no.
    """
    recorded, found = trace.layer(layer), trace.layer(name)
    if not is_inside(name, trace.root):
        return False
    is_called = found.order is not None or name == trace.root  # a root whose method is called has no order
    while found.order is None and name != trace.root:
        name = name.rpartition(".")[0]
        found = trace.layer(name)
    if is_inside(recorded.name, name) and recorded.name != name:
        return is_called
    if found.order is None:
        return False
    is_part = is_inside(name, recorded.name)
    if layer.endswith(INPUT):
        return not is_part and found.order < (recorded.order or 0)
    return is_part or found.order < (recorded.order or 0)
