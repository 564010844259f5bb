"""What a call of the engine costs: operations, products of matrices, memory, waits for the device."""

from __future__ import annotations

import pytest
import torch
from engines import COSTS, call, draw, make
from operations import operations, peak_floats
from packaging.version import Version


@pytest.mark.parametrize(("cost", "memory", "between", "solving"), [
    ("correlation", 0.0, 1, 2),
    ("sqeuclidean", 0.0, 1, 2),
    ("euclidean", 0.0, 2, 2),
    ("correlation", 0.9, 2, 2),
    ("sqeuclidean", 0.9, 2, 2),
    ("euclidean", 0.9, 3, 3),
])  # fmt: skip
def test_number_of_matrix_products(cost: str, memory: float, between: int, solving: int) -> None:
    engine, pair = make(cost, memory=memory), draw()
    call(engine, pair)
    solves = operations(lambda: call(engine, pair).backward())
    engine.calls = 11
    reuses = operations(lambda: call(engine, pair).backward())
    assert reuses.products == between
    # The correlation takes the rank-one terms of its means, of width 3, for no product here.
    assert solves.products == solving


@pytest.mark.parametrize(("cost", "limit"), [("correlation", 60), ("sqeuclidean", 60), ("euclidean", 70)])
def test_operations_of_a_call_between_solves(cost: str, limit: int) -> None:
    engine, pair = make(cost), draw()
    call(engine, pair)
    engine.calls = 11
    # Reductions and copies of older versions are made of more of them.
    slack = 0 if Version(torch.__version__) >= Version("2.9") else 5
    assert sum(operations(lambda: call(engine, pair).backward()).counts.values()) <= limit + slack


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_peak_memory(cost: str, memory: float) -> None:
    # Few observations, so that what is allowed for vectors and neurons cannot hide a matrix.
    rows, columns, observations = 768, 640, 4
    engine, pair = make(cost, memory=memory), draw(rows, columns, observations)
    call(engine, pair).backward()
    matrix, rest = rows * columns, 12 * (rows + columns) * observations
    assert rest < 0.2 * matrix
    solving = peak_floats(lambda: call(engine, pair).backward())
    assert solving <= 3 * matrix + rest
    engine.calls = 11
    assert peak_floats(lambda: call(engine, pair).backward()) <= 1 * matrix + rest


def test_no_graph_over_a_cost_matrix_is_kept() -> None:
    engine, (y, x) = make(), draw(64, 48, 16)
    loss = call(engine, (y, x))
    saved = [tensor.numel() for tensor in loss.grad_fn.saved_tensors]
    assert max(saved) == y.numel() < 64 * 48
