"""The benchmark for GPUs, rehearsed on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.gpu import check, count, network_step, time_of, tiny
from benchmarks.gpu_page import page
from benchmarks.gpu_runs import against_samples_loss, callback_epochs, global_steps
from benchmarks.pages import RESULTS

SHAPE = (24, 16, 48)


def test_checks_and_counts() -> None:
    assert all(row["passed"] for row in check("cpu", (SHAPE,)))
    assert all(row["launches"] > 0 and row["waits"] is None for row in count("cpu", SHAPE))


def test_samples_loss() -> None:
    rows = against_samples_loss("cpu", ((32, 32, 64),), lambda function: time_of(function, "cpu"))
    assert len(rows) == 6
    for row in rows:
        for name in ("lightning_otrt", "SamplesLoss(debias=False)"):
            assert row[name]["milliseconds"].median > 0
            assert row[name]["accurate"] == (row[name]["value error"] <= 0.01)


def test_a_fit_with_the_callback_and_the_cache() -> None:
    found = callback_epochs("cpu", tiny, torch.randn(8, 3, 32, 32), batch=4, epochs=2)
    assert list(found) == ["no callback", "callback", "callback, no graphs", "teacher_cache"]
    # All samples of the second epoch are known.
    assert found["teacher_cache"]["hit rate"] == 0.5


def test_network_step() -> None:
    assert isinstance(tiny(), nn.Sequential)
    assert network_step("cpu")["milliseconds"] > 0


@pytest.mark.slow
def test_two_processes() -> None:
    found = global_steps("cpu", calls=2)
    assert list(found) == ["no term", "local", "global"]
    assert min(found.values()) > 0


def test_the_page_of_what_was_measured() -> None:
    """From the file in the repository, which a GPU wrote."""
    results = json.loads((RESULTS / "gpu.json").read_text())
    text = page(results)
    assert f"on one {results['device']}." in text
    assert "0 of 24 kinds of call wait" in text
    assert len([line for line in text.splitlines() if line.startswith("| 2048 × 2048 × 256 |")]) == 3
