"""A callback that logs distances, plans and gradients of a running transfer, and warns where something is wrong."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_otrt.checks import check_count, check_flag, constructor_call
from lightning_otrt.trainer.lightning_internals import batches_before, logged_step
from lightning_otrt.trainer.monitored_transfer import MonitoredTransfer
from lightning_otrt.trainer.transfer_callback import TransferCallback

__all__ = ["OTRTMonitor"]


class OTRTMonitor(pl.Callback):
    r"""Logs what the transfer does, and warns where an option should be changed.

    It finds the :class:`OTRTCallback` of the Trainer, or the callback of a wrapped module, by itself. With k =
    ``every_n_steps`` it logs at every k-th batch, for each pair, by the name of its student layer:

    - ``otrt/off_identity/<layer>``: the share of the plan's mass off its diagonal, if both layers have one width: how
      many neurons are not matched to the neuron of the same index;
    - ``otrt/marginal_error/<layer>``: how far the plan is from the teacher's masses (L1, of a total of 1);
    - ``otrt/entropy/<layer>``: the entropy of the plan, as a share of that of a uniform plan, which matches nothing;
    - ``otrt/directions/<layer>``, in place of these three, of a solved rotation: over how many directions of the
      teacher the agreement spreads, :math:`(\sum s)^2 / \sum s^2` of the singular values s of the cross-correlation;
    - ``otrt/layer_share/<layer>`` and ``otrt/gradient_share``: :math:`\alpha g / (\alpha g + t)`, with the norms
      :math:`\alpha g` of the gradient of the weighted term and t of that of the task, at the output of the layer and at
      all of them;
    - with ``distillation`` also ``otrt/distillation_share``: the same for the logits. All shares are then parts of the
      sum of the three norms.

    At every validation of each ``every_n_epochs``-th epoch it logs ``val/otrt/<layer>``, the distance over the whole
    validation set (:class:`NeuronTransportDistance`), which a ``ModelCheckpoint`` or ``EarlyStopping`` may monitor. It
    does so where the weight is 0, too, so that a plain baseline, ``OTRTCallback(teacher, weight=0.0)``, has its curve.
    At the end of such an epoch it gives heat maps of the plans, or the singular values of orthogonal couplings, to
    TensorBoard, W&B and MLflow, or puts them next to the file of a CSV logger. With several transfers the names of the
    second end with ``-2``.

    It warns once, and says what to change, if a plan is solved from fewer observations than there are neurons; if a
    student that starts as a copy of its teacher differs from it by BatchNorm layers in train mode; if a plan is nearly
    uniform; and if the gradient of the term is much smaller or larger than that of the task.

    Every k-th batch costs a second backward pass down to the first recorded layer and one wait for the device; every
    batch of validation costs a forward of the teacher.

    Args:
        every_n_steps: k, in training batches; None: ``log_every_n_steps`` of the Trainer, which may be 0: never.
        every_n_epochs: Epochs between two looks at validation distances and plans.
        gradients: Whether to measure the share of the gradient.
        validation: Whether to measure distances in validation, where the teacher then runs too.
        figures: Whether to draw the plans. Without matplotlib there is a warning instead.

    Raises:
        TypeError: If a number of steps or epochs is no integer, or a flag is not True or False.
        ValueError: If a number of steps or epochs is not positive.
        MisconfigurationException: At the start of ``fit``, if there is no transfer.

    Example:
        >>> import lightning as L
        >>> from torch import nn
        >>> from lightning_otrt import OTRTCallback, OTRTMonitor
        >>> transfer = OTRTCallback(nn.Linear(32, 2), layers={"layer": ""})
        >>> trainer = L.Trainer(callbacks=[transfer, OTRTMonitor(every_n_steps=100)], accelerator="cpu", logger=False)
        >>> trainer.callbacks[1]
        OTRTMonitor(every_n_steps=100)
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int = 1,
        *,
        gradients: bool = True,
        validation: bool = True,
        figures: bool = True,
    ) -> None:
        super().__init__()
        check_count("every_n_steps", every_n_steps, optional=True)
        check_count("every_n_epochs", every_n_epochs)
        for name, flag in (("gradients", gradients), ("validation", validation), ("figures", figures)):
            check_flag(name, flag)
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.gradients, self.validation, self.figures = gradients, validation, figures
        self._monitored: list[MonitoredTransfer] = []
        #: Whether figures can be drawn in this fit, as far as is known.
        self._draws = True
        self._is_due = False

    @override
    def __repr__(self) -> str:
        """The constructor call, with the arguments that differ from their defaults."""
        return constructor_call(self)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the transfers of the Trainer and the module."""
        if stage != "fit":
            return
        found = [callback for callback in trainer.callbacks if isinstance(callback, TransferCallback)]  # type: ignore[attr-defined]
        if not found:
            raise MisconfigurationException(
                "OTRTMonitor found no representation transfer: the Trainer has no OTRTCallback, and the "
                "module is not wrapped by OTRTModule. Add OTRTCallback(teacher, ...) to `callbacks`, or remove the "
                "monitor."
            )
        self._draws = True
        self._monitored = [
            MonitoredTransfer(callback.transfer, f"-{number}" if number > 1 else "")
            for number, callback in enumerate(found, 1)
        ]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure this step if it is due, or if it is the first one, which some warnings are about."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._is_due = every > 0 and (batches_before(trainer) + 1) % every == 0
        validation = self.validation and trainer.enable_validation
        for monitored in self._monitored:
            monitored.stop(pl_module)  # where a hook skipped the rest of an epoch, the last step never ended
            if self._is_due or not monitored.has_started:
                # Not in `setup`: the term of the transfer has to be added before.
                monitored.start(pl_module, gradients=self.gradients and self._is_due, validation=validation)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Measure the gradients of task and term, while the graph of the loss exists."""
        for monitored in self._monitored:
            monitored.measure(loss)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the values of the step."""
        for monitored in self._monitored:
            monitored.stop(pl_module)
            if self._is_due:
                self._log(trainer, monitored.values())
        self._is_due = False  # for a batch that is None, Lightning calls only this hook

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to record. Before the first training step the layers are not known, so nothing is recorded."""
        if self.validation and self._is_due_epoch(trainer) and not trainer.sanity_checking:
            for monitored in self._monitored:
                monitored.open_validation(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the distances over the validation set."""
        for monitored in self._monitored:
            for name, value in monitored.close_validation():
                pl_module.log(name, value, sync_dist=trainer.world_size > 1, batch_size=1)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the plans."""
        if self.figures and self._draws and trainer.is_global_zero and trainer.loggers and self._is_due_epoch(trainer):
            for monitored in self._monitored:
                self._draws = self._draws and monitored.draw(trainer.loggers, logged_step(trainer))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove all hooks."""
        if stage == "fit":
            self._release(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same: Lightning does not call ``teardown`` after an exception."""
        self._release(pl_module)

    def _release(self, pl_module: pl.LightningModule) -> None:
        for monitored in self._monitored:
            monitored.stop(pl_module)
            monitored.close_validation(compute=False)
        self._monitored = []

    def _is_due_epoch(self, trainer: pl.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _log(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        # Not through the module: it logs only at multiples of the Trainer's `log_every_n_steps`.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logged_step(trainer))
