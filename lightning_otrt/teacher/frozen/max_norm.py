"""Embeddings with ``max_norm`` write to their weights in the forward: those of a teacher do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["WithoutWrites"]


class WithoutWrites:
    """Stands in for the forwards of the embeddings of a module that renormalise their weights in place.

    They return what they would have returned; the rows are renormalised in what they return. In training mode, and
    where their weights get gradients, it is the owner who trains the module: then they write as ever.

    Args:
        module: The module around them.

    Example:
        >>> net = nn.Sequential(nn.Embedding(3, 4, max_norm=1.0)).eval()
        >>> before, writes = net[0].weight.clone(), WithoutWrites(net)
        >>> writes.stop()
        >>> bool(net(torch.tensor([0, 1, 2])).norm(dim=1).max() <= 1), torch.equal(net[0].weight, before)
        (True, True)
        >>> writes.allow()
    """

    def __init__(self, module: nn.Module) -> None:
        forwards = nn.Embedding.forward, nn.EmbeddingBag.forward
        self._writing = [
            part
            for part in module.modules()
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag))
            and part.max_norm is not None
            and type(part).forward in forwards
        ]

    def stop(self) -> None:
        """Put the other forwards in their place. Cheap if they are."""
        for part in self._writing:
            if "forward" not in vars(part):
                object.__setattr__(part, "forward", _Rows(part) if isinstance(part, nn.Embedding) else _Bags(part))

    def allow(self) -> None:
        """Take them away."""
        for part in self._writing:
            if isinstance(vars(part).get("forward"), (_Rows, _Bags)):
                object.__delattr__(part, "forward")


class _Rows:
    def __init__(self, module: nn.Embedding) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        module = self.module
        if _is_trained(module):
            return nn.Embedding.forward(module, input)
        found = functional.embedding(input, module.weight, module.padding_idx).contiguous()
        rows = found.view(-1, found.shape[-1])
        assert module.max_norm is not None
        torch.embedding_renorm_(rows, torch.arange(len(rows), device=rows.device), module.max_norm, module.norm_type)
        return found


class _Bags:
    def __init__(self, module: nn.EmbeddingBag) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module if _is_trained(self.module) else _copy_of(self.module)
        return nn.EmbeddingBag.forward(module, *args, **kwargs)


def _is_trained(module: nn.Embedding | nn.EmbeddingBag) -> bool:
    """Whether this is a forward of the owner's training: a teacher runs in evaluation mode."""
    return module.training and torch.is_grad_enabled() and module.weight.requires_grad


def _copy_of(module: nn.EmbeddingBag) -> nn.EmbeddingBag:
    """The same module with weights of its own: each row of a bag is renormalised before their sum."""
    return nn.EmbeddingBag(
        module.num_embeddings,
        module.embedding_dim,
        max_norm=module.max_norm,
        norm_type=module.norm_type,
        mode=module.mode,
        include_last_offset=module.include_last_offset,
        padding_idx=module.padding_idx,
        _weight=module.weight.detach().clone(),
    )
