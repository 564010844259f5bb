"""What kind of loss a task trains with, read from the autograd graph of its first value."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["kind_of_loss"]

#: Beginnings of the names of autograd's nodes. One of the first group decides, whatever else there is.
_KINDS = {
    "NllLoss": "classes",
    "LogSoftmax": "classes",
    "BinaryCrossEntropy": "labels",
    "MseLoss": "numbers",
    "SmoothL1Loss": "numbers",
    "HuberLoss": "numbers",
}
#: These are losses of a regression where they get a difference: an L1 loss has no node of its own.
_OF_DIFFERENCES = ("Abs", "Pow")


def kind_of_loss(loss: Tensor) -> str:
    """What the targets of a loss are.

    Returns:
        ``"classes"`` for cross-entropy, ``"labels"`` for binary cross-entropy, ``"numbers"`` for losses of a
        regression, also absolute and squared differences; ``""`` where the graph does not tell. A sum with a
        cross-entropy in it is one.

    Example:
        >>> import torch
        >>> from torch.nn import functional
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> kind_of_loss(functional.binary_cross_entropy_with_logits(logits, torch.ones(2, 3)))
        'labels'
        >>> kind_of_loss(functional.cross_entropy(logits, torch.tensor([0, 1])))
        'classes'
    """
    found: set[str] = set()
    known: set[Node] = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        kind = next((kind for name, kind in _KINDS.items() if node.name().startswith(name)), "")
        before = node.next_functions[0][0] if node.next_functions else None
        if node.name().startswith(_OF_DIFFERENCES) and before is not None and before.name().startswith("Sub"):
            kind = "numbers"
        if kind:
            found.add(kind)
        # Below a loss is the network, which may have losses of its own inside, such as those of routers.
        else:
            nodes += [following for following, _ in node.next_functions]
    return next((kind for kind in ("classes", "labels", "numbers") if kind in found), "")
