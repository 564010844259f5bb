"""The term of two networks with padding, and the same by hand from the tokens that are no padding."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from forwards.masked import Situation
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

GRID = 4


def networks(situation: Situation) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return situation.build(8).eval(), situation.build(12).eval()


def term(student: nn.Module, teacher: nn.Module, situation: Situation) -> float:
    pair = LayerPair(situation.layer, situation.layer, **situation.options)
    transfer = RepresentationTransfer(teacher, [pair], weight=1.0, plan="uniform", grid=GRID)
    with transfer.attached(student):
        student(*situation.args, **situation.kwargs)
        return float(transfer.loss().detach())


def by_hand(student: nn.Module, teacher: nn.Module, situation: Situation) -> float:
    """The mean of 1 - r over all pairs of neurons, which is what a uniform plan gives."""
    rows = [_neurons(net, situation) for net in (student, teacher)]
    correlation = torch.corrcoef(torch.cat(rows))[: len(rows[0]), len(rows[0]) :]
    return float((1 - correlation).mean())


def _neurons(net: nn.Module, situation: Situation) -> Tensor:
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = net.get_submodule(situation.layer).register_forward_hook(keep)
    net(*situation.args, **situation.kwargs)
    handle.remove()
    [tokens] = kept
    tokens = tokens.detach().double().movedim(situation.neuron_axis, -1)
    tokens = tokens.transpose(0, 1) if situation.batch_axis else tokens
    valid = situation.valid
    if valid is not None:
        tokens = tokens[:, -valid.shape[1] :]
    samples = [x if valid is None else x[valid[i]] for i, x in enumerate(tokens)]
    segments = min(GRID**2, tokens.shape[1])
    return torch.cat([nn.functional.adaptive_avg_pool1d(x.T[None], segments)[0] for x in samples], 1)


def check_term(situation: Situation) -> None:
    """The term is that by hand, and warns of what the situation says alone: all other warnings are errors."""
    student, teacher = networks(situation)
    expected = by_hand(student, teacher, situation)
    with pytest.warns(UserWarning, match=situation.warning) if situation.warning else nullcontext():
        found = term(student, teacher, situation)
    assert found == pytest.approx(expected, rel=1e-4)


def run(student: nn.Module, teacher: nn.Module, *batches: tuple[Any, ...], **options: Any) -> list[float]:
    layer = options.pop("layer", "mix")
    transfer = RepresentationTransfer(teacher, [LayerPair(layer, layer, **options)], weight=1.0, plan="uniform")
    values = []
    with transfer.attached(student):
        for batch in batches:
            student(*batch)
            values.append(float(transfer.loss().detach()))
    return values
