"""What one pair of layers keeps between calls, and how that is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_otrt.transport.cost import Plan, Sums
from lightning_otrt.transport.orthogonal import Alignment
from lightning_otrt.transport.tensors import all_nonzero, expanded

__all__ = ["PairState", "Solved"]


class Solved(NamedTuple):
    """A new plan for one pair, or several with a leading dimension.

    Attributes:
        plan: The plan, or the alignment of an orthogonal coupling.
        potential: Where the next solve may start, ``(M,)``; None for a solver that always starts from scratch.
        is_finite: False where cost or plan have values that are not finite. It stays on the device.
    """

    plan: Plan | Alignment
    potential: Tensor | None
    is_finite: Tensor


@dataclass
class PairState:
    """What one pair of layers keeps between calls. All tensors are on the student's device and carry no graph.

    Attributes:
        plan: The plan in use, or the alignment of an orthogonal coupling.
        potential: Where the next Sinkhorn solve starts from, or the projection that a random alignment keeps.
        sums: Decayed sums of the running cost.
        reference: Points near the neurons' means around which the sums are taken.
        energy: Decayed sum of squares and count of the teacher.
        memory: Decay of the running cost; None until the first call has chosen it.
        samples: Finite samples behind a static plan, which is final once there are enough of them.
        has_run: Whether the layers of the pair ran in some call.
    """

    plan: Plan | Alignment | None = None
    potential: Tensor | None = None
    sums: Sums | None = None
    reference: tuple[Tensor, Tensor] | None = None
    energy: Tensor | None = None
    memory: float | None = None
    samples: int = 0
    has_run: bool = False

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        single = [tensor for tensor in (self.potential, self.energy) if tensor is not None]
        return [*(self.plan or ()), *(self.sums or ()), *(self.reference or ()), *single]

    def layout(self) -> tuple[Any, ...]:
        """What :meth:`tensors` are; equal for states that have the same ones."""
        parts = (self.sums, self.reference, self.potential, self.energy)
        return type(self.plan), *(part is None for part in parts)

    def take(self, like: PairState, tensors: Sequence[Tensor]) -> None:
        """Become a state like another one, with these tensors."""
        rest = iter(tensors)
        self.plan = None if like.plan is None else type(like.plan)(*(next(rest) for _ in like.plan))
        self.sums = None if like.sums is None else [next(rest) for _ in like.sums]
        self.reference = None if like.reference is None else (next(rest), next(rest))
        self.potential = None if like.potential is None else next(rest)
        self.energy = None if like.energy is None else next(rest)
        self.memory, self.samples, self.has_run = like.memory, like.samples, like.has_run

    def keep(self, solved: Solved) -> None:
        """Take a new plan. If it is not finite, keep the old one, or start with the one that matches nothing."""
        plan, potential, is_finite = solved
        if all_nonzero(is_finite):
            self.plan, self.potential = plan, self.potential if potential is None else potential
            return
        older: Sequence[Tensor | float] = self.plan or plan.fallback(*plan.matrix.shape[-2:])
        self.plan = type(plan)(*(_where(is_finite, new, old) for new, old in zip(plan, older, strict=True)))
        if potential is not None:
            self.potential = _where(is_finite, potential, 0.0 if self.potential is None else self.potential)

    def check_plan(self, y: Tensor, x: Tensor, where: str) -> None:
        """Take the device and precision of this batch, and compare the plan's shape with it.

        Both may be new: a state may have been loaded before the student was moved.

        Args:
            y: Student neurons ``(N, n)``.
            x: Teacher neurons ``(M, n)``.
            where: The layers, for the error.

        Raises:
            ValueError: If the plan is not ``(N, M)``.
        """
        tensors = self.tensors()
        if tensors and tensors[0].device != y.device:
            self.take(self, [tensor.to(y.device) for tensor in tensors])
        if self.plan is None:
            return
        if self.plan.matrix.shape != (y.shape[0], x.shape[0]):
            raise ValueError(
                f"{where} has {y.shape[0]} student and {x.shape[0]} teacher neurons, but its plan, from earlier "
                f"calls or from a checkpoint, has the shape {tuple(self.plan.matrix.shape)}. Use the networks of that "
                "run, or call `reset()` to start anew."
            )
        if self.plan.matrix.dtype != y.dtype:
            self.plan = type(self.plan)(*(part.to(y.dtype) for part in self.plan))
            if self.potential is not None:
                self.potential = self.potential.to(y.dtype)
            if self.reference is not None:
                self.reference = self.reference[0].to(y.dtype), self.reference[1].to(y.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, lists and numbers, which :func:`torch.load` reads with ``weights_only=True``."""
        return {
            "plan": None if self.plan is None else self.plan.matrix,
            # Its masses, for example. Saved, not computed again from the matrix: that would change their last bits.
            "parts": None if self.plan is None else list(self.plan[1:]),
            "potential": self.potential,
            # A copy: later calls add to the running sums in place.
            "sums": None if self.sums is None else [value.clone() for value in self.sums],
            "reference": None if self.reference is None else list(self.reference),
            "energy": self.energy,
            "memory": self.memory,
            "samples": self.samples,
            "has_run": self.has_run,
        }

    @classmethod
    def of(
        cls, saved: dict[str, Any], memory: float | None, device: torch.device, kind: type[Plan | Alignment] = Plan
    ) -> PairState:
        """The state behind :meth:`state_dict`, on a device, with the memory of this run and its kind of plan."""

        def here(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        plan, sums, reference = saved["plan"], saved["sums"], saved["reference"]
        return cls(
            plan=None if plan is None else kind(*(part.to(device) for part in (plan, *saved["parts"]))),
            potential=here(saved["potential"]),
            # A copy, for the same reason. Without memory nothing would add to the sums, so they are dropped.
            sums=None if sums is None or not memory else [value.to(device, copy=True) for value in sums],
            reference=None if reference is None else tuple(value.to(device) for value in reference),
            energy=here(saved["energy"]),
            memory=memory,
            samples=saved["samples"],
            has_run=saved["has_run"],
        )


def _where(is_finite: Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    """``new`` where it is finite, else ``old``."""
    return torch.where(expanded(is_finite, new), new, old)
