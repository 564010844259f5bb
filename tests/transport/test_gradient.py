"""Gradients that are attached to a value."""

from __future__ import annotations

import pytest
import torch

from lightning_otrt.transport.gradient import attach_gradients


def test_gradients_are_those_given_times_factor_and_incoming_gradient() -> None:
    inputs = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    gradients = [torch.arange(6.0).view(2, 3), torch.ones(4)]
    value = attach_gradients(torch.tensor(5.0), inputs, gradients, [1.0, 0.25])
    assert value.item() == 5
    (3 * value).backward()
    torch.testing.assert_close(inputs[0].grad, 3 * gradients[0])
    torch.testing.assert_close(inputs[1].grad, 0.75 * gradients[1])


def test_each_value_of_a_batch_weighs_its_own_gradient() -> None:
    inputs, gradient = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(2, 3, 4)
    value = attach_gradients(torch.tensor([1.0, 2.0]), [inputs], [gradient])
    (value * torch.tensor([10.0, 20.0])).sum().backward()
    torch.testing.assert_close(inputs.grad, gradient * torch.tensor([10.0, 20.0])[:, None, None])


def test_gradients_get_shape_and_type_of_the_inputs() -> None:
    inputs = torch.zeros(6, dtype=torch.bfloat16, requires_grad=True)
    attach_gradients(torch.tensor(1.0), [inputs], [torch.ones(2, 3)]).backward()
    assert inputs.grad is not None
    assert (inputs.grad.shape, inputs.grad.dtype) == ((6,), torch.bfloat16)


def test_value_is_no_view_of_what_was_given() -> None:
    given = torch.tensor(1.0)
    value = attach_gradients(given, [torch.zeros(1, requires_grad=True)], [torch.ones(1)])
    given.zero_()
    assert value.item() == 1


@pytest.mark.parametrize("weighted", [False, True])
def test_second_derivative_raises(weighted: bool) -> None:
    """Beside a task loss that can be differentiated twice, too, and with an incoming gradient that is a constant."""
    inputs = torch.ones(3, requires_grad=True)
    weight = torch.ones((), requires_grad=weighted)
    value = weight * attach_gradients(torch.tensor(1.0), [inputs], [torch.ones(3)]) + inputs.pow(3).sum()
    (gradient,) = torch.autograd.grad(value, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated only once: its plan is held fixed.*gradient penalty"):
        torch.autograd.grad(gradient.sum(), inputs)
