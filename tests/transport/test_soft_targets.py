"""Distillation of logits against scipy, with dense outputs and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, kl_div, log_softmax

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


@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0, 100.0, 1000.0, 10_000.0])
@pytest.mark.parametrize("shape", [(64, 10), (32, 1000), (4, 5, 7, 3)])
@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_value_in_float32_is_that_of_float64(shape: tuple[int, ...], temperature: float, distance: float) -> None:
    teacher = draw(*shape, seed=1).float()
    student = teacher + distance * draw(*shape).float()
    found = soft_targets(student, teacher, temperature=temperature).mean
    p, q = (softmax(side.double().numpy() / temperature, axis=1) for side in (teacher, student))
    # Without the part of the sum that is 0, and cancels in float64, too.
    share = q / p - 1
    expected = temperature**2 * (p * (share - np.log1p(share))).sum(1).mean()
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found = soft_targets(student + 7, teacher - 3, temperature=temperature).mean
    assert found.item() == pytest.approx(expected, rel=1e-4 if distance == 1 else 1e-2)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_that_of_the_plain_sum(temperature: float, dtype: torch.dtype) -> None:
    student, teacher = draw(16, 10).to(dtype).requires_grad_(), draw(16, 10, seed=1).to(dtype)
    own, target = (log_softmax(side / temperature, 1) for side in (student, teacher))
    plain = kl_div(own, target, reduction="none", log_target=True).sum() * temperature**2
    found = soft_targets(student, teacher, temperature=temperature).total
    expected, gradient = (torch.autograd.grad(total, student)[0] for total in (plain, found))
    assert torch.equal(gradient, expected)
    if temperature < 10:
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize(
    ("masked", "sides"),
    [
        *((-1e9, sides) for sides in ((True, False), (False, True), (True, True))),
        *((torch.finfo(torch.float32).min, sides) for sides in ((False, True), (True, True))),
    ],
)
def test_classes_that_are_masked_and_differences_that_overflow(
    masked: float, sides: tuple[bool, bool], temperature: float
) -> None:
    student, teacher = 20 * draw(16, 10), 20 * draw(16, 10, seed=1)
    for side, is_masked in zip((student, teacher), sides, strict=True):
        side[:, 7:] = masked if is_masked else side[:, 7:]
    found = soft_targets(student.float(), teacher.float(), temperature=temperature).mean
    own, target = (log_softmax(side / temperature, 1) for side in (student, teacher))
    expected = temperature**2 * kl_div(own, target, reduction="batchmean", log_target=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_is_not_finite_stays_so() -> None:
    student, teacher = draw(16, 10).float(), draw(16, 10, seed=1).float()
    student[:, 3], teacher[:, 3] = torch.finfo(torch.float32).min, 20.0
    assert soft_targets(student, teacher, temperature=1.0).total == float("inf")
    student[0, 3] = float("nan")
    assert soft_targets(student, teacher).total.isnan()


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


@pytest.mark.parametrize("value", [-1e4, -65504.0, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("centred", [True, False])
def test_masked_classes_leave_the_others_as_they_are(value: float, centred: bool) -> None:
    logits = draw(6, 50).float()
    expected = logit_neurons(logits[[0, 2, 3, 5]], centred=centred)
    logits[[1, 4]] = value
    found = logit_neurons(logits, centred=centred)
    torch.testing.assert_close(found[[0, 2, 3, 5]], expected)
    assert (found[[1, 4]] == 0).all()


def test_logits_that_are_not_masked() -> None:
    """Those of a network with huge logits, a class that is constant, and one that is masked in some samples alone."""
    huge, constant, some = 1e6 * draw(5, 40), draw(5, 40), draw(5, 40)
    constant[3], some[3, ::2] = -30.0, -1e9
    for logits in (huge, huge[:, :1], constant, some):
        torch.testing.assert_close(logit_neurons(logits), logits - logits.mean(0))
    assert logit_neurons(torch.full((3, 4), -1e9)).abs().sum() == 0
    assert logit_neurons(draw(5, 0)).shape == (5, 0)
    for value in (float("nan"), -float("inf")):
        some[2] = value
        assert not logit_neurons(some).isfinite().all()


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
