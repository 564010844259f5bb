"""Which parameters get a gradient from recorded tensors, as the autograd graph of a training forward shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.student_root.reach import layers_of_parameters

__all__ = ["describe_unreached", "have_shared_leaves", "leaves_of"]


def leaves_of(tensors: Iterable[Tensor]) -> tuple[set[Tensor], bool]:
    """The tensors in which a backward pass accumulates gradients.

    Args:
        tensors: Where the pass starts.

    Returns:
        The leaves, and whether these are all. They may not be where an ``autograd.Function`` of others, such as that of
        a checkpoint, computes gradients by itself.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, requires_grad=True)
        >>> leaves_of([2 * weight]) == ({weight}, True)
        True
    """
    found: set[Tensor] = set()
    is_all = True
    nodes, known = [tensor.grad_fn for tensor in tensors], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        is_all = is_all and not isinstance(node, BackwardCFunction)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found, is_all


def have_shared_leaves(loss: Tensor, tensors: Iterable[Tensor]) -> bool:
    """Whether a loss may train what these tensors train: False only if it is known that it does not.

    Example:
        >>> import torch
        >>> one, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> have_shared_leaves(one.sum(), [2 * one]), have_shared_leaves(other.sum(), [2 * one])
        (True, False)
    """
    (own, is_all_of_loss), (others, is_all) = leaves_of([loss]), leaves_of(tensors)
    is_known = is_all_of_loss and is_all and bool(own) and bool(others)
    return not is_known or not own.isdisjoint(others)


def describe_unreached(student: nn.Module, trace: Trace, pairs: Sequence[LayerPair], tensors: Iterable[Tensor]) -> str:
    """What to say where trained parameters lie before the recorded layers and get no gradient from them.

    They belong to another tower, or lie behind a ``detach``. Empty where all get one, or it is not known.

    Args:
        student: The student.
        trace: Its traced forward.
        pairs: The resolved pairs.
        tensors: What was recorded of its layers in a training forward.
    """
    reached, is_all = leaves_of(tensors)
    found = layers_of_parameters(student, trace, pairs)
    before = {parameter for _, parameter, is_before in found if is_before and parameter.requires_grad}
    others = [name for name, parameter in student.named_parameters() if parameter in before - reached]
    # A strategy that computes with parameters of its own, such as FSDP, shows none of these.
    if not is_all or not others or reached.isdisjoint(before):
        return ""
    count = sum(parameter in reached for parameter in before)
    named = ", ".join(map(repr, others[:8])) + (", ..." if len(others) > 8 else "")
    return (
        f"The transfer term trains {count} of the {len(before)} tensors before the recorded layers: in the first step "
        f"no gradient reaches {named}. They are in another branch than the recorded layers, such as another tower or "
        "head, behind a `detach`, or did not run. To train them, too, match layers that depend on them."
    )
