"""Gradients of the task and of the term, by backward passes of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import RepresentationTransfer

#: Pairs of the network alone, without the LightningModule around it.
NET_LAYERS = {"block1": "block1", "block2": "block2"}


def norms_by_hand(student: nn.Module, transfer: RepresentationTransfer, batch: list[Tensor]) -> list[list[float]]:
    """Norms of the gradients of task and term at each layer, in this order."""
    outputs: dict[str, Any] = {}
    handles = [
        student.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
        for name in NET_LAYERS
    ]
    with transfer.attached(student):
        task = F.cross_entropy(student(batch[0]), batch[1])
        term = transfer.loss()
    for handle in handles:
        handle.remove()
    kept = list(outputs.values())
    task_grads = torch.autograd.grad(task, kept, retain_graph=True)
    term_grads = torch.autograd.grad(term, kept)
    return [[grad.norm().item() for grad in grads] for grads in (task_grads, term_grads)]
