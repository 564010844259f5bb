"""Logits in what a network returns, and their axes."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_otrt.reading.hooks.logit_reader import LogitReader, select_logits

LOGITS, OTHER = torch.zeros(4, 3), torch.ones(4, 5)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, OTHER),
        [LOGITS, None],
        {"loss": torch.zeros(()), "logits": LOGITS},
        {"out": LOGITS, "aux": OTHER},
        SimpleNamespace(logits=LOGITS, hidden=OTHER),
        namedtuple("Output", "aux logits")(OTHER, LOGITS),
        namedtuple("Output", "main aux")(LOGITS, OTHER),
    ],
    ids=["tensor", "tuple", "list", "mapping", "segmentation", "object", "named logits", "named tuple"],
)
def test_found(output: Any) -> None:
    assert select_logits(output, None, "student") is LOGITS


@pytest.mark.parametrize(
    ("output", "select"),
    [
        ((OTHER, LOGITS), 1),
        ({"other": OTHER, "scores": LOGITS}, "scores"),
        (SimpleNamespace(logits=OTHER, scores=LOGITS), "scores"),
        (LOGITS, "scores"),
        (LOGITS, 1),
    ],
)
def test_selected(output: Any, select: str | int) -> None:
    """A tensor needs no selection, as for layers: the other network may return a mapping."""
    assert select_logits(output, select, "student") is LOGITS


@pytest.mark.parametrize(
    ("output", "select"),
    [
        (None, None),
        (torch.zeros(4, 3, dtype=torch.long), None),
        (torch.zeros(4, 3, dtype=torch.complex64), None),
        ((torch.zeros(()), LOGITS), None),
        ((), None),
        ({"hidden": LOGITS}, None),
        ({"logits": None}, None),
        ({"logits": LOGITS}, "scores"),
        ((LOGITS,), 1),
        (SimpleNamespace(hidden=LOGITS), None),
        ("logits", None),
    ],
)
def test_none(output: Any, select: Any) -> None:
    with pytest.raises(TypeError, match=r"logits of the student \(Net\).*LogitDistillation\(select=") as error:
        select_logits(output, select, "student (Net)")
    assert ("with nothing usable at select=" in str(error.value)) == (select is not None)


@pytest.mark.parametrize("output", [torch.zeros(4), {"logits": torch.zeros(4)}, (torch.zeros(4), LOGITS)])
def test_one_number_for_each_sample(output: Any) -> None:
    words = r"one number .* of shape \(4,\).*unsqueeze\(1\).*LogitDistillation\(activation='sigmoid'\).*\(features="
    with pytest.raises(TypeError, match=words):
        select_logits(output, None, "student (Net)")


class TestReader:
    def read(self, logits: Tensor, **options: Any) -> Tensor:
        return LogitReader("student", "student (Net)", **options)(logits, {})[0]

    @pytest.mark.parametrize(
        ("shape", "options", "expected"),
        [
            ((4, 3), {}, (4, 3)),
            ((4, 3, 6, 5), {}, (4, 3, 6, 5)),
            ((4, 6, 5, 3), {"class_axis": -1}, (4, 3, 6, 5)),
            ((4, 6, 3), {"class_axis": 2}, (4, 3, 6)),
            ((6, 4, 3), {"class_axis": 2, "batch_axis": 1}, (4, 3, 6)),
            ((4, 3, 2, 6, 5), {}, (4, 3, 2, 6, 5)),
        ],
    )
    def test_axes(self, shape, options, expected):
        logits = torch.randn(shape)
        found = self.read(logits, **options)
        assert found.shape == expected
        assert float(found.sum()) == pytest.approx(float(logits.sum()), abs=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_a_copy_in_float32_or_wider(self, dtype):
        logits = torch.randn(4, 3).to(dtype)
        found = self.read(logits)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        expected = found.clone()
        logits.zero_()
        assert torch.equal(found, expected)

    def test_distributed_tensors(self):
        class Sharded(Tensor):
            device_mesh = None

        logits = torch.zeros(4, 3).as_subclass(Sharded)
        with pytest.raises(TypeError, match="DTensor.*use_local_output"):
            self.read(logits)
