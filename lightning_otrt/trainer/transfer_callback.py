"""What the callback does in a fit: attach, record, log, save. ``training_step.py`` adds the term to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_otrt.layers.pairs import LayerSpec
from lightning_otrt.options import OPTIONS, TransferOptions
from lightning_otrt.reading.student_root.gradient_reach import have_shared_leaves
from lightning_otrt.schedules import Schedule
from lightning_otrt.teacher.loading.load import TeacherSource
from lightning_otrt.trainer.effect_checks import EffectChecks
from lightning_otrt.trainer.strategies import shared_batch, student_dtype
from lightning_otrt.trainer.training_step import ExtraTerm, add_term, remove_term
from lightning_otrt.transfer import RepresentationTransfer

__all__ = ["TransferCallback"]


class TransferCallback(pl.Callback, ExtraTerm):
    """What :class:`OTRTCallback` and the callback inside :class:`OTRTModule` share: the transfer in a Trainer.

    Options of the transfer can be read here, and ``weight`` and ``schedule`` can be set.

    Args:
        teacher: A teacher, or a :class:`RepresentationTransfer` with layers and options of its own.
        layers: Layers for a teacher.
        options: Options for a teacher.

    Raises:
        TypeError: If there are layers or options for a :class:`RepresentationTransfer`.
        ValueError: If that has a process group.
    """

    #: The transfer, with the resolved pairs and the distances of the last step.
    transfer: RepresentationTransfer
    #: Options of the transfer, which can be set here at any time.
    weight: float
    schedule: Schedule | None

    def __init__(
        self, teacher: TeacherSource | RepresentationTransfer, layers: LayerSpec, options: TransferOptions
    ) -> None:
        super().__init__()
        transfer = _transfer_of(teacher, layers, options)
        self.transfer = transfer
        transfer.report = transfer.report or rank_zero_info
        settings = {
            "teacher": transfer.teacher.checksum(),
            "layers": repr(transfer.layers),
            "root": transfer.student_root,
            "cost": str(transfer.ground_cost),
        }
        # None of them can change. Lightning reads the key at each of its hooks.
        self._state_key = f"{type(self).__qualname__}{settings}"
        self._module: pl.LightningModule | None = None
        self._trainer: pl.Trainer | None = None
        self._resumed = False
        self._batch: tuple[int, int] | None = None
        self._again = False
        self._effect = EffectChecks()

    if not TYPE_CHECKING:  # a type checker would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """An option of the transfer."""
            if name in OPTIONS and "transfer" in vars(self):
                return getattr(self.transfer, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option on the transfer, which refuses those that cannot change; or an attribute of the callback."""
        if name in OPTIONS and "transfer" in vars(self):
            setattr(self.transfer, name, value)
        else:
            super().__setattr__(name, value)

    @override
    def __repr__(self) -> str:
        """The constructor call, with the options that differ from their defaults."""
        return self.transfer.constructor_call(type(self).__name__)

    @property
    @override
    def state_key(self) -> str:
        """Tells several callbacks apart. What may change in a resume, such as the weight, is not in it."""
        return self._state_key

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Add the term to the training step. Later is too late: learning rate finders train before the fit starts."""
        if stage != "fit":
            return
        if not (isinstance(trainer, pl.Trainer) and isinstance(pl_module, pl.LightningModule)):
            raise MisconfigurationException(
                f"{type(self).__name__} is a callback of the `lightning` package, but this Trainer or LightningModule "
                "is one of `pytorch_lightning`. Use one of the two throughout: `import lightning as L`."
            )
        transfer = self.transfer
        transfer.run_state.processes.set(*shared_batch(trainer, strict=transfer.strict))
        transfer.teacher.follow(student_dtype(trainer))
        self._trainer, self._module = trainer, pl_module
        self._batch = None
        # The module's own `setup` comes after this one, and may build the network, as `configure_model` may.
        if not any(is_overridden(name, pl_module) for name in ("setup", "configure_model")):
            transfer.attach(pl_module)
        add_term(pl_module, self)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to a module whose layers exist only after its own ``setup`` or ``configure_model``."""
        self._attach()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the trial steps of finders, unless a checkpoint was loaded."""
        if not self._resumed:
            self.transfer.reset()
        self.transfer.check_every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self._batch = None
        self._effect = EffectChecks()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the cache of the teacher read what other processes have written."""
        if self.transfer.cache is not None:
            self.transfer.cache.start_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to check that the training step of ``setup`` is still the one that runs."""
        self._effect.start_batch()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise if another training step ran."""
        if self.transfer.strict:
            self._effect.check_batch(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise where all steps so far were without a term. A single step without one may be that of a GAN's critic."""
        if self.transfer.cache is not None:
            self.transfer.cache.end_epoch()
        self.transfer.check_layers()
        if self.transfer.strict:
            self._effect.check_epoch(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report values that were not finite, and bring the statistics of all processes together."""
        self.transfer.check_finite()
        self.transfer.synchronize()
        if self.transfer.has_weight and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._effect.check_schedule(self.transfer.schedule)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the term and all hooks, and restore the teacher."""
        if stage == "fit":
            self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same: Lightning does not call ``teardown`` after an exception."""
        self._release()

    def _attach(self) -> None:
        assert self._module is not None
        if not self.transfer.is_attached:
            self.transfer.attach(self._module)

    def _release(self) -> None:
        if self._module is not None:
            remove_term(self._module, self)
        self.transfer.detach()
        self.transfer.run_state.forget_processes()
        self._module = self._trainer = None
        self._resumed = False

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Record while the user's training step runs."""
        assert self._trainer is not None
        self._attach()  # finders that come before this callback train before its `on_fit_start`
        trainer = self._trainer
        self.transfer.step = trainer.global_step
        batch = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.total.ready)
        self._again, self._batch = batch == self._batch, batch
        self._effect.start_step(self.transfer.is_active)
        with self.transfer.recording():
            yield

    def has_term(self) -> bool:
        """Whether a forward was recorded whose term is not in a loss yet."""
        return self.transfer.has_views

    def belongs_to(self, loss: Tensor) -> bool:
        """Whether a loss may train what the recorded forwards train."""
        recorded = (reading for view in self.transfer.views for reading in view.recorded)
        return have_shared_leaves(loss, (reading for reading in recorded if reading.requires_grad))

    def discard(self) -> None:
        """Forget the forwards that no loss has taken."""
        self.transfer.discard()

    def skip(self) -> None:
        """Count a step that has no loss on purpose."""
        self._effect.skip(self.transfer.is_active)

    def term(self, position: int) -> Tensor | None:
        """The weighted term of the forwards since the last call; None if all weights are 0. It is logged."""
        transfer = self.transfer
        weights = transfer.current_weights
        if not any(weights):
            self._log(position, {"otrt/weight": 0.0}, samples=1)
            return None
        loss = transfer.loss(reevaluation=self._again)
        layers = {
            f"otrt/{label}": distance.value
            for label, distance in zip(transfer.labels, transfer.distances, strict=False)
            if not distance.is_skipped
        }
        values = {"train/otrt": transfer.transport_value if layers else None}
        values["train/distillation"] = transfer.distillation_value
        terms = {name: value for name, value in values.items() if value is not None}
        samples = transfer.samples
        self._log(position, {"otrt/weight": weights.transport, **layers}, samples)
        if terms:
            self._log(position, terms, samples, prog_bar=True)
            assert self._trainer is not None
            assert self._module is not None
            self._effect.check_term(loss, self._module, self._trainer.optimizers)
        return loss

    def _log(self, position: int, values: dict[str, Any], samples: int, *, prog_bar: bool = False) -> None:
        """Log in the student's module.

        Nothing of it waits for a device. Lightning puts plain numbers there, in a copy that waits, so they are logged
        as tensors on the CPU. What is shown in the progress bar it reads in each step, even where there is no bar.
        """
        assert self._module is not None
        # So that two callbacks on one module do not log under the same names.
        suffix = f"-{position + 1}" if position else ""
        for name, value in values.items():
            if not isinstance(value, Tensor):
                value = torch.tensor(value, device="cpu")
            shown = prog_bar and value.device.type == "cpu"
            self._module.log(f"{name}{suffix}", value, prog_bar=shown, batch_size=max(samples, 1))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plans, statistics and counters; not the teacher."""
        # All processes save together. Not so after an error: the others may wait elsewhere.
        if self._trainer is not None and not self._trainer.interrupted:
            self.transfer.synchronize()
        return self.transfer.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.transfer.load_state_dict(state_dict)
        self._resumed = True

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Raise for a checkpoint with other layers or another teacher, whose plans would be dropped silently."""
        saved = checkpoint.get("callbacks", {})
        mine = {callback.state_key for callback in trainer.callbacks if isinstance(callback, TransferCallback)}  # type: ignore[attr-defined]
        others = [key for key in saved if key.startswith(f"{type(self).__qualname__}{{") and key not in mine]
        if self.state_key in saved:
            return
        if others:
            message = (
                f"The checkpoint holds the state of {others}, but this run has {self.state_key}: `layers`, the "
                "teacher or the cost changed, so that its plans and statistics cannot be used"
            )
            if self.transfer.strict:
                raise MisconfigurationException(
                    f"{message}. Resume with the same ones, or load the weights alone and start a new fit."
                )
            rank_zero_warn(f"{message}. They start from this run, because of strict=False.")
            return
        rank_zero_info(f"The checkpoint has no state of {type(self).__name__}: its plans start from this run.")


def _transfer_of(
    teacher: TeacherSource | RepresentationTransfer, layers: LayerSpec, options: TransferOptions
) -> RepresentationTransfer:
    if not isinstance(teacher, RepresentationTransfer):
        return RepresentationTransfer(teacher, layers, **options)
    given = [*(["layers"] if layers != "auto" else []), *options]
    if given:
        raise TypeError(
            f"Expected no {given} beside a RepresentationTransfer, which has layers and options of its own. Give them "
            "to RepresentationTransfer(teacher, layers, ...), or pass the teacher in its place."
        )
    if teacher.process_group is not None:
        raise ValueError(
            "Expected a RepresentationTransfer without `process_group`: in a Trainer the strategy says which processes "
            "share a batch. Leave it out."
        )
    return teacher
