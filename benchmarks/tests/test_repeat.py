"""Repeated runs: what is drawn does not depend on results, and the page counts what changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import repeat
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.runs import Results, Row, Run, complete

RUN = Run("3", "greek", "ot-blocks", 0.03, 1.0, 8.0, 0)


def rows(accuracies: Mapping[Run, float]) -> list[Row]:
    return [{**run.settings, "accuracy": accuracy} for run, accuracy in accuracies.items()]


def group(accuracies: Mapping[Run, float], *others: Row) -> repeat.Group:
    return repeat.Group("letters", METHODS, [*rows(accuracies), *others], lambda run: {"accuracy": 50.5})


def test_the_draw_does_not_depend_on_results_and_a_larger_one_begins_with_a_smaller() -> None:
    runs = [replace(RUN, seed=seed) for seed in range(20)]
    low, high = group(dict.fromkeys(runs, 1.0)), group(dict.fromkeys(runs, 99.0))
    assert list(low.draw(20, 0)) == list(high.draw(20, 0))
    assert list(low.draw(5, 0)) == list(low.draw(20, 0))[:5]
    assert list(low.draw(20, 0)) != list(low.draw(20, 1))


def test_runs_without_this_library_of_validation_or_of_a_gpu_are_not_drawn() -> None:
    plain, validation = replace(RUN, method="plain"), replace(RUN, split="validation")
    on_gpu = {**replace(RUN, seed=1).settings, "accuracy": 1.0, "device": "a card"}
    alone = replace(RUN, method="kd")
    assert group({RUN: 50.0, plain: 50.0, alone: 50.0, validation: 50.0}, on_gpu).draw(9, 0) == {RUN: 50.0}


def test_changes_are_signed_and_split_by_control(tmp_path: Path) -> None:
    stored = {replace(RUN, seed=seed, method=method): 50.0 for seed in range(3) for method in ("ot-blocks", "random")}
    now = Results(tmp_path / "now.jsonl")
    complete(stored, now, lambda run: {"accuracy": 50.0 if run.method == "random" else 51.0 + run.seed})
    found = group(stored)
    page = repeat.section([(found, repeat.changes(stored, now))])
    assert "| **letters** | 6 | 3 | +1.00 ± 1.33 | 3.0 |" in page
    assert "| solved plans | 3 | 0 | +2.00 ± 2.48 | 3.0 |" in page
    assert "| controls | 3 | 3 | +0.00 ± 0.00 | 0.0 |" in page
    assert "| **letters** | 0 | | | |" in repeat.section([(found, {})])


def test_the_command_runs_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "groups", lambda: [group({replace(RUN, seed=seed): 50.0 for seed in range(4)})] * 2)
    repeat.main(["--count", "4", "--folder", str(tmp_path)])
    assert len((tmp_path / repeat.REPEATED).read_text().splitlines()) == 4
    repeat.main(["--report", "--count", "2", "--folder", str(tmp_path)])
    assert "| **letters** | 1 | 0 | +0.50 | 0.5 |" in (tmp_path / "repeated_runs.md").read_text()
    repeat.main(["--count", "4", "--folder", str(tmp_path)])
    assert "| **letters** | 2 | 0 | +0.50 ± 0.00 | 0.5 |" in (tmp_path / "repeated_runs.md").read_text()


def test_the_stored_tables_have_runs_to_draw() -> None:
    for found in repeat.groups():
        assert len(found.draw(60, 0)) == 60
