"""Tasks that take over what another cell has tuned, from rows with known answers; nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evidence.runs import Results, Run
from benchmarks.evidence.tuning import tune
from benchmarks.real import __main__ as command
from benchmarks.real.cells import CELLS, CellTuning, quick
from benchmarks.real.confirmations import CONFIRMATIONS, METHODS, TakenOver
from benchmarks.real.page import page


def found(run: Run) -> dict[str, object]:
    """Small learning rates are best."""
    return {"accuracy": 50 - 1000 * run.lr + run.seed % 10 / 100, "seconds": 1.0, "layers": ["a -> b"]}


def tuned(folder: Path, name: str) -> Results:
    results = Results(folder / f"{name}.jsonl")

    def complete(runs: list[Run], title: str) -> None:
        for run in runs:
            if run not in results:
                results.add(run, found(run))

    methods = [method for method in CELLS[name].methods if method in METHODS]
    tune(CELLS[name].tuning, methods, results, complete)
    return results


@pytest.mark.parametrize("name", CONFIRMATIONS)
def test_choices_are_those_of_the_other_cell(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CONFIRMATIONS[name]
    assert isinstance(cell.tuning, TakenOver)
    theirs = CELLS[cell.tuning.cell]
    rows = tuned(tmp_path, cell.tuning.cell)
    done: list[Run] = []

    def execute(run: Run, device: str) -> dict[str, object]:
        done.append(run)
        return found(run)

    monkeypatch.setattr(command, "execute", execute)
    command.run(name, cell, Results(tmp_path / f"{name}.jsonl"), seeds=cell.seeds)
    # Nothing is tuned: each run is a test with the choice of the other cell, on other data or with other networks.
    assert len(done) == cell.seeds * len(cell.methods)
    assert ("l2-sp" in cell.methods) is (theirs.tuning.setting == "copied")
    for run in done:
        choice = theirs.tuning.choice(run.method, rows)
        assert (run.lr, run.weight_decay, run.weight) == (choice.lr, choice.weight_decay, choice.weight)
        assert (run.split, run.setting, run.steps) == ("test", theirs.tuning.setting, cell.changes["steps"])
        task = run.target, run.pair, run.per_class
        assert task == (cell.targets[0], cell.changes["pair"], cell.per_class[0])
        assert task != (theirs.targets[0], theirs.tuning.pair, theirs.per_class[0])
        if run.per_class == theirs.per_class[0]:
            assert run.steps == theirs.changes["steps"]
    results = {name: Results(tmp_path / f"{name}.jsonl"), cell.tuning.cell: rows}
    text = page({one: results.get(one, Results(tmp_path / one)) for one in command.ALL}, command.ALL, tmp_path)
    assert f"What tuning chose in `{cell.tuning.cell}`" in text
    assert cell.title in text.partition("where nothing was tuned")[2].partition("\n## ")[0]
    # A cell with more labels stands in for one that is planned: the page says so.
    instead = text.count(f"; it ran with the options of `{cell.tuning.cell}`, in `{name}`")
    assert instead == ("options of" in cell.title)


def test_without_the_other_cell() -> None:
    name = "digits-20-resnet10"
    with pytest.raises(ValueError, match="has not tuned .*--cells fashion-20-resnet10"):
        command.run(name, CONFIRMATIONS[name], Results(Path("nowhere") / f"{name}.jsonl"), seeds=1)


def test_a_quick_cell_takes_over_quick_choices() -> None:
    short = quick(CONFIRMATIONS["digits-20-resnet10"])
    assert isinstance(short.tuning, CellTuning)
    assert short.tuning.runs("plain", 1000) == quick(CELLS["fashion-20-resnet10"]).tuning.runs("plain", 1000)
