"""The base class of ground costs between neurons, and the transport plan that they are evaluated with.

Student neurons are the rows of ``y`` ``(..., N, n)``, teacher neurons those of ``x`` ``(..., M, n)``; leading
dimensions are a batch of pairs. All methods run without autograd and return gradients in closed form (by the envelope
theorem the plan is a constant), so that no graph over a cost matrix is ever kept.

What a cost needs of a mini-batch are sums over observations. They add over views, over steps (the running cost) and
over processes (the global batch). In one process :meth:`Cost.value` gives value and gradient; :meth:`Cost.shared_value`
gives those of several processes that exchange their sums.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_otrt.transport.tensors import expanded, finite

__all__ = [
    "Cost",
    "Evaluate",
    "Plan",
    "Rounds",
    "Sums",
    "ValueAndGradient",
    "all_finite",
    "decay_and_add",
    "finite_and_factor",
]

Sums = list[Tensor]
ValueAndGradient = tuple[Tensor, Tensor]
Rounds = Generator[Sums, Sums, ValueAndGradient]


class Plan(NamedTuple):
    """A transport plan with its own masses, which differ from 1/N and 1/M if the solver has not converged.

    Attributes:
        matrix: ``(..., N, M)``.
        student_mass: Row sums a, ``(..., N)``.
        teacher_mass: Column sums b, ``(..., M)``.
    """

    matrix: Tensor
    student_mass: Tensor
    teacher_mass: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Plan:
        """The plan of a matrix, with the masses that the matrix has.

        Example:
            >>> Plan.of(torch.tensor([[0.5, 0.0], [0.25, 0.25]])).teacher_mass
            tensor([0.7500, 0.2500])
        """
        return cls(matrix, matrix.sum(-1), matrix.sum(-2))

    @classmethod
    def fallback(cls, rows: int, columns: int) -> tuple[float, ...]:
        """The entries of each part where no solve has found a plan yet: those of the uniform plan."""
        return 1 / (rows * columns), 1 / rows, 1 / columns


#: Value and gradient of a batch, from its plan.
Evaluate: TypeAlias = Callable[[Plan], ValueAndGradient]


class Cost(ABC):
    """A ground cost M between student and teacher neurons."""

    #: The name of the cost, the same in every process and run.
    name: str
    #: Whether it is a function of sums over observations, which can be added over batches and processes.
    additive: bool = True
    #: Whether the mean square of the teacher scales the cost (see :meth:`energy`).
    scaled: bool = False
    #: Fewest observations from which the cost can be computed.
    min_observations: int = 1
    #: Whether it is operations on the device alone, as a CUDA graph is.
    can_be_captured: bool = True

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """Sums over the observations of ``y`` and ``x`` from which :meth:`matrix` follows.

        Args:
            y: Student neurons ``(..., N, n)``.
            x: Teacher neurons ``(..., M, n)``.
            reference: Points ``(..., N, 1)`` and ``(..., M, 1)`` near the neurons' means. Sums that are added to others
                must share it; None takes the means of this batch.
        """

    @abstractmethod
    def matrix(self, sums: Sums, energy: Tensor | None) -> Tensor:
        """The cost matrix ``(..., N, M)`` of the observations behind ``sums``."""

    def check_matrix(self, matrix: Tensor) -> None:
        """Raise a ValueError if no plan can be solved from a cost matrix, where users may have made it."""
        return

    def accumulate(
        self, running: Sums, decay: float, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> Sums:
        """``decay`` times ``running`` plus :meth:`sums`; ``running`` may be overwritten.

        A batch that is not finite changes nothing. Whether it is finite is decided on the device.
        """
        new = self.sums(y, x, reference)
        return decay_and_add(running, decay, new, all_finite(new))

    @abstractmethod
    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor | None) -> ValueAndGradient:
        """⟨P, M⟩ on these observations and its gradient with respect to ``y``, the plan held fixed.

        Args:
            y: Student neurons ``(..., N, n)``.
            x: Teacher neurons ``(..., M, n)``.
            plan: The plan.
            energy: The scale of the teacher; see :meth:`energy`. None for a cost that is not :attr:`scaled`.

        Returns:
            The value ``(...)`` and the gradient, of the shape of ``y``.
        """

    def matrix_and_value(self, y: Tensor, x: Tensor, energy: Tensor | None) -> tuple[Tensor, Evaluate]:
        """The cost matrix of these observations alone, and their :meth:`value` as a function of the plan.

        What both need is computed once. The function may be called once, and overwrites the matrix.

        Args:
            y: Student neurons ``(..., N, n)``.
            x: Teacher neurons ``(..., M, n)``.
            energy: See :meth:`value`.
        """
        matrix = self.matrix(self.sums(y, x), energy).to(y.dtype)
        return matrix, lambda plan: self.value(y, x, plan, energy)

    def shared_value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor | None) -> Rounds:
        """:meth:`value` where several processes each hold a part of the observations.

        A generator. It yields sums over the observations of this process, and has to be sent the same sums over those
        of all processes. It returns the value over all observations, and the gradient with respect to ``y``.

        Args:
            y: Student neurons ``(..., N, n)`` of this process.
            x: Teacher neurons ``(..., M, n)`` of this process.
            plan: The plan, the same on all processes.
            energy: :meth:`energy` of this process.

        Raises:
            NotImplementedError: If the cost is not :attr:`additive`.
        """
        raise NotImplementedError(f"The cost {self.name!r} is no sum over observations, so it has no global batch.")

    def value_of_sums(
        self, y: Tensor, x: Tensor, plan: Plan, sums: Sums, energy: Tensor | None, reference: tuple[Tensor, Tensor]
    ) -> ValueAndGradient:
        """What :meth:`shared_value` returns, without any exchange, where the sums of all processes are known.

        Args:
            y: Student neurons ``(N, n)`` of this process.
            x: Teacher neurons ``(M, n)`` of this process.
            plan: The plan.
            sums: :meth:`sums` of this batch around ``reference``, over all processes.
            energy: :meth:`energy`, over all processes.
            reference: The points of :meth:`sums`.

        Raises:
            NotImplementedError: If the cost is not :attr:`additive`.
        """
        raise NotImplementedError(f"The cost {self.name!r} is no sum over observations, so it has no global batch.")

    def means(self, sums: Sums, reference: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The best ``reference`` for the next sums: the neurons' means if ``sums`` contain them, else the old one."""
        return reference

    def energy(self, x: Tensor) -> Tensor:
        """Sum of squares and count of the raw teacher, ``(..., 2)``. Both are additive; their ratio is the scale s²."""
        total = torch.linalg.vecdot(x.flatten(-2), x.flatten(-2))
        return torch.stack((total, torch.full_like(total, x.shape[-1] * x.shape[-2])), -1)


def all_finite(sums: Sums) -> Tensor:
    """Whether all sums are finite in the type of the last of them, on their device: a boolean for each of a batch.

    The first of them, the count, has the dimensions of the batch and no others.
    """
    batch, dtype = sums[0].dim(), sums[-1].dtype
    totals = [part if part.dim() == batch else part.flatten(batch).sum(-1) for part in sums]
    return finite(functools.reduce(torch.add, [part.to(dtype) for part in totals]))


def finite_and_factor(total: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Whether a sum over a batch is finite, and ``decay`` where it is, else 1."""
    is_finite = finite(total)
    return is_finite, torch.where(is_finite, total.new_full((), decay), 1.0)  # two Python numbers would give float32


def decay_and_add(running: Sums, decay: float, new: Sums, is_finite: Tensor) -> Sums:
    """``decay`` times ``running`` plus ``new``, or ``running`` unchanged where ``is_finite`` of the batch is false."""
    # One rounding of the decay for sums of all types: two would let their means drift apart.
    factor = running[-1].new_full((), decay)
    return [
        torch.where(expanded(is_finite, old), factor * old + part, old) for old, part in zip(running, new, strict=True)
    ]
