"""The order of neurons follows the plan, and moves the wider side alone."""

from __future__ import annotations

import pytest
import torch

from lightning_otrt.analysis.neuron_order import matched_order
from lightning_otrt.transport.plans import random_plan


@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 48), (1, 5)])
def test_large_entries_come_to_the_diagonal(shape: tuple[int, int]) -> None:
    plan = random_plan(*shape, seed=0)
    rows, columns = matched_order(plan)
    assert rows.sort().values.tolist() == list(range(shape[0]))
    assert columns.sort().values.tolist() == list(range(shape[1]))
    row, column = torch.nonzero(plan[rows][:, columns] > 1e-3, as_tuple=True)
    assert ((row + 0.5) / shape[0] - (column + 0.5) / shape[1]).abs().max() < 1 / min(shape)


@pytest.mark.parametrize(("shape", "kept"), [((4, 8), 0), ((8, 4), 1), ((6, 6), 0)])
def test_the_narrower_side_keeps_its_order(shape: tuple[int, int], kept: int) -> None:
    orders = matched_order(random_plan(*shape, seed=0))
    assert orders[kept].tolist() == list(range(shape[kept]))
    assert orders[1 - kept].tolist() != list(range(shape[1 - kept]))
