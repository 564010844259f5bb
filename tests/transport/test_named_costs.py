"""From names to costs."""

from __future__ import annotations

import pytest
import torch
from transport_problems import NAMES

from lightning_otrt.transport.correlation import CorrelationCost
from lightning_otrt.transport.custom_cost import CustomCost
from lightning_otrt.transport.euclidean import EuclideanCost, SquaredEuclideanCost
from lightning_otrt.transport.named_costs import get_cost


def test_get_cost() -> None:
    assert [type(get_cost(name)) for name in NAMES] == [CorrelationCost, EuclideanCost, SquaredEuclideanCost]
    cost = EuclideanCost()
    assert get_cost(cost) is cost
    assert isinstance(get_cost(torch.cdist), CustomCost)
    assert [get_cost(name).min_observations for name in NAMES] == [3, 1, 1]
    assert [get_cost(name).scaled for name in NAMES] == [False, True, True]
    with pytest.raises(ValueError, match=r"`cost` to be one of \['correlation', .*\] or a callable, but got 'cosine'"):
        get_cost("cosine")
    with pytest.raises(TypeError, match="or a callable, but got int"):
        get_cost(3)  # type: ignore[arg-type]
