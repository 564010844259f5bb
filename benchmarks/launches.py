"""Kernels that one call of the term launches on a GPU: ``python -m benchmarks.launches [--before PATH]``.

They are counted on fake CUDA tensors, which need no GPU: each operation that writes memory of the device is one launch.
Views, and operations on no elements, are none. Counted is the forward of the term, which needs all but one kernel for
each pair: the backward pass multiplies a stored gradient. ``--before`` also counts a checkout of an older version.
Writes the page ``results/launches.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.transport.named_costs import get_cost

COSTS = ("correlation", "euclidean", "sqeuclidean")
MEMORIES = (0.0, 0.98)
PAIRS = (1, 5)
SHAPE = (128, 128, 512)
#: Few neurons, whose plans get more updates.
SMALL = (48, 64, 512)
#: Operations that only make room.
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """Counts the operations that write memory of a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run and count."""
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        is_view = any(part.alias_info is not None and not part.alias_info.is_write for part in func._schema.returns)
        outputs = [
            part for part in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(part, Tensor)
        ]
        writes = any(output.device.type == "cuda" and output.numel() for output in outputs)
        self.count += writes and not is_view and name not in ALLOCATIONS
        return found


def count(cost: str, memory: float, pairs: int, *, solve: bool, shape: tuple[int, int, int] = SHAPE) -> int:
    """Launches of a call with an earlier plan, for pairs of equal shape."""
    rows, columns, observations = shape
    names = [(f"student {index}", f"teacher {index}") for index in range(pairs)]
    every = 1 if solve else 10**9
    settings = TermSettings(get_cost(cost), memory=memory, solve_every=every)
    engine = TransportEngine(names, [1 / pairs] * pairs, settings)
    # A version to compare with may have it in another file.
    name = "entropic_coupling" if find_spec("lightning_otrt.steps.entropic_coupling") else "coupling"
    no_warnings = patch(f"lightning_otrt.steps.{name}.inspect_plan", lambda *arguments: ())
    # The checks of the first batch wait for the device, and so does a look at the first plan, which is not counted.
    more = patch(f"lightning_otrt.steps.{name}.EntropicCoupling._finished", lambda self, *given: given[-1], create=True)
    with FakeTensorMode(), patch.object(engine, "_inspect", lambda batches: None), no_warnings, more:
        view = [
            (
                torch.randn(rows, observations, device="cuda", requires_grad=True),
                torch.randn(columns, observations, device="cuda"),
            )
            for _ in range(pairs)
        ]
        # Two calls that solve; the number then is that of a call between early solves.
        for calls in (0, 1, 9):
            engine.calls = calls
            counter = Launches()
            with counter:
                engine.term([view], observations)
    return counter.count


def table() -> list[dict[str, Any]]:
    """Counts of calls between solves and with a solve, by pairs, cost and memory."""
    return [
        {
            "pairs": pairs,
            "cost": cost,
            "memory": memory,
            "between": count(cost, memory, pairs, solve=False),
            "solve": count(cost, memory, pairs, solve=True),
        }
        for pairs in PAIRS
        for cost in COSTS
        for memory in MEMORIES
    ]


def table_of(checkout: Path) -> list[dict[str, Any]]:
    """The same of another version, by this file."""
    code = f"{Path(__file__).read_text()}\n".replace(
        'if __name__ == "__main__":\n    main()', "print(json.dumps(table()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-"], input=code, cwd=checkout, env=environment, capture_output=True, text=True, check=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(rows: list[dict[str, Any]], before: list[dict[str, Any]] | None, command: str) -> str:
    """The page."""
    width, columns, observations = SHAPE
    small = count(COSTS[0], 0.0, 1, solve=True, shape=SMALL)
    lines = [
        "# Launches",
        "",
        f"`{command}`: kernels that one call of the term launches on a GPU, counted on fake CUDA tensors: operations "
        "that write memory of the device, views left out. A call between solves evaluates the plans in use; one with a "
        "solve starts them from the potentials of earlier ones. The backward pass adds one kernel for each pair, or "
        f"two. Pairs of {width} and {columns} neurons with {observations} observations; the counts do not depend on "
        "these numbers, but for layers whose widths multiply to at most 64 × 64. Their solves have 100 updates in "
        f"place of 20: {small} launches for one pair with {COSTS[0]} and no memory.",
        "",
        "These are the counts of calls that are not captured in a CUDA graph: the first two of each kind, those whose "
        "shapes are never the same again, and those of a global batch. A captured call of any number of pairs is one "
        "launch, with copies of its neurons before and of its gradients after it: [GPU](gpu.md).",
        "",
        "Before windows, stacks of pairs and fused operations were introduced (commit 6b801ba, by this file at commit "
        "798ed9d) one pair took 37 to 102 launches between solves and 212 to 318 with a solve, five pairs 173 to 498 "
        "and 461 to 991.",
        "",
        f"| pairs of equal shape | cost | memory | between solves{', before' if before else ''} |"
        + (" between solves, after |" if before else "")
        + f" with a solve{', before' if before else ''} |"
        + (" with a solve, after |" if before else ""),
        f"|{'---|' * (7 if before else 5)}",
    ]
    for place, row in enumerate(rows):
        cells = [row["pairs"], row["cost"], f"{row['memory']:g}"]
        for kind in ("between", "solve"):
            cells += [before[place][kind], row[kind]] if before else [row[kind]]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, and write the page."""
    from benchmarks.pages import write_page
    from benchmarks.versions import commit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the version to compare with")
    options = parser.parse_args()
    before = table_of(options.before.resolve()) if options.before else None
    command = f"python -m benchmarks.launches{f' --before {commit(options.before)}' if before else ''}"
    text = report(table(), before, command)
    print(text)
    write_page(text)


if __name__ == "__main__":
    main()
