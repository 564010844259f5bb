"""The table of a comparison can be read in a terminal, however many layers there are and however long their names."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_otrt.analysis.comparison_table import ROWS, WIDTH, format_table

LAYERS = [f"backbone.encoder.layers.encoder_layer_{index}.mlp" for index in range(60)]


def closest(values: torch.Tensor, students: list[str], teachers: list[str]) -> dict[str, str]:
    return {name: teachers[int(row.argmin())] for name, row in zip(students, values, strict=True)}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 40), (60, 60), (60, 2), (200, 7)])
def test_fits_a_terminal(rows: int, columns: int) -> None:
    students, teachers = ((LAYERS * 4)[:count] for count in (rows, columns))
    students = [f"{name}.{index}" for index, name in enumerate(students)]
    values = torch.rand(rows, columns)
    lines = format_table(values, students, teachers, closest(values, students, teachers)).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) == min(rows + 1, ROWS + 2)
    assert all(line == line.rstrip() for line in lines)


def test_layers_in_the_middle_are_left_out() -> None:
    """The closest layer is named where its column is missing."""
    values = torch.ones(60, 60)
    values[0, 30] = values[59, 59] = 0
    lines = format_table(values, LAYERS, LAYERS, closest(values, LAYERS, LAYERS)).splitlines()
    assert lines[0].split()[0] == "…0.mlp"
    assert lines[0].split()[-2:] == ["…59.mlp", "closest"]
    assert lines[1].split()[-1] == "…30.mlp"
    assert "*" not in lines[1]
    assert "0.00*" in lines[-1]
    assert lines[1 + ROWS // 2] == "…"


def test_what_names_have_in_common_is_left_out_of_columns_alone() -> None:
    lines = format_table(torch.zeros(1, 2), LAYERS[:1], LAYERS[:2], {}).splitlines()
    assert lines[0].split() == ["…0.mlp", "…1.mlp"]
    assert lines[1].split()[0].endswith("encoder.layers.encoder_layer_0.mlp")


def test_nothing_to_compare_and_the_network_itself() -> None:
    lines = format_table(torch.full((1, 1), math.nan), [""], [""], {}).splitlines()
    assert [line.split() for line in lines] == [["(all)"], ["(all)", "-"]]
