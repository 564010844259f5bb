"""Checks in a fit that the term has an effect: it is in the loss, has a weight and reaches trained parameters."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_otrt.notices import rank_zero_warn
from lightning_otrt.reading.student_root.gradient_reach import leaves_of
from lightning_otrt.schedules import Schedule

__all__ = ["EffectChecks"]


class EffectChecks:
    """Counts the training steps of one fit and their terms. Its errors and warnings say why a term has no effect."""

    def __init__(self) -> None:
        self._all = self._active = self._skipped = self._terms = 0
        self._are_leaves_checked = False

    def count_step(self, is_active: bool) -> None:
        """The training step that adds the term runs.

        Args:
            is_active: Whether some term has a weight in it.
        """
        self._all += 1
        self._active += is_active

    def skip(self, is_active: bool) -> None:
        """A step has no loss on purpose."""
        self._skipped += is_active

    def check_epoch(self, module: pl.LightningModule) -> None:
        """At the end of an epoch. A single step without a term may be that of a GAN's critic.

        Raises:
            MisconfigurationException: If all steps so far were without a term.
        """
        steps = self._active - self._skipped
        if steps <= 0 or self._terms:
            return
        kind = type(module).__name__
        if module.automatic_optimization:
            raise MisconfigurationException(
                f"In {steps} training steps of {kind} the transfer term was never added. Likely causes are a loop that "
                "does not take the loss from `training_step`, batches with too few observations, and layers that are "
                "skipped in each step. Return the loss from `training_step`, as a tensor or under the key 'loss', and "
                "look at `callback.transfer.distances`."
            )
        raise MisconfigurationException(
            f"{kind} uses manual optimization, and in {steps} training steps no `self.manual_backward(loss)` came "
            "after a forward of the student with gradient, so the transfer term was never added. Call the student as a "
            "module (not `.forward`), with its parameters unfrozen, before `self.manual_backward(loss)`; or pass the "
            "name of what is called as `student_root`."
        )

    def check_schedule(self, schedule: Schedule | None) -> None:
        """At the end of the fit: warn if the schedule gave 0 in all steps."""
        if self._all and not self._active:
            rank_zero_warn(
                f"The weight of the transfer term was 0 in all {self._all} training steps of this fit, because "
                f"`schedule` ({schedule!r}) gave 0: the teacher had no effect. Check that its steps are those of "
                "`trainer.global_step`."
            )

    def check_term(self, term: Tensor, module: pl.LightningModule, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Count a term, and warn once if it reaches only parameters that no optimizer has."""
        self._terms += 1
        if self._are_leaves_checked:
            return
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        leaves, _ = leaves_of([term])
        # A process that skipped the layers in this step has no leaves. Then look again in the next step.
        self._are_leaves_checked = bool(leaves)
        trained = {
            parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
        }
        # FSDP computes with parameters of its own, which cannot be compared here.
        if leaves and leaves <= names.keys() and not leaves & trained:
            reached = sorted(names[parameter] for parameter in leaves)
            rank_zero_warn(
                f"The transfer term has no effect: it reaches the parameters {reached[:5]} alone, {len(reached)} in "
                "all, and no optimizer holds one of them. Give them to the optimizer in `configure_optimizers`, or "
                "choose `layers` that come after trained parameters."
            )
