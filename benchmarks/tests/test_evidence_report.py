"""Tables, goals and figures from rows with known answers; nothing is trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.evidence.default_plan import default_plan
from benchmarks.evidence.experiments import EXPERIMENTS, SEEDS
from benchmarks.evidence.goals import goals
from benchmarks.evidence.methods import DEFAULT, METHODS
from benchmarks.evidence.report import comparison_table, gather
from benchmarks.evidence.runs import Results, Run
from benchmarks.evidence.section import section
from benchmarks.evidence.tuning import SEEDS as TUNING_SEEDS
from benchmarks.evidence.tuning import tune

#: Points above 40 of each method; the others have 5.
GAINS = {"plain": 0.0, "fitnets-blocks": 20.0, DEFAULT: 32.0, "random": 25.0}


def pretend(run: Run) -> dict[str, object]:
    noise = (run.seed * 7 % 5) / 10
    weight = abs(run.weight - METHODS[run.method].weights[1]) / 1000 if METHODS[run.method].weights else 0.0
    found: dict[str, object] = {"accuracy": 40 + GAINS.get(run.method, 5.0) + noise - weight, "seconds": 1.0}
    if run.keep_plans:
        layer = {"value": 0.1, "off_identity": 0.25, "plan": [[0.75, 0.25], [0.25, 0.75]]}
        found["plans"] = {"1": {"blocks.0": layer}, "400": {"blocks.0": layer}}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(tmp_path_factory.mktemp("rows") / "evidence.jsonl")

    def complete(runs: list[Run], title: str) -> None:
        for run in runs:
            results.rows[run.key] = {**run.settings, **pretend(run)}

    for experiment in EXPERIMENTS.values():
        complete(experiment.runs(tune(experiment.tuning, experiment.tuned_methods(), results, complete)), "")
    return results


def test_tuning_takes_the_best_on_two_seeds(results: Results) -> None:
    tuning = EXPERIMENTS["main"].tuning
    assert tuning.choice(DEFAULT, results).weight == METHODS[DEFAULT].weights[1]
    assert not tuning.edge(DEFAULT, results)
    seeds = {row["seed"] for row in results.rows.values() if row.get("split") == "validation"}
    assert seeds >= set(TUNING_SEEDS)


def test_everything_is_reported(results: Results, tmp_path: Path) -> None:
    page = section(results, tmp_path / "results")
    for name, experiment in EXPERIMENTS.items():
        if not name.startswith("plans"):
            assert f"## {experiment.title}" in page
    assert "Not run yet" not in page
    figures = {f"evidence_{name}.png" for name in ("accuracy", "weight", "labels", "plans", "identity")}
    assert {path.name for path in (tmp_path / "results").iterdir()} == figures
    assert set(re.findall(r"\((\S+\.png)\)", page)) == figures
    # The default has 32 points, hints on blocks 20, in every seed.
    assert "| FitNets, blocks | 60.2 ± 0.1 | +12.0 ± 0.0 | < 0.001 |" in page
    assert "| **OT, blocks (default)** | **72.2 ± 0.1** | | |" in page


def test_goals_hold_where_they_do_and_fail_where_they_do_not(results: Results) -> None:
    reached = {goal.claim: goal for goal in goals(gather(results))}
    assert reached["Greek: the default is ahead of the best rival by ≥ 10 points"].holds
    assert "FitNets, blocks" in reached["Greek: the default is ahead of the best rival by ≥ 10 points"].measured
    worse = Results(results.path)
    worse.rows = {
        key: {**row, "accuracy": 50.0 + row["seed"] / 100} if row["method"] == DEFAULT and "split" not in row else row
        for key, row in results.rows.items()
    }
    failed = {goal.claim: goal for goal in goals(gather(worse))}
    assert not failed["Greek: the default is ahead of the best rival by ≥ 10 points"].holds
    assert not failed["Greek: the default beats plain and every rival, corrected p < 0.01"].holds
    assert not failed["Greek, setting 1: the default is not worse than any rival (corrected p < 0.05)"].holds
    claim = "Greek, a wider pair: the default beats {}, corrected p < 0.05"
    assert reached[claim.format("plain")].holds
    assert reached[claim.format("random fixed assignment")].holds
    assert not failed[claim.format("random fixed assignment")].holds
    recipe = "Greek, setting 1x: the paper's recipe beats identity matching, corrected p < 0.05"
    assert not reached[recipe].holds  # both are given the same points


def test_the_default_changes_where_a_rotation_is_ahead_alone(results: Results) -> None:
    found = default_plan(gather(results))
    assert "There it is ahead in 0 and behind in" in found[0]
    assert "the default stays transport" in found[0]
    assert any(
        line.startswith("| Greek, wider pair, alone | 45.") and "| -27.0 ± 0.0 | < 0.001 |" in line for line in found
    )
    worse = Results(results.path)
    worse.rows = {
        key: {**row, "accuracy": row["accuracy"] - 30.0} if row["method"] == DEFAULT else row
        for key, row in results.rows.items()
    }
    found = default_plan(gather(worse))
    assert "There it is ahead in 12 and behind in 0, so the default changes. With distillation it is" in found[0]


def test_what_was_not_run_is_said_and_left_out(results: Results, tmp_path: Path) -> None:
    partial = Results(results.path)
    main = EXPERIMENTS["main"]
    partial.rows = {
        key: row
        for key, row in results.rows.items()
        if row["setting"] == "3" and row["target"] in ("greek", "lowercase") and row["seed"] != SEEDS - 1
    }
    page = section(partial, tmp_path / "results")
    assert f"## {main.title}" in page
    assert "9 paired seeds" in page
    assert "Cyrillic**" not in page
    missing = page.partition("## Not run yet")[2]
    assert "`digits`" in missing
    assert "`main`" not in missing


def test_a_method_without_tuning_is_left_out_of_its_tables_alone(results: Results) -> None:
    partial = Results(results.path)
    partial.rows = {key: row for key, row in results.rows.items() if row["method"] != "crd"}
    some = {"main": EXPERIMENTS["main"]}
    before, after = (comparison_table(gather(rows, some)["main"], "greek", 10) for rows in (results, partial))
    assert any(line.startswith("| CRD |") for line in before)
    assert not any(line.startswith("| CRD |") for line in after)
    assert len(after) == len(before) - 1
