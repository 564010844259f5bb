"""The term of a transfer in one fit: records the training step, forms the term and logs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_otrt.reading.student_root.gradient_reach import have_shared_leaves
from lightning_otrt.trainer.effect_checks import EffectChecks
from lightning_otrt.trainer.lightning_internals import batch_number
from lightning_otrt.trainer.reevaluations import Reevaluations
from lightning_otrt.trainer.training_step import ExtraTerm
from lightning_otrt.transfer import RepresentationTransfer

__all__ = ["TransferTerm"]

#: Names under which terms are logged. On a CPU they are shown in the progress bar, too.
_TERMS = ("train/otrt", "train/distillation")


class TransferTerm(ExtraTerm):
    """What a callback adds to the loss of a module in one fit.

    Args:
        transfer: The transfer.
        trainer: The Trainer.
        module: The module that is trained. It logs the values.
    """

    def __init__(self, transfer: RepresentationTransfer, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.transfer, self.trainer, self.module = transfer, trainer, module
        #: Closures of optimizers under manual optimization.
        self.reevaluations = Reevaluations()
        self.restart()

    def restart(self) -> None:
        """Forget the trial steps of finders."""
        self.effect = EffectChecks()
        #: Whether the training step of this batch has run.
        self.has_run = False
        #: Whether an optimizer evaluates the same batch again.
        self._again = False
        #: Whether the forwards of this training step have given a term.
        self._is_taken = False
        self.forget_batch()

    def forget_batch(self) -> None:
        """Take the next batch for another one, whatever its number: a finder counts its own and goes back."""
        self._batch: int | None = None

    def attach(self) -> None:
        """Attach the transfer to the module, unless it is."""
        if self.transfer.student is None:
            self.transfer.attach(self.module)

    @property
    @override
    def is_training(self) -> bool:
        """Whether the Trainer trains, and does not validate in between."""
        return self.trainer.training

    @override
    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Record while the user's training step runs."""
        self.attach()  # finders that come before the callback train before its `on_fit_start`
        self.transfer.step = self.trainer.global_step
        batch = batch_number(self.trainer)
        self._again, self._batch = batch is not None and batch == self._batch, batch
        if not self.module.automatic_optimization:
            self.reevaluations.watch(self.trainer.optimizers)
        self.has_run, self._is_taken = True, False
        self.effect.count_step(self.transfer.is_active)
        with self.transfer.recording():
            yield

    @override
    def term(self, position: int) -> Tensor | None:
        """The weighted term of the forwards since the last call; None if all weights are 0. It is logged."""
        transfer = self.transfer
        # Under manual optimization a training step may have many terms, and steps of optimizers between them.
        transfer.step = self.trainer.global_step
        weights = transfer.current_weights
        if not any(weights):
            transfer.skip()
            self._log(position, {"otrt/weight": 0.0}, samples=1)
            return None
        again = self.reevaluations.is_again() or self._again
        loss = transfer.loss(reevaluation=again)
        if not self.module.automatic_optimization:
            transfer.step = self.trainer.global_step
        self._is_taken = True
        distances = {
            f"otrt/distance/{label}": distance.value
            for label, distance in zip(transfer.labels, transfer.distances, strict=False)
            if not distance.is_skipped
        }
        # Where all pairs are skipped, the transport is a zero that says nothing.
        both = (transfer.transport_value if distances else None, transfer.distillation_value)
        terms = {name: value for name, value in zip(_TERMS, both, strict=True) if value is not None}
        self._log(position, {"otrt/weight": weights.transport, **distances, **terms}, transfer.samples)
        if terms:
            self.effect.check_term(loss, self.module, self.trainer.optimizers)
        return loss

    @override
    def has_term(self) -> bool:
        """Whether a forward was recorded whose term is not in a loss yet."""
        return self.transfer.has_views

    @override
    def belongs_to(self, loss: Tensor) -> bool:
        """Whether a loss may train what the recorded forwards train."""
        recorded = (reading for view in self.transfer.views for reading in view.recorded)
        return have_shared_leaves(loss, (reading for reading in recorded if reading.requires_grad))

    @override
    def discard(self) -> None:
        """Forget the forwards that no loss has taken."""
        # Where a term has taken them, and no other came since, nothing is left.
        if self.transfer.views or not self._is_taken:
            self.transfer.discard()

    @override
    def skip(self) -> None:
        """Count a step that has no loss on purpose."""
        self.effect.skip(self.transfer.is_active)

    def _log(self, position: int, values: dict[str, Any], samples: int) -> None:
        """Log in the student's module.

        Nothing of it waits for a device. Lightning puts plain numbers there, in a copy that waits, so they are logged
        as tensors on the CPU. What is shown in the progress bar it reads in each step, even where there is no bar.
        """
        # So that two callbacks on one module do not log under the same names.
        suffix = f"-{position + 1}" if position else ""
        for name, value in values.items():
            if not isinstance(value, Tensor):
                value = torch.tensor(value, device="cpu")
            shown = name in _TERMS and value.device.type == "cpu"
            self.module.log(f"{name}{suffix}", value, prog_bar=shown, batch_size=max(samples, 1))
