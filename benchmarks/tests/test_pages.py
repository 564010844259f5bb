"""A page of results says what it measured, and says so where that has changed since."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.pages import RECORDS, RESULTS, check, main, mark, stale, write_page
from benchmarks.sources import ROOT, SOURCES, changed, code_hash, hashes

PAGE = "# Fixed views\n\nText.\n"
CODE = '''"""What it is."""


def half(x):
    """Half of it."""
    return f"{x / 2:{x}}"  # by two
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results with one page, whose code has changed since it was measured."""
    write_page(PAGE, tmp_path)
    records = json.loads((tmp_path / RECORDS).read_text())
    records["fixed_views"]["files"]["benchmarks/fixed_views.py"] = "other"
    (tmp_path / RECORDS).write_text(json.dumps(records))
    return tmp_path


def test_every_stale_page_says_so() -> None:
    """The pages of this checkout. The message says what to do."""
    assert not check(RESULTS)


def test_every_source_is_there() -> None:
    for page, paths in SOURCES.items():
        assert not [path for path in paths if not (ROOT / path).exists()], page
        assert hashes(page)


def test_a_page_is_named_after_its_title_and_stamped(tmp_path: Path) -> None:
    path = write_page(PAGE, tmp_path)
    assert path == tmp_path / "fixed_views.md"
    assert re.fullmatch(
        r"# Fixed views\n\nText\.\n\n\*Measured at commit \S+ on \S+; .*, torch .*\*\n", path.read_text()
    )
    assert not stale(tmp_path)
    assert not check(tmp_path)
    with pytest.raises(ValueError, match="starts with '# Title'"):
        write_page("## No title\n", tmp_path)
    with pytest.raises(ValueError, match="'new' has no sources. Add what it measures to SOURCES"):
        write_page("# New\n", tmp_path)


def test_a_page_that_is_older_than_its_code_has_to_say_so(folder: Path) -> None:
    assert stale(folder) == {"fixed_views": ["benchmarks/fixed_views.py"]}
    [problem] = check(folder)
    assert problem.startswith("fixed_views.md is older than `benchmarks/fixed_views.py`. Measure again, or run")
    for _ in range(2):
        mark(folder)
        last = (folder / "fixed_views.md").read_text().splitlines()[-2:]
        assert last[0].startswith("*Measured at commit")
        assert last[1] == ("*Stale: since then `benchmarks/fixed_views.py` changed; see `python -m benchmarks.pages`.*")
    assert not check(folder)


def test_measuring_again_takes_the_line_away(folder: Path) -> None:
    mark(folder)
    assert "Stale" not in write_page(PAGE, folder).read_text()
    assert not stale(folder)


def test_writing_a_page_from_old_rows_keeps_its_stamp(folder: Path) -> None:
    assert "Stale" in write_page(PAGE, folder, measured=False).read_text()
    assert stale(folder)


def test_a_page_without_a_record(folder: Path) -> None:
    (folder / "by_hand.md").write_text("# By hand\n")
    assert "by_hand.md has no record in sources.json: write it with `write_page`." in check(folder)
    (folder / "fixed_views.md").write_text("# Fixed views\n")
    with pytest.raises(ValueError, match="does not end with its stamp"):
        mark(folder)


def test_files_that_are_new_or_gone_are_changes() -> None:
    recorded = hashes("speed")
    gone = recorded.pop("benchmarks/speed.py")
    assert changed("speed", {**recorded, "benchmarks/quick.py": gone}) == ["benchmarks/quick.py", "benchmarks/speed.py"]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("  # by two", "", True),
        ("Half of it.", "One of two equal parts.", True),
        ('    """Half of it."""\n', "", True),
        ("What it is.", "", True),
        ("return f", "return  f", True),
        ("x / 2", "x / 3", False),
        ("half", "third", False),
        ("{x / 2", "a{x / 2", False),
    ],
)
def test_comments_and_docstrings_change_no_hash(old: str, new: str, same: bool) -> None:
    assert old in CODE
    assert (code_hash(CODE.replace(old, new)) == code_hash(CODE)) == same


def test_a_hash_is_that_of_any_version_of_python() -> None:
    """Trees differ from version to version in what is empty."""
    assert code_hash(CODE) == "55066fc9e3b1"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0
    assert capsys.readouterr().out == "All pages are up to date, or say that they are not.\n"
