"""What values are refused for."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_otrt.transport.tensor_checks import check_finite


def test_large_values_whose_sum_overflows_are_not_taken_for_infinite() -> None:
    check_finite(torch.full((4, 4), 3e38), "x")
    with pytest.raises(ValueError, match="2 NaN or infinite"):
        check_finite(torch.tensor([1.0, math.inf, math.nan]), "x")
