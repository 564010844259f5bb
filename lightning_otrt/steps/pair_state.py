"""What one pair of layers keeps between calls, and how that is saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.transport.cost import Plan, Sums

__all__ = ["PairState"]


@dataclass
class PairState:
    """What one pair of layers keeps between calls. All tensors are on the student's device and carry no graph.

    Attributes:
        plan: The plan in use.
        potential: Where the next Sinkhorn solve starts from.
        sums: Decayed sums of the running cost.
        reference: Points near the neurons' means around which the sums are taken.
        energy: Decayed sum of squares and count of the teacher.
        memory: Decay of the running cost, once chosen.
        samples: Finite samples behind a static plan, which is final once there are enough of them.
    """

    plan: Plan | None = None
    potential: Tensor | None = None
    sums: Sums | None = None
    reference: tuple[Tensor, Tensor] | None = None
    energy: Tensor | None = None
    memory: float | None = None
    samples: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, lists and numbers, which :func:`torch.load` reads with ``weights_only=True``."""
        return {
            "plan": None if self.plan is None else self.plan.matrix,
            # Not summed again, since they would differ in the last bits.
            "masses": None if self.plan is None else list(self.plan[1:]),
            "potential": self.potential,
            # A copy: the running sums go on in place.
            "sums": None if self.sums is None else [value.clone() for value in self.sums],
            "reference": None if self.reference is None else list(self.reference),
            "energy": self.energy,
            "memory": self.memory,
            "samples": self.samples,
        }

    @classmethod
    def of(cls, saved: dict[str, Any], memory: float | None, device: torch.device) -> PairState:
        """The state behind :meth:`state_dict`, on a device, with the memory of this run."""

        def here(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        plan, sums, reference = saved["plan"], saved["sums"], saved["reference"]
        return cls(
            plan=None if plan is None else Plan(*(part.to(device) for part in (plan, *saved["masses"]))),
            potential=here(saved["potential"]),
            # A copy, again: they are added to in place. Without memory nothing would add to them.
            sums=None if sums is None or not memory else [value.to(device, copy=True) for value in sums],
            reference=None if reference is None else tuple(value.to(device) for value in reference),
            energy=here(saved["energy"]),
            memory=memory,
            samples=saved["samples"],
        )
