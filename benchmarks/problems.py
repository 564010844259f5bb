"""Transport problems whose answers are known: neurons, a cost, the exact value and the converged entropic gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_otrt.transport.cost import Cost, Plan
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.plans import exact_plan
from lightning_otrt.transport.sinkhorn import sinkhorn_plan

COSTS = ("euclidean", "sqeuclidean", "correlation")
CLOUDS = ("permuted", "independent")
#: (student neurons, teacher neurons, observations)
SHAPES = ((128, 128, 512), (512, 512, 256), (512, 512, 1024), (2048, 2048, 256), (1024, 512, 512))
EPSILON = 0.01
#: Standard deviation of what a permuted neuron is off its partner, whose own is 1.
NOISE = 0.3


@dataclass(frozen=True, eq=False)
class Problem:
    """Neurons, with what a solver should find.

    Attributes:
        shape: Student neurons, teacher neurons, observations.
        cloud: ``"permuted"`` (with noise) or ``"independent"``.
        cost: Name of the cost.
        y: Student neurons.
        x: Teacher neurons.
        rule: The cost.
        matrix: The cost matrix ``(N, M)``.
        exact: Value of the exact plan.
        gradients: Gradients of ⟨P, M⟩ at converged entropic plans, by ε; see :meth:`cosine`.
    """

    shape: tuple[int, int, int]
    cloud: str
    cost: str
    y: Tensor
    x: Tensor
    rule: Cost
    matrix: Tensor
    exact: float
    gradients: dict[float, Tensor]

    @property
    def label(self) -> str:
        """How tables name it."""
        rows, columns, observations = self.shape
        return f"({rows if rows == columns else f'{rows}×{columns}'}, {observations})"

    def error(self, value: Tensor | float) -> float:
        """Relative error of a value."""
        return abs(float(value) - self.exact) / self.exact

    def cosine(self, gradient: Tensor, epsilon: float = EPSILON) -> float:
        """Cosine of a gradient to that of the converged entropic plan at ``epsilon``."""
        if epsilon not in self.gradients:
            converged = sinkhorn_plan(self.matrix[None], epsilon, iterations=400).matrix[0]
            _, gradient = self.rule.value(self.y, self.x, Plan.of(converged), self.rule.energy(self.x))
            self.gradients[epsilon] = gradient.flatten().double()
        return torch.nn.functional.cosine_similarity(gradient.flatten().double(), self.gradients[epsilon], 0).item()


def neurons(shape: tuple[int, int, int], cloud: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher neurons; their means and scales differ as those of a layer do."""
    rows, columns, observations = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(max(rows, columns), observations, generator=generator) + 0.5
    if cloud == "permuted":
        order = torch.randperm(rows, generator=generator) % columns
        y = x[order] + NOISE * torch.randn(rows, observations, generator=generator)
    else:
        y = torch.randn(rows, observations, generator=generator) + 0.5
    return y, x[:columns].clone()


def make_problem(shape: tuple[int, int, int], cloud: str, cost: str) -> Problem:
    """Solve a problem exactly and to convergence."""
    y, x = neurons(shape, cloud)
    rule = get_cost(cost)
    energy = rule.energy(x)
    matrix = rule.matrix(rule.sums(y, x), energy)
    exact = float((exact_plan(matrix[None])[0].double() * matrix).sum())
    return Problem(shape, cloud, cost, y, x, rule, matrix, exact, {})
