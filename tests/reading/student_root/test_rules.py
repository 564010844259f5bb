"""The root of a student."""

from __future__ import annotations

import pytest
from helpers import LAYERS, make_task, make_teacher

from lightning_otrt.reading.student_root.rules import can_be_root


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("", LAYERS, True),
        ("net", LAYERS, True),
        ("net", "auto", True),
        ("net.block1", LAYERS, False),
        ("net.block1", {"net.block1.0": "block1"}, True),
        ("net.head", "auto", False),
    ],
)
def test_can_be_root(name: str, layers: object, expected: bool) -> None:
    assert can_be_root(name, layers, make_task(), make_teacher()) is expected


def test_a_frozen_module_is_no_root() -> None:
    assert not can_be_root("net", LAYERS, make_task().requires_grad_(False), make_teacher())
