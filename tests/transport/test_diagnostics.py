"""Diagnostics of plans whose figures are known."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_otrt.transport.diagnostics import diagnose
from lightning_otrt.transport.plans import uniform_plan


@pytest.mark.parametrize("batch", [(), (3,)])
def test_diagnose(batch: tuple[int, ...]) -> None:
    assignment = (torch.eye(8)[[1, 0, 2, 3, 4, 5, 6, 7]] / 8).expand(*batch, 8, 8)
    numbers = diagnose(assignment)
    for number, expected in zip(numbers, (0.0, 0.0, 0.5, 0.25), strict=True):
        torch.testing.assert_close(number, torch.full(batch, expected))
    torch.testing.assert_close(diagnose(uniform_plan(8, 8).expand(*batch, 8, 8)).entropy, torch.ones(batch))
    wide = torch.zeros(*batch, 2, 4)
    wide[..., 0, 0], wide[..., 1, 1] = 0.6, 0.4
    numbers = diagnose(wide)
    torch.testing.assert_close(numbers.student_error, torch.full(batch, 0.2))
    torch.testing.assert_close(numbers.teacher_error, torch.full(batch, 0.35 + 0.15 + 0.5))
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4)) / math.log(8)
    torch.testing.assert_close(numbers.entropy, torch.full(batch, entropy))
    assert numbers.off_identity.isnan().all()
    assert numbers.off_identity.shape == batch
    assert (diagnose(torch.ones(*batch, 1, 1)).entropy == 0).all()
