"""The losses of other methods, each as its paper states it, on the representations of a batch.

Each loss is a module, since some have trained projections; ``forward(student, teacher)`` gives a scalar. Where a loss
deviates from its paper, its docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.evidence.networks import Features


class SoftTargets(nn.Module):
    """Knowledge distillation (Hinton et al., arXiv 1503.02531): the teacher's softened classes, T = 4."""

    temperature = 4.0

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()

    def logits(self, student: Features) -> Tensor:
        """What is compared with the teacher's logits."""
        return student.logits

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """T² KL(teacher, student), the mean over samples."""
        soft = F.log_softmax(self.logits(student) / self.temperature, dim=1)
        target = F.log_softmax(teacher.logits / self.temperature, dim=1)
        return self.temperature**2 * F.kl_div(soft, target, reduction="batchmean", log_target=True)


class LearningWithoutForgetting(SoftTargets):
    """Learning without forgetting (Li and Hoiem, arXiv 1606.09282): a second head has the teacher's classes."""

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__(student, teacher)
        self.head = nn.Linear(student.penultimate.shape[1], teacher.logits.shape[1])

    def logits(self, student: Features) -> Tensor:
        """The outputs of the second head."""
        return self.head(student.penultimate)


class HintPenultimate(nn.Module):
    """FitNets (Romero et al., arXiv 1412.6550) on what enters the head: a trained linear map, then squared error.

    The error is relative to the teacher's variance, so that a weight means the same for each layer and network.
    """

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()
        self.project = nn.Linear(student.penultimate.shape[1], teacher.penultimate.shape[1])

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """Relative squared error."""
        return relative_error(self.project(student.penultimate), teacher.penultimate)


class HintBlocks(nn.Module):
    """FitNets on all blocks: trained 1 x 1 convolutions, then relative squared error, the mean over blocks.

    Args:
        student: Representations that tell the shapes.
        teacher: The same.
        grid: Pool maps to ``grid`` x ``grid`` first, as the transport term does; None compares all positions.
    """

    def __init__(self, student: Features, teacher: Features, grid: int | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.project = nn.ModuleList(
            nn.Linear(y.shape[-1], x.shape[-1]) for y, x in zip(student.blocks, teacher.blocks, strict=True)
        )

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """Mean over blocks of the relative squared error."""
        errors = [
            relative_error(project(pooled(y, self.grid)), pooled(x, self.grid))
            for project, y, x in zip(self.project, student.blocks, teacher.blocks, strict=True)
        ]
        return torch.stack(errors).mean()


class WithHints(nn.Module):
    """A loss and hints beside it.

    Args:
        loss: The loss.
        hints: The hints.
        weight: Weight of the hints against the loss.
    """

    def __init__(self, loss: nn.Module, hints: HintBlocks, weight: float) -> None:
        super().__init__()
        self.loss, self.hints, self.weight = loss, hints, weight

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """The weighted sum."""
        return self.loss(student, teacher) + self.weight * self.hints(student, teacher)


class AttentionTransfer(nn.Module):
    """Attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928): maps of the mean square over neurons.

    As in the authors' code: unit norm over positions, mean squared difference, the sum over blocks.
    """

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """Sum over blocks."""
        pairs = zip(student.blocks, teacher.blocks, strict=True)
        return torch.stack([F.mse_loss(self.attention(y), self.attention(x)) for y, x in pairs]).sum()

    @staticmethod
    def attention(block: Tensor) -> Tensor:
        """Unit attention maps (samples, positions)."""
        return F.normalize(block.square().mean(dim=-1), dim=1)


class SimilarityPreserving(nn.Module):
    """Similarity-preserving distillation (Tung and Mori, arXiv 1907.09682): Gram matrices of samples, unit rows."""

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """Sum over blocks of the squared Frobenius norm of the difference over B²."""
        pairs = zip(student.blocks, teacher.blocks, strict=True)
        return torch.stack([F.mse_loss(self.similarity(y), self.similarity(x)) for y, x in pairs]).sum()

    @staticmethod
    def similarity(block: Tensor) -> Tensor:
        """Gram matrix (samples, samples) with rows of unit norm."""
        flat = block.flatten(1)
        return F.normalize(flat @ flat.T, dim=1)


class RelationalDistillation(nn.Module):
    """Relational knowledge distillation (Park et al., arXiv 1904.05068): distances and angles, weighed 1 : 2."""

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """Huber losses of the penultimate representations' relations."""
        y, x = student.penultimate, teacher.penultimate
        return F.smooth_l1_loss(distances(y), distances(x)) + 2 * F.smooth_l1_loss(angles(y), angles(x))


class CenteredKernelAlignment(nn.Module):
    """1 - linear CKA (Kornblith et al., arXiv 1905.00414; a loss in Saha et al., arXiv 2212.03862), mean over blocks.

    Positions of maps pooled to 4 x 4 are observations, as in the transport term.
    """

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """Mean over blocks."""
        pairs = zip(student.blocks, teacher.blocks, strict=True)
        return torch.stack([1 - cka(pooled(y, 4).flatten(0, 1), pooled(x, 4).flatten(0, 1)) for y, x in pairs]).mean()


class ContrastiveDistillation(nn.Module):
    """Contrastive representation distillation (Tian et al., arXiv 1910.10699), penultimate, 64 dimensions, τ = 0.1.

    The other samples of the batch are the negatives, in both directions, in place of the paper's memory bank.
    """

    dimensions, temperature = 64, 0.1

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()
        self.student = nn.Linear(student.penultimate.shape[1], self.dimensions)
        self.teacher = nn.Linear(teacher.penultimate.shape[1], self.dimensions)

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """Cross-entropy of finding the other network's representation of the same sample."""
        y = F.normalize(self.student(student.penultimate), dim=1)
        x = F.normalize(self.teacher(teacher.penultimate), dim=1)
        scores = y @ x.T / self.temperature
        same = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2


def l2_sp(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """L2-SP (Li et al., arXiv 1802.01483): half the squared distance to the starting point, for what existed there."""
    return 0.5 * torch.stack([(parameters[name] - value).square().sum() for name, value in start.items()]).sum()


def relative_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the variance of the target around the mean of each neuron."""
    deviation = target - target.mean(dim=tuple(range(target.ndim - 1)), keepdim=True)
    return F.mse_loss(prediction, target) / deviation.square().mean().clamp_min(1e-8)


def pooled(block: Tensor, grid: int | None) -> Tensor:
    """A block (samples, positions, neurons) of square maps, averaged to ``grid`` x ``grid`` positions."""
    side = math.isqrt(block.shape[1])
    if grid is None or side <= grid:
        return block
    maps = block.unflatten(1, (side, side)).movedim(-1, 1)
    return F.adaptive_avg_pool2d(maps, grid).movedim(1, -1).flatten(1, 2)


def distances(x: Tensor) -> Tensor:
    """Distances of all pairs of samples over their mean; 0 on the diagonal."""
    found = _distances(x)
    return found / found[found > 0].mean()


def _distances(x: Tensor) -> Tensor:
    norms = x.square().sum(1)
    squared = (norms[:, None] + norms[None] - 2 * x @ x.T).clamp_min(1e-12)
    # The diagonal is masked before the root, whose gradient there is infinite.
    off = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    return (squared * off + (1 - off)).sqrt() * off


def angles(x: Tensor) -> Tensor:
    """Cosines (j, i, k) of the angle at sample j between samples i and k."""
    directions = F.normalize(x[None] - x[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


def cka(y: Tensor, x: Tensor) -> Tensor:
    """Linear centred kernel alignment of observations × neurons, from 0 to 1."""
    y, x = y - y.mean(0), x - x.mean(0)
    return (y.T @ x).square().sum() / ((y.T @ y).norm() * (x.T @ x).norm()).clamp_min(1e-12)
