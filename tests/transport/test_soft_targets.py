"""Distillation of logits against scipy, with dense outputs and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from lightning_otrt.transport.soft_targets import as_two_classes, logit_neurons, soft_targets


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 10), (2, 5, 3, 4), (3, 5, 7)])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_is_the_divergence_of_scipy(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = draw(*shape), draw(*shape, seed=1)
    p, q = (softmax(side.numpy() / temperature, axis=1) for side in (teacher, student))
    each = temperature**2 * rel_entr(p, q).sum(1)
    found = soft_targets(student, teacher, temperature=temperature)
    assert found.mean.item() == pytest.approx(each.mean(), rel=1e-10)
    assert found.positions.item() == each.size
    mask = torch.rand(each.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    masked = soft_targets(student, teacher, temperature=temperature, mask=mask)
    assert masked.mean.item() == pytest.approx(each[mask.numpy()].mean(), rel=1e-10)
    assert masked.positions.item() == mask.sum().item()


def test_gradient() -> None:
    student, teacher = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: soft_targets(logits, teacher).total, student)
    soft_targets(student, teacher).mean.backward()
    assert teacher.grad is None


def test_padding_that_is_not_finite_reaches_neither_value_nor_gradient() -> None:
    logits, teacher = draw(2, 7, 5), draw(2, 7, 5, seed=1)
    logits[0, :, 3:], teacher[1, :, 4:] = float("nan"), float("-inf")
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:], mask[1, 4:] = False, False
    logits.requires_grad_()
    found = soft_targets(logits, teacher, mask=mask)
    found.mean.backward()
    assert found.mean.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad.mT[~mask] == 0).all()
    assert (logits.grad.mT[mask] != 0).any()


def test_sums_of_parts_add_up_to_the_mean_of_the_whole() -> None:
    student, teacher = draw(10, 6), draw(10, 6, seed=1)
    parts = [soft_targets(student[part], teacher[part]) for part in (slice(0, 3), slice(3, 10))]
    total = sum(part.total.item() for part in parts) / sum(part.positions.item() for part in parts)
    assert total == pytest.approx(soft_targets(student, teacher).mean.item(), rel=1e-12)


def test_nothing_counts() -> None:
    found = soft_targets(draw(4, 6), draw(4, 6), mask=torch.zeros(4, dtype=torch.bool))
    assert found.mean == 0


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = draw(8, 10).half().requires_grad_(), draw(8, 10, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_targets(student, teacher)
    assert found.mean.dtype == torch.float32
    torch.testing.assert_close(found.mean, soft_targets(student.float(), teacher.float()).mean)


@pytest.mark.parametrize("shape", [(10, 6), (5, 2, 3, 4)])
def test_logits_as_neurons(shape: tuple[int, ...]) -> None:
    logits = draw(*shape)
    neurons = logit_neurons(logits)
    assert neurons.shape == (shape[0], logits.numel() // shape[0])
    np.testing.assert_allclose(neurons.mean(0).numpy(), 0, atol=1e-14)
    torch.testing.assert_close(logit_neurons(logits + 5), neurons)
    first = logits.flatten(1)[:, 0]
    torch.testing.assert_close(neurons[:, 0], first - first.mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "Expected argument `temperature` to be positive and finite, but got 0.0"),
        ({"temperature": float("inf")}, "Expected argument `temperature`"),
        ({"teacher": torch.zeros(4, 7)}, r"one shape, but got \(4, 6\) and \(4, 7\)"),
        ({"mask": torch.ones(4)}, r"boolean tensor of the shape \(4,\).*float32"),
        ({"mask": torch.ones(4, 6, dtype=torch.bool)}, r"boolean tensor of the shape \(4,\).*\(4, 6\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_targets(**{"student": torch.zeros(4, 6), "teacher": torch.zeros(4, 6), **arguments})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(6, 1), (6, 5), (3, 5, 4), (2, 3, 4, 4)])
def test_labels_are_a_binary_cross_entropy_with_soft_targets(shape, masked):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    mask = torch.rand(shape, generator=generator) > 0.4 if masked else None
    target = torch.sigmoid(teacher / 4)
    each = binary_cross_entropy_with_logits(student / 4, target, reduction="none")
    each = 16 * (each - binary_cross_entropy(target, target, reduction="none"))
    expected = each.mean() if mask is None else each[mask].mean()
    found = soft_targets(as_two_classes(student), as_two_classes(teacher), mask=mask).mean
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert float(found) > 1e-3
