"""Kernels that a call launches on a GPU, counted without one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.launches import Launches, count, report

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a build of torch with CUDA")


def test_what_is_a_launch() -> None:
    with FakeTensorMode():
        x, counter = torch.ones(4, 3, device="cuda"), Launches()
        with counter:
            x.mT[0].view(4)
            torch.empty(5, device="cuda")
            torch.ones(5)
            x[:0].clone()
            assert counter.count == 0
            torch.add(x, 1).mul_(2)
            torch.var_mean(x, dim=1)
    assert counter.count == 3


#: Most launches between solves and with one, of one pair and of five of equal shape.
LIMITS = {
    ("correlation", 0.0): ((45, 171), (52, 179)),
    ("correlation", 0.98): ((89, 264), (96, 271)),
    ("euclidean", 0.0): ((41, 162), (49, 170)),
    ("euclidean", 0.98): ((68, 194), (76, 202)),
    ("sqeuclidean", 0.0): ((37, 160), (47, 170)),
    ("sqeuclidean", 0.98): ((64, 189), (74, 199)),
}


@pytest.mark.parametrize(("cost", "memory"), LIMITS)
def test_launches_of_a_call(cost: str, memory: float) -> None:
    for pairs, limits in zip((1, 5), LIMITS[cost, memory], strict=True):
        found = tuple(count(cost, memory, pairs, solve=solve) for solve in (False, True))
        assert all(number <= limit for number, limit in zip(found, limits, strict=True)), (pairs, found)


def test_the_page_compares_two_versions() -> None:
    rows = [{"pairs": 5, "cost": "correlation", "memory": 0.98, "between": 7, "solve": 20}]
    assert report(rows, [{**rows[0], "between": 9, "solve": 30}], "command").splitlines()[-1] == (
        "| 5 | correlation | 0.98 | 9 | 7 | 30 | 20 |"
    )
    assert report(rows, None, "command").splitlines()[-1] == "| 5 | correlation | 0.98 | 7 | 20 |"
