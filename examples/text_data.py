"""Labelled texts for the examples: a CSV file of the user's own, or one made from Debian's packages or SciPy."""

from __future__ import annotations

import ast
import csv
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import scipy
import torch
from torch.utils.data import Dataset, TensorDataset

from benchmarks.real.packages import descriptions
from examples.files import whole
from examples.image_data import drawn_per_class, split

#: Tokens of a text; what is longer is cut.
LENGTH = 48
SECTIONS = ("utils", "science", "net", "devel", "admin", "games", "x11", "sound", "text", "graphics", "web", "fonts")
#: At most so many texts of each class in the files that are made here.
COUNT = 400
PARTS_OF_SCIPY = ("integrate", "interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "spatial", "stats")


def default_csv(parent: Path) -> Path:
    """Writes descriptions of Debian's packages with their sections, or docstrings of SciPy with their subpackages."""
    made = [parent / "debian.csv", parent / "scipy.csv"]
    if found := [path for path in made if path.exists()]:
        return found[0]
    try:
        return _write(made[0], ((text, section) for section, text in descriptions() if section in SECTIONS))
    except FileNotFoundError as error:
        print(f"{error} The docstrings of SciPy stand in for them.")
        return _write(made[1], _docstrings())


def texts(path: Path, tokenizer: Any, *, per_class: int, seed: int) -> tuple[Dataset[Any], Dataset[Any], list[str]]:
    """Labelled texts for training, every fourth of each class for the test, and the names of the classes.

    Args:
        path: A CSV file with the columns ``text`` and ``label``.
        tokenizer: One of Hugging Face.
        per_class: Training texts of each class; 0 takes all.
        seed: Decides which are drawn.

    Returns:
        Data sets of token ids and masks ``(LENGTH,)`` with labels.

    Raises:
        SystemExit: If a column is missing, a row is torn, or a class has too few texts.
    """
    rows = _rows(path)
    classes = sorted({label for _, label in rows})
    labels = torch.tensor([classes.index(label) for _, label in rows])
    pool, held_out = split(labels, classes, path)
    drawn = drawn_per_class(labels, pool, per_class, seed)

    def tokens(indices: list[int]) -> TensorDataset:
        kept = [rows[index][0] for index in indices]
        found = tokenizer(kept, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return TensorDataset(found["input_ids"], found["attention_mask"], labels[indices])

    return tokens(drawn), tokens(held_out), classes


@functools.cache
def _rows(path: Path) -> list[tuple[str, str]]:
    """Texts and labels, without those that lack one of them; says how many these are."""
    rows, left_out = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := {"text", "label"} - {*(reader.fieldnames or [])}:
                raise SystemExit(f"{path} has the columns {reader.fieldnames}, and {sorted(missing)} are missing.")
            for row in reader:
                if None in row:
                    raise SystemExit(
                        f"{path}, line {reader.line_num}: more fields than columns. Put texts with commas in quotes."
                    )
                text, label = ((row[name] or "").strip() for name in ("text", "label"))
                if text and label:
                    rows.append((text, label))
                else:
                    left_out.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not in UTF-8 ({error}). Save it in that encoding.") from None
    except (OSError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read as a CSV file ({error}).") from None
    if left_out:
        print(f"{path}: {len(left_out)} rows without text or label are left out, the first in line {left_out[0]}.")
    return rows


def _docstrings() -> Iterable[tuple[str, str]]:
    """Docstrings of functions and classes, without importing their modules."""
    for part in PARTS_OF_SCIPY:
        found = {}
        for path in sorted((Path(scipy.__file__).parent / part).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.FunctionDef | ast.ClassDef)
                    and len(text := ast.get_docstring(node) or "") > 100
                ):
                    found[text[:400]] = part
        yield from found.items()


def _write(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    kept: dict[str, list[str]] = {}
    for text, label in rows:
        kept.setdefault(label, []).append(text)
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        # In the order of packages, neighbours are much alike: those kept are spread over all of them.
        writer.writerows(
            (text, label) for label, of in kept.items() for text in of[:: max(1, len(of) // COUNT)][:COUNT]
        )
    return path
