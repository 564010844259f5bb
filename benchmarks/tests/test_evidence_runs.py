"""Rows on disk: a killed benchmark continues and ends with the rows of one that was never killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.evidence.experiments import EXPERIMENTS
from benchmarks.evidence.runs import Results, Row, Run, complete

RUN = Run("3", "greek", "plain", 0.03, 1.0, 0.0, 0)
RUNS = [replace(RUN, seed=seed) for seed in range(6)]


def pretend(run: Run) -> Row:
    return {"accuracy": 50.0 + run.seed, "seconds": 0.0}


class Killed(BaseException):
    """As a signal does, it passes all handlers."""


def killed_at_three(run: Run) -> Row:
    if run.seed == 3:
        raise Killed
    return pretend(run)


def test_a_killed_benchmark_continues(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    complete(RUNS, Results(whole), pretend)
    with pytest.raises(Killed):
        complete(RUNS, Results(broken), killed_at_three)
    with broken.open("a") as file:
        file.write('{"setting": "3", "target": "gre')
    executed = []

    def continued(run: Run) -> Row:
        executed.append(run.seed)
        return pretend(run)

    complete(RUNS, Results(broken), continued)
    assert executed == [3, 4, 5]
    assert broken.read_text() == whole.read_text()


def test_nothing_is_run_twice(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl")
    complete([*RUNS, *RUNS], results, pretend)
    complete(RUNS, results, killed_at_three)
    assert len(results.path.read_text().splitlines()) == len(RUNS)


@pytest.mark.slow
def test_several_processes_find_the_same_rows(tmp_path: Path) -> None:
    one, two = Results(tmp_path / "one.jsonl"), Results(tmp_path / "two.jsonl")
    complete(RUNS, one, pretend)
    complete(RUNS, two, pretend, processes=2)
    assert one.rows == two.rows


def test_rows_name_what_differs_from_the_defaults(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl")
    run = replace(RUN, per_class=50, options=(("layers", ("later blocks", "penultimate")),))
    results.add(run, pretend(run))
    row = json.loads(results.path.read_text())
    assert row["per_class"] == 50
    assert "batch_size" not in row
    assert Run.of(row) == run
    assert run in Results(results.path)
    assert RUN not in Results(results.path)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_runs_of_experiments_survive_the_disk(name: str) -> None:
    experiment = EXPERIMENTS[name]
    choices = {method: replace(RUN, method=method) for method in experiment.tuned_methods()}
    runs = experiment.runs(choices)
    assert len(set(runs)) >= len(experiment.targets) * experiment.seeds
    for run in runs:
        assert Run.of(json.loads(run.key)) == run
        # Seeds and teachers that tune serve nothing else.
        assert run.seed < 1000
        assert run.teacher_seed < 100
        assert run.split == "test" or run.target == "lowercase"


def test_a_result_cannot_pass_for_a_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names of settings: \\['seed'\\]"):
        Results(tmp_path / "rows.jsonl").add(RUN, {"accuracy": 1.0, "seed": 4})
