"""Tokens that a model has learned: those in front of the others, and how many rows its tables of them have."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["count_prefix_tokens", "learned_tokens"]

#: Parameters that stand for tokens in front of the others: cls_token, class_embedding, dist_token, register_tokens, ...
_PREFIX_TOKENS = re.compile(
    r"(cls|class|dist|distill|distillation|reg|registers?)(_?(tok|token|emb|embed|embedding|embeds)s?)?"
)


def count_prefix_tokens(model: nn.Module) -> int:
    """The number of tokens that stand in front of the others, as the names of parameters tell.

    Example:
        >>> import torch
        >>> model = nn.Module()
        >>> model.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        >>> count_prefix_tokens(model)
        1
    """
    named = [(name.rpartition(".")[2], parameter) for name, parameter in model.named_parameters()]
    found = (parameter for name, parameter in named if _PREFIX_TOKENS.fullmatch(name) and parameter.dim())
    return sum(parameter.numel() // max(parameter.shape[-1], 1) for parameter in found)


def learned_tokens(model: nn.Module) -> frozenset[int]:
    """Rows of embeddings, and of parameters ``(T, C)``, ``(1, T, C)`` or ``(T, 1, C)`` that are no weight or bias.

    Example:
        >>> learned_tokens(nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 4)))
        frozenset({100})
    """
    found: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            sizes = [size for size in parameter.shape[:-1] if size > 1]
            is_token = isinstance(module, nn.Embedding) or not name.endswith(("weight", "bias"))
            if is_token and parameter.dim() in (2, 3) and len(sizes) == 1:
                found.update(sizes)
    return frozenset(found)
