"""A table of numbers between student layers and teacher layers, in plain text, for terminals and notebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os.path import commonprefix

from torch import Tensor

__all__ = ["format_table"]

#: Characters of a line, and rows, at most.
WIDTH, ROWS = 120, 36
#: Characters of a name, at the head of a row and over a column.
_ROW_NAME, _COLUMN_NAME = 36, 16
_GAP = "…"


def format_table(
    values: Tensor, student_layers: Sequence[str], teacher_layers: Sequence[str], closest: Mapping[str, str]
) -> str:
    """The table: rows are student layers, columns teacher layers.

    Columns and rows that do not fit are left out in the middle, where "…" stands for them. The last column then names
    the closest teacher layer, which may be one of those.

    Args:
        values: ``(S, T)``; NaN is shown as "-".
        student_layers: Names of the S rows.
        teacher_layers: Names of the T columns.
        closest: By student layer, the teacher layer whose value is marked.

    Example:
        >>> import torch
        >>> print(format_table(torch.tensor([[0.5, 0.25]]), ["fc"], ["conv", "head"], {"fc": "head"}))
                conv   head
        fc     0.50   0.25*
    """
    short = _without_common_start(teacher_layers)
    heads = [f"{name} " for name in short]
    names = [_ending(name, _ROW_NAME) for name in student_layers]
    widths = [max(len(head), 6) for head in heads]
    first = max(map(len, names), default=0)
    columns = list(range(len(heads)))
    last = [""] * len(names)
    if first + sum(width + 1 for width in widths) > WIDTH:
        known = dict(zip(teacher_layers, short, strict=True))
        last = [f"  {known.get(closest.get(name, ''), '-')}" for name in student_layers]
        columns = _that_fit(widths, WIDTH - first - max(map(len, last)) - 2)
    lines = [
        _line("", [heads[c] if c >= 0 else _GAP for c in columns], first, [widths[c] if c >= 0 else 1 for c in columns])
    ]
    if any(last):
        lines[0] += "  closest"
    for row in _ends(len(names), ROWS):
        if row < 0:
            lines.append(_GAP)
            continue
        near = closest.get(student_layers[row])
        cells = [
            _GAP if column < 0 else _cell(float(values[row, column]), teacher_layers[column] == near)
            for column in columns
        ]
        lines.append(_line(names[row], cells, first, [widths[c] if c >= 0 else 1 for c in columns]) + last[row])
    return "\n".join(line.rstrip() for line in lines)


def _without_common_start(names: Sequence[str]) -> list[str]:
    """Names over columns: what all of them begin with tells nothing, and neither does the start of a long rest."""
    start = len(commonprefix(list(names))) if len(names) > 1 else 0  # noqa: RUF071 - characters, not folders
    return [_ending(name if start < 4 else f"{_GAP}{name[start:]}", _COLUMN_NAME) for name in names]


def _cell(value: float, is_closest: bool) -> str:
    return "- " if math.isnan(value) else f"{value:.2f}{'*' if is_closest else ' '}"


def _line(name: str, cells: Sequence[str], first: int, widths: Sequence[int]) -> str:
    return " ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])


def _ending(name: str, most: int) -> str:
    """The end of a long name, which tells layers apart; "(all)" for the network itself, whose name is empty."""
    name = name or "(all)"
    return name if len(name) <= most else f"{_GAP}{name[1 - most :]}"


def _that_fit(widths: Sequence[int], room: int) -> list[int]:
    """As many columns from both ends as fit."""
    count = len(widths)
    while count > 2 and sum(1 + (widths[c] if c >= 0 else 1) for c in _ends(len(widths), count)) > room:
        count -= 1
    return _ends(len(widths), count)


def _ends(length: int, most: int) -> list[int]:
    """Indices of the first and the last, ``most`` in all, with -1 for those left out between them."""
    if length <= most:
        return list(range(length))
    head = (most + 1) // 2
    return [*range(head), -1, *range(length - (most - head), length)]
