"""The page ``results/gpu.md`` from what :mod:`benchmarks.gpu` measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.pages import write_page

__all__ = ["page", "write"]

_INTRODUCTION = """\
Times of calls are medians in milliseconds, by CUDA events. The GPU waits for its host here: most of a time below is
that of the host, which launches kernels one by one. So steps are captured in CUDA graphs, after two calls of their
kind. `transfer.cuda_graphs = False` switches that off."""
#: Whether a call solves, and whether it is replayed from a graph.
_KINDS = ((False, False), (False, True), (True, False), (True, True))
_HEADS = ("between solves", "the same, graph", "with a solve", "the same, graph")


def page(results: Mapping[str, Any]) -> str:
    """The Markdown."""
    checks, counts = results["checks"], results["counts"]
    passed, waiting = sum(row["passed"] for row in checks), sum(bool(row["waits"]) for row in counts)
    lines = [
        "# GPU",
        "",
        f"`{results['command']}` on one {results['device']}. {passed} of {len(checks)} checks of values, gradients and "
        f"plans against float64 on the CPU pass; {waiting} of {len(counts)} kinds of call wait for the device.",
        "",
        _INTRODUCTION,
        "",
        "## A training step",
        "",
        "ResNet-50 to ResNet-50, bfloat16 autocast, batch 64, 224 × 224, five pairs, a solve in each tenth step. The "
        "task is the forward of the teacher, and forward, backward and update of the student. The goal was 3 % for "
        "the term alone.",
        "",
        *_table(
            ("", "task, ms", "with the term, over the task", "the term alone, of the task"),
            (_step(name, results[key]) for name, key in (("graphs", "step"), ("no graphs", "step, no graphs"))),
        ),
        "",
        "Fits of a Trainer with the same networks, on 2,048 images from memory: milliseconds of a step. Those with "
        "the callback have the teacher's forward in them; the first epoch has the trace, the early solves and "
        "the captures.",
        "",
        *_table(
            ("fit", "first epoch", "fastest of two later epochs"),
            (
                (name, f"{fit['first epoch']:.0f}", f"{fit['later epochs']:.0f}")
                for name, fit in results["fit, ms a step"].items()
            ),
        ),
        "",
        "## Launches of a call",
        "",
        "One pair, forward and backward; a graph is one launch.",
        "",
        *_table(
            ("cost", "memory", *_HEADS),
            (
                (cost, f"{memory:g}", *(_launches(counts, cost, memory, kind) for kind in _KINDS))
                for cost, memory in dict.fromkeys((row["cost"], row["memory"]) for row in counts)
            ),
        ),
        "",
        "## Time of a call",
        "",
        "One pair of N and M neurons with n observations, forward and backward, beside one matrix product of the sizes "
        "of plan and teacher, in ms.",
        "",
        *_table(
            ("N × M × n", "cost", "product", *_HEADS),
            (
                _times(row, cost)
                for row in results["solve, ms"]
                for cost in dict.fromkeys(count["cost"] for count in counts)
            ),
        ),
        "",
        "## Cold solves beside GeomLoss' loss",
        "",
        "`SamplesLoss(debias=False)` and a cold solve of ours, both tuned to a value within 1 % of the exact one. Ours "
        "is not faster on this device: both wait for their launches. A run has one cold solve of each pair.",
        "",
        *_table(
            ("N × M × n", "neurons", "cost", "ours, ms", "SamplesLoss, ms"),
            (_cold(row) for row in results["SamplesLoss, ms"]),
        ),
    ]
    return "\n".join(lines)


def write(results: Mapping[str, Any]) -> None:
    """Write the page, under the commit and the machine of its numbers."""
    print(f"Report: {write_page(page(results), where=results['where'])}")


def _step(name: str, step: Mapping[str, Any]) -> tuple[str, ...]:
    added, alone = step["overhead, %"][1], step["term alone, %"]
    return name, f"{step['milliseconds']:.0f}", f"+{added:.0f} %", f"{alone:.0f} %"


def _launches(rows: Iterable[Mapping[str, Any]], cost: str, memory: float, kind: tuple[bool, bool]) -> str:
    wanted = (cost, memory, *kind)
    [found] = (row for row in rows if (row["cost"], row["memory"], row["solve"], row["graphs"]) == wanted)
    return str(found["launches"])


def _times(row: Mapping[str, Any], cost: str) -> tuple[str, ...]:
    kinds = [("solving" if solve else "between", "graphs" if graph else "no graphs") for solve, graph in _KINDS]
    names = ["product", *(f"{cost}, {what}, {how}" for what, how in kinds)]
    return _shape(row["shape"]), cost, *(f"{row[name][1]:.2f}" for name in names)


def _cold(row: Mapping[str, Any]) -> tuple[str, ...]:
    times = (row[name]["milliseconds"][1] for name in ("lightning_otrt", "SamplesLoss(debias=False)"))
    return _shape(row["shape"]), row["cloud"], row["cost"], *(f"{time:.1f}" for time in times)


def _shape(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
