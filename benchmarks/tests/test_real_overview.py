"""The table with one row for each cell, and the pages that show it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.evidence.report import gather
from benchmarks.real.cells import CELLS
from benchmarks.real.comparisons import RECIPE, accuracies, comparisons_of
from benchmarks.real.methods import CONTROLS
from benchmarks.real.overview import counts, overview
from benchmarks.sources import ROOT
from benchmarks.tests.test_real_page import GAINS, NAME, filled

REAL_PAGE, RESULTS, README = "benchmarks/results/real_checkpoints.md", "benchmarks/RESULTS.md", "README.md"


def columns(lines: list[str]) -> dict[str, str]:
    """What the only row of a table says, by the titles."""
    titles, _, row = (line.strip("| ").split(" | ") for line in lines)
    return dict(zip(titles, row, strict=True))


@pytest.mark.parametrize("wins", [True, False])
def test_a_row_says_who_is_best_and_by_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wins: bool) -> None:
    if not wins:
        monkeypatch.setitem(GAINS, "cka", 12.0)
    found = gather(filled(tmp_path / "rows.jsonl"), {NAME: CELLS[NAME]})[NAME]
    tests = comparisons_of(accuracies(found))
    row = columns(overview({NAME: found}, {NAME: tests}))
    assert (row["networks"], row["data, labels a class"]) == ("Lite0 → ResNet-10", "emoji, 5")
    assert row["frozen teacher"].startswith("50.")  # the best of all, and no student
    assert [name for name, text in row.items() if "**" in text] == ["recipe" if wins else "CKA"]
    assert row["default over a random assignment"].startswith("-1.")
    for title, other in (("recipe over plain", "plain"), ("recipe over its control", CONTROLS[RECIPE])):
        assert float(row[title].partition(" ± ")[0]) == pytest.approx(9 - GAINS[other], abs=0.2)
        assert row[title].endswith(f"(p {tests[RECIPE, other].corrected:.3f})".replace("(p 0.000)", "(p < 0.001)"))
    # Without CKA the best other student is a control, which has no column.
    assert row["recipe to the best other student"].endswith(", random assignment" if wins else ", CKA")
    assert f"or level with it, in {int(wins)} of 1;" in counts({NAME: found}, {NAME: tests})


def numbers(sentence: str) -> list[int]:
    """Those of the sentence that counts cells."""
    return [int(number) for number in re.findall(r"\d+", sentence.partition("level with it, ")[2])]


def test_results_show_the_rows_of_the_page() -> None:
    """Written there with more words around them; the command of the page changes only the page."""
    page = (ROOT / REAL_PAGE).read_text().partition("## All cells")[2].partition("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) >= 25
    results = (ROOT / RESULTS).read_text().splitlines()
    assert [row for row in rows if row not in results] == []


def test_readers_are_told_the_counts_of_the_page() -> None:
    lines = (ROOT / REAL_PAGE).read_text().splitlines()
    sentences = [line for line in lines if "The recipe is the best student, or" in line]
    level, cells, plain, control = (sum(column) for column in zip(*map(numbers, sentences), strict=True))
    results, readme = ((ROOT / page).read_text() for page in (RESULTS, README))
    said = f"{level} of {cells}"
    assert f"in {said} rows. It is certainly ahead of plain training in {plain}, and of its control in {control}." in (
        results
    )
    assert f"in {said} settings with real checkpoints" in readme
