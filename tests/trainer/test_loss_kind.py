"""What a task trains with, read from the graph of its loss: losses of torch, alone, in sums and inside of networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_otrt.trainer.loss_kind import kind_of_loss

CLASSES, LABELS, NUMBERS = torch.tensor([0, 2, 1, 1]), torch.ones(4, 3), torch.randn(4, 3)

LOSSES: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: F.cross_entropy(x, CLASSES), "classes"),
    (lambda x: F.cross_entropy(x, CLASSES, label_smoothing=0.1), "classes"),
    (lambda x: F.nll_loss(x.log_softmax(1), CLASSES), "classes"),
    (lambda x: F.cross_entropy(x[..., None].expand(-1, -1, 5), CLASSES[:, None].expand(-1, 5)), "classes"),
    (lambda x: F.binary_cross_entropy_with_logits(x, LABELS), "labels"),
    (lambda x: F.binary_cross_entropy(x.sigmoid(), LABELS), "labels"),
    (lambda x: F.mse_loss(x, NUMBERS), "numbers"),
    (lambda x: F.l1_loss(x, NUMBERS), "numbers"),
    (lambda x: F.smooth_l1_loss(x, NUMBERS), "numbers"),
    (lambda x: F.huber_loss(x, NUMBERS), "numbers"),
    (lambda x: (x - NUMBERS).abs().mean(), "numbers"),
    (lambda x: ((x - NUMBERS) ** 2).mean(), "numbers"),
    (lambda x: -(LABELS * x.log_softmax(1)).sum(1).mean(), "classes"),
    (lambda x: F.kl_div(x.log_softmax(1), LABELS / 3, reduction="batchmean") + F.mse_loss(x, NUMBERS), "classes"),
    (lambda x: x.abs().mean() + (1 - x).pow(2).mean(), ""),  # penalties, and the factor of a focal loss
    (lambda x: x.square().mean(), ""),
    (lambda x: F.mse_loss(x, NUMBERS) + 0.1 * F.cross_entropy(x, CLASSES), "classes"),
    (lambda x: F.binary_cross_entropy_with_logits(x, LABELS) + F.cross_entropy(x, CLASSES), "classes"),
    (lambda x: F.l1_loss(x, NUMBERS) / 2 + F.binary_cross_entropy_with_logits(x, LABELS).mean(), "labels"),
    # What lies below a loss is the network, with losses of its own.
    (lambda x: F.mse_loss(x * F.cross_entropy(x, CLASSES), NUMBERS), "numbers"),
]


@pytest.mark.parametrize(("loss", "kind"), LOSSES)
def test_the_kind(loss: Callable[[Tensor], Tensor], kind: str) -> None:
    logits = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
    assert kind_of_loss(loss(logits)) == kind


def test_a_loss_without_a_graph_has_none() -> None:
    assert kind_of_loss(F.mse_loss(LABELS, NUMBERS)) == ""
