"""Times one version of the package; :mod:`benchmarks.versions` runs it in the checkout of each version.

It uses only what the checkouts to be compared have in common: ``benchmarks.problems``, ``benchmarks.rivals``,
``benchmarks.steps`` and ``benchmarks.timing``. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.problems import make_problem
from benchmarks.rivals import ours, tune_samples_loss
from benchmarks.steps import engine_step
from benchmarks.timing import Quartiles, rounds


def reset_after_checks(engine: Any) -> None:
    """Forget the plan, but not that the first call has checked its batch."""
    type(engine).reset(engine)
    engine.calls = 1


def measure(shape: tuple[int, int, int], cloud: str, cost: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of a term with its backward pass: cold solves, a warm solve, and calls between solves."""
    problem = make_problem(shape, cloud, cost)
    first, engine = ours(problem)

    def cold() -> tuple[torch.Tensor, torch.Tensor]:
        with patch.object(engine, "reset", lambda: reset_after_checks(engine)):
            return first()

    rival = tune_samples_loss(problem, debias=False)
    functions: dict[str, Callable[[], object]] = {
        "first call": first,
        "cold": cold,
        "SamplesLoss": rival.solve,
        "warm": engine_step(shape, cost, 0.0, solve=True),
        "between": engine_step(shape, cost, 0.0),
        "between, memory 0.98": engine_step(shape, cost, 0.98),
    }
    taken = rounds(functions, seconds=seconds, least=5)
    cold()
    states = engine.states if hasattr(engine, "states") else engine.pairs  # their name in older versions
    plan = states[0].plan
    assert plan is not None
    return {
        "milliseconds": {name: 1e3 * Quartiles.of(times).median for name, times in taken.items()},
        "marginal error": float((plan.matrix.sum(0) - 1 / shape[1]).abs().sum()),
        "value error": {"ours": problem.error(cold()[0]), "SamplesLoss": rival.error},
    }


def main() -> None:
    """Measure the cases given as JSON in the first argument."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # As in any training process, large blocks were freed before: the C library then keeps pages instead of unmapping.
    torch.zeros(31 * 2**20, dtype=torch.uint8)
    cases = json.loads(sys.argv[1])
    print(json.dumps([measure(tuple(shape), cloud, cost, seconds) for shape, cloud, cost, seconds in cases]))


if __name__ == "__main__":
    main()
