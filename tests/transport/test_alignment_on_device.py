"""The alignment and the regression on a device: nothing makes the host wait, and nothing is moved to it."""

from __future__ import annotations

import pytest
import torch
from old_versions import needs_fake_cuda
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_otrt.transport.cost import Rounds, ValueAndGradient
from lightning_otrt.transport.orthogonal import OrthogonalAlignment, random_projection
from lightning_otrt.transport.reference import move_reference
from lightning_otrt.transport.regression import Regression

pytestmark = needs_fake_cuda

RULES = [OrthogonalAlignment(0.0), OrthogonalAlignment(0.5), OrthogonalAlignment(1.0), Regression(), Regression(False)]


def of_two_processes(rounds: Rounds) -> ValueAndGradient:
    """What rounds return if another process sends the same."""
    sent = next(rounds)
    while True:
        try:
            sent = rounds.send([part + part for part in sent])
        except StopIteration as stop:
            return stop.value


def test_fake_tensors_tell_where_the_host_would_wait() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(2, device="cuda").all())


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (6, 6), (8, 5)])
def test_no_wait_and_no_move(rule: OrthogonalAlignment | Regression, rows: int, columns: int) -> None:
    with FakeTensorMode(), torch.no_grad():
        y, x = (torch.randn(size, 20, device="cuda") for size in (rows, columns))
        reference = y.mean(1, keepdim=True), x.mean(1, keepdim=True)
        sums = [0.9 * part for part in rule.sums(y, x, reference)]
        sums, reference = move_reference(sums, reference)
        matrix = rule.solve(sums)
        value, gradient = rule.value(y, x, matrix)
        shared_value, shared_gradient = of_two_processes(rule.shared_value(y, x, matrix))
        assert {part.device.type for part in (*sums, *reference, matrix, value, gradient)} == {"cuda"}
        assert (shared_value.shape, shared_gradient.shape) == (value.shape, gradient.shape) == ((), y.shape)
        assert gradient.dtype == shared_gradient.dtype == torch.float32


def test_control_on_a_device() -> None:
    projection, rule = random_projection(3, 7, seed=0), OrthogonalAlignment()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        y, x = torch.randn(3, 20, device="cuda"), torch.randn(7, 20, device="cuda")
        assert rule.solve(rule.sums(y, x), projection).device.type == "cuda"
