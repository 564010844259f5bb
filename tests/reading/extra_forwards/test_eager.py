"""Compiled code is switched off for as long as anybody needs plain Python, and on again afterwards."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import Net, make_teacher, seeded
from torch import nn

from lightning_otrt import RepresentationTransfer
from lightning_otrt.reading.extra_forwards.eager import EagerCode


def runs_compiled() -> bool:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + len(graphs) + 1, backend=backend)(torch.ones(2))
    return bool(graphs)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_in_any_order(order: tuple[int, int]) -> None:
    torch.compiler.reset()
    assert runs_compiled()
    holders = [EagerCode(), EagerCode()]
    for holder in holders:
        holder.hold()
        holder.hold()
    assert not runs_compiled()
    holders[order[0]].release()
    holders[order[0]].release()
    assert not runs_compiled()
    holders[order[1]].release()
    assert runs_compiled()
    torch.compiler.reset()


def test_two_transfers_that_record_at_once() -> None:
    """The one that begins first also ends first."""
    torch.compiler.reset()
    assert runs_compiled()
    student: nn.Module = seeded(0, Net)
    transfers = [RepresentationTransfer(make_teacher(), layers) for layers in ("blocks", "penultimate")]
    images = seeded(1, torch.randn, 8, 1, 8, 8)
    for transfer in transfers:
        transfer.attach(student)
    blocks = [transfer.recording() for transfer in transfers]
    for block in blocks:
        block.__enter__()
    student(images)
    for transfer, block in zip(transfers, blocks, strict=True):
        transfer.loss()
        block.__exit__(None, None, None)
        transfer.detach()
    assert runs_compiled()
    torch.compiler.reset()


def test_copies_hold_nothing() -> None:

    before, original = EagerCode._holders, EagerCode()
    original.hold()
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        copied.release()
        assert EagerCode._holders == before + 1
    original.release()
    assert EagerCode._holders == before
