"""Couplings that are not transport, as losses on all blocks: rotations and what is near them, and linear regression.

They solve from running moments, as the library does: at the first calls, and at every tenth after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.evidence.losses import pooled
from benchmarks.evidence.networks import Features
from lightning_otrt.steps.coupling import EARLY_SOLVES
from lightning_otrt.transport.cost import Sums
from lightning_otrt.transport.orthogonal import OrthogonalAlignment, random_projection
from lightning_otrt.transport.reference import move_reference
from lightning_otrt.transport.regression import Regression

#: Decay of the running moments.
MEMORY = 0.9
SOLVE_EVERY = 10


@dataclass
class State:
    """What one pair of blocks keeps between calls.

    Attributes:
        coupling: The rule.
        projection: Of a control, in place of a solution.
        solve_every: Calls between two solves.
        calls: Calls so far.
        reference: Means of the first batch.
        sums: Running sums.
        matrix: What the last solve found.
    """

    coupling: OrthogonalAlignment | Regression
    projection: Tensor | None = None
    solve_every: int = SOLVE_EVERY
    calls: int = 0
    reference: tuple[Tensor, Tensor] | None = None
    sums: Sums = field(default_factory=list)
    matrix: Tensor = field(default_factory=lambda: torch.empty(0))

    @torch.no_grad()
    def observe(self, y: Tensor, x: Tensor) -> None:
        """Feed the running sums with neurons ``(N, n)`` and ``(M, n)``, and solve where that is due."""
        self.reference = self.reference or (y.mean(1, keepdim=True), x.mean(1, keepdim=True))
        new = self.coupling.sums(y, x, self.reference)
        self.sums = [MEMORY * old + part for old, part in zip(self.sums, new, strict=True)] if self.sums else new
        if self.calls in EARLY_SOLVES or self.calls % self.solve_every == 0:
            self.sums, self.reference = move_reference(self.sums, self.reference)
            solved = self.solve()
            self.matrix = solved if bool(solved.isfinite().all()) or not self.calls else self.matrix
        self.calls += 1

    def solve(self) -> Tensor:
        """The matrix of the running sums."""
        if isinstance(self.coupling, Regression):
            return self.coupling.solve(self.sums)
        return self.coupling.solve(self.sums, self.projection)

    def term(self, y: Tensor, x: Tensor) -> Tensor:
        """The term of a batch, differentiable with respect to ``y``."""
        own = y.detach()
        self.observe(own, x)
        value, gradient = self.coupling.value(own, x, self.matrix)
        # A number with the gradient that goes with it.
        return value + ((y - own) * gradient).sum()


class CorrelatedState(State):
    """The state of :class:`Correlated`."""

    def solve(self) -> Tensor:
        """The correlations of the running sums."""
        assert isinstance(self.coupling, OrthogonalAlignment)
        problem = self.coupling.problem(self.sums)
        return self.coupling.align(problem, problem[0]).matrix


class Coupled(nn.Module):
    """The mean over blocks of the term of a coupling; positions of maps pooled to 4 x 4 are observations."""

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()
        sides = zip(student.blocks, teacher.blocks, strict=True)
        self.states: Sequence[State] = [
            self.state(y.shape[-1], x.shape[-1], block) for block, (y, x) in enumerate(sides)
        ]

    def state(self, rows: int, columns: int, block: int) -> State:
        """The state of a pair of blocks of ``rows`` student and ``columns`` teacher neurons."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it keeps for a pair of blocks.")

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """Mean over blocks."""
        sides = ((neurons(y), neurons(x)) for y, x in zip(student.blocks, teacher.blocks, strict=True))
        return torch.stack([state.term(*pair) for state, pair in zip(self.states, sides, strict=True)]).mean()


class Orthogonal(Coupled):
    """Orthogonal alignment; ``power`` as in :class:`OrthogonalAlignment`."""

    def __init__(self, student: Features, teacher: Features, power: float = 1.0) -> None:
        self.power = power
        super().__init__(student, teacher)

    def state(self, rows: int, columns: int, block: int) -> State:
        """A state that solves."""
        return State(OrthogonalAlignment(self.power))


class RandomProjection(Orthogonal):
    """Its control: a fixed random projection of each block, drawn from torch's seed."""

    def state(self, rows: int, columns: int, block: int) -> State:
        """A state that keeps its projection."""
        return State(OrthogonalAlignment(self.power), random_projection(rows, columns, torch.initial_seed() + block))


class Correlated(Orthogonal):
    """The cross-correlation C itself as the coupling, where a rotation has all its singular values set to 1.

    Linear CKA pulls the student towards C x, which is the target here; but this C is the running one.
    """

    def state(self, rows: int, columns: int, block: int) -> State:
        """A state that keeps the singular values."""
        return CorrelatedState(OrthogonalAlignment(self.power))


class LinearRegression(Coupled):
    """1 - R² of the teacher's standardised neurons on the student's; a map of each call."""

    def state(self, rows: int, columns: int, block: int) -> State:
        """A state that solves every call."""
        return State(Regression(), solve_every=1)


def neurons(block: Tensor) -> Tensor:
    """A block (samples, positions, neurons) as neurons ``(N, n)``."""
    return pooled(block, 4).flatten(0, 1).mT
