"""The page of real checkpoints from rows with known answers; nothing is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.evidence.report import gather
from benchmarks.evidence.runs import Results, Run
from benchmarks.evidence.statistics import compare, family
from benchmarks.evidence.tuning import tune
from benchmarks.real.cells import CELLS, label
from benchmarks.real.comparisons import RECIPE, accuracies, comparisons_of, goals
from benchmarks.real.methods import CONTROLS, METHODS
from benchmarks.real.page import page
from benchmarks.real.step_times import STEPS, TIMES, timed_runs

NAME = "emoji-5-resnet10"
#: Points above 30 of each method; the others have 2.
GAINS = {"plain": 0.0, "random": 5.5, "transport": 4.3, RECIPE: 9.0, CONTROLS[RECIPE]: 3.0, "frozen": 20.0, "cka": -1.0}


def pretend(run: Run) -> dict[str, object]:
    gain = GAINS.get(run.method, 2.0)
    noise = (run.seed * 7 % 5) / 10 + (run.seed * len(run.method) % 3) / 20
    found = {"accuracy": 30 + gain + noise - run.lr, "seconds": 36.0, "layers": ["a -> b"]}
    return found if METHODS[run.method].freeze else {**found, "step_ms": 50 + gain}


def filled(path: Path, *, seeds: int = 5) -> Results:
    results, cell = Results(path), CELLS[NAME]

    def complete(runs: list[Run], title: str) -> None:
        for run in runs:
            if run.seed < seeds or run.seed >= 1000:
                results.rows[run.key] = {**run.settings, **pretend(run)}

    complete(cell.runs(tune(cell.tuning, list(cell.methods), results, complete)), "")
    return results


def write(folder: Path, results: Results) -> str:
    return page({name: results if name == NAME else Results(folder / name) for name in CELLS}, CELLS, folder)


def test_every_method_is_reported_those_that_lost_too(tmp_path: Path) -> None:
    text = write(tmp_path, filled(tmp_path / "rows.jsonl"))
    for name in CELLS[NAME].methods:
        assert f"| {label(name)} |" in text or f"| **{label(name)}** |" in text
    assert f"| **{label(RECIPE)}** | **39." in text
    lost = next(line for line in text.splitlines() if line.startswith(f"| {label('transport')} |"))
    assert lost.split(" | ")[2].startswith("+4.")
    assert lost.split(" | ")[4].startswith("-1.")
    assert lost.endswith("| 54 |")
    assert "Layers: `a -> b`" in text
    # The last cell of the plan, and nothing of the one that is complete.
    missing = text.partition("## Cells not tuned, or not complete")[2]
    assert list(CELLS)[-1] in missing
    assert NAME not in missing
    assert f"{14 * (12 + 2 + 5) - 6} runs, {(14 * 19 - 6) * 36 / 3600:.1f} hours" in text


def test_runs_of_an_earlier_plan_are_counted(tmp_path: Path) -> None:
    results = filled(tmp_path / "rows.jsonl")
    assert "of an earlier plan" not in write(tmp_path, results)
    cell = CELLS[NAME]
    run = replace(cell.run("plain", cell.tuning.runs("plain", 1000)[0], "emoji", 5, 0), steps=7)
    results.rows[run.key] = {**run.settings, **pretend(run)}
    assert "1 more runs, of an earlier plan" in write(tmp_path, results)


def test_tests_of_a_table_are_one_family(tmp_path: Path) -> None:
    found = gather(filled(tmp_path / "rows.jsonl"), {NAME: CELLS[NAME]})[NAME]
    tests = comparisons_of(accuracies(found))
    assert len(tests) == len(CELLS[NAME].methods) - 1 + len(CONTROLS)  # all but plain itself
    for one in tests.values():
        assert one.p <= one.corrected <= min(1.0, len(tests) * one.p)
    claims = {goal.claim.rpartition(": ")[2]: goal.holds for goal in goals(found, tests)}
    assert list(claims.values()) == [True, True, True]


def test_a_family_corrects_as_comparisons_with_one_method_do() -> None:
    one, others = {0: 3.0, 1: 4.0, 2: 6.0}, {"a": {0: 1.0, 1: 2.5, 2: 3.0}, "b": {0: 3.0, 1: 3.5, 2: 7.0}}
    together = family({name: (one, other) for name, other in others.items()})
    assert together == compare(one, others)
    assert family({"nothing in common": ({0: 1.0}, {1: 1.0})}) == {}


@pytest.mark.parametrize("seeds", [0, 2])
def test_what_is_missing_is_named(tmp_path: Path, seeds: int) -> None:
    text = write(tmp_path, filled(tmp_path / "rows.jsonl", seeds=seeds))
    missing = text.partition("## Cells not tuned, or not complete")[2]
    assert f"`{NAME}`" in missing
    assert (f"missing seeds of {label('plain')} 3" in missing) == (seeds == 2)
    assert "## Goals on real checkpoints" not in text, "with all seeds alone"


def test_a_cell_that_ran_on_a_gpu(tmp_path: Path) -> None:
    """It names the device. Its steps cost what those of the same networks cost on a CPU, where that was measured."""
    on_cpu, other = filled(tmp_path / "rows.jsonl"), "emoji-20-resnet10"
    on_gpu = Results(tmp_path / "other.jsonl")
    changes = {"per_class": 20}
    for row in on_cpu.rows.values():
        run = Run.of(row)
        steps = 400 if run.split == "test" else 200
        run = replace(run, steps=steps, **changes)
        found = {name: row[name] for name in ("accuracy", "seconds", "layers")}
        on_gpu.rows[run.key] = {**run.settings, **found, "device": "A card, torch 9.9"}
    results = {name: Results(tmp_path / name) for name in CELLS} | {other: on_gpu}
    for measured in (False, True):
        text = page(results | ({NAME: on_cpu} if measured else {}), CELLS, tmp_path)
        cell = text.partition(f"## {CELLS[other].title}")[2].partition("\n## ")[0]
        assert f"`python -m benchmarks.real --cells {other} --device cuda` (A card, torch 9.9)" in cell
        line = next(line for line in cell.splitlines() if line.startswith(f"| {label('transport')} |"))
        assert line.endswith("| 54 |" if measured else "|  |")
    # Where no cell ran on a CPU, short runs of their own say what a step costs.
    times = Results(tmp_path / TIMES)
    for run in timed_runs(CELLS[other]):
        times.add(run, {"accuracy": 1.0, "seconds": 1.0, "step_ms": 77.0})
    cell = page(results, CELLS, tmp_path).partition(f"## {CELLS[other].title}")[2].partition("\n## ")[0]
    lines = [line for line in cell.splitlines() if line.startswith("| ") and "±" in line]
    assert [line.endswith("| 77 |") for line in lines] == [not METHODS[name].freeze for name in CELLS[other].methods]
    assert {run.steps for run in timed_runs(CELLS[other])} == {STEPS}
