"""What the callback does in a fit: attach, check, save. ``transfer_term.py`` has what it does in a training step."""

from __future__ import annotations

import ast
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_otrt.layers.pairs import LayerSpec
from lightning_otrt.notices import rank_zero_warn
from lightning_otrt.options import OPTIONS, TransferOptions, check_spelling, is_own
from lightning_otrt.run_state import CHECK_EVERY
from lightning_otrt.schedules import Schedule
from lightning_otrt.teacher.loading.load import TeacherSource
from lightning_otrt.trainer.strategies import shared_batch, student_dtype
from lightning_otrt.trainer.training_step import add_term, remove_term
from lightning_otrt.trainer.transfer_term import TransferTerm
from lightning_otrt.transfer import RepresentationTransfer

__all__ = ["TransferCallback"]

#: The settings in a state key, as users know them.
_SETTINGS = {
    "teacher": "the teacher",
    "layers": "`layers`",
    "root": "`student_root`",
    "cost": "`cost`",
    "plan": "`plan`",
}


class TransferCallback(pl.Callback):
    """Base of :class:`OTRTCallback` and of the callback of a wrapped module: the transfer in a Trainer.

    So ``[each for each in trainer.callbacks if isinstance(each, TransferCallback)]`` finds both. ``callback.transfer``
    is the :class:`RepresentationTransfer`. Its options can be read on the callback, too, and ``weight`` and
    ``schedule`` can be set there.

    Args:
        teacher: A teacher, or a :class:`RepresentationTransfer` with layers and options of its own.
        layers: Layers for a teacher.
        options: Options for a teacher.

    Raises:
        TypeError: If there are layers or options for a :class:`RepresentationTransfer`.
        ValueError: If that has a process group.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from torch import nn
        >>> from lightning_otrt import OTRTModule, TransferCallback
        >>> wrapped = OTRTModule(BoringModel(), nn.Linear(32, 2), {"layer": ""})
        >>> [each.transfer for each in wrapped.configure_callbacks() if isinstance(each, TransferCallback)]
        [RepresentationTransfer(Linear(...), {'layer': ''})]
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
            "plan": transfer.plan,
        }
        # None of them can change. Lightning reads the key at each of its hooks.
        self._settings = str(settings)
        self._state_key = f"{type(self).__qualname__}{self._settings}"
        #: The term of the fit that runs.
        self._term: TransferTerm | None = None
        self._resumed = False
        #: Whether a checkpoint is loaded for something else than a fit.
        self._is_testing = False

    if not TYPE_CHECKING:  # a type checker would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """An option of the transfer."""
            if name in OPTIONS and "transfer" in vars(self):
                return getattr(self.transfer, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{self._where(name)}")

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option on the transfer, which refuses those that cannot change; or an attribute of the callback."""
        if name in OPTIONS:
            if "transfer" not in vars(self):
                raise AttributeError(f"`{name}` is an option of the transfer. Call `super().__init__(...)` before.")
            setattr(self.transfer, name, value)
            return
        if is_own(self) and name not in vars(self) and not hasattr(type(self), name):
            check_spelling(self, name)
            if where := self._where(name):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{where}")
        super().__setattr__(name, value)

    def _where(self, name: str) -> str:
        """The end of an error about an attribute that the transfer has, and not the callback."""
        transfer = vars(self).get("transfer")
        if transfer is None or name.startswith("_") or not (name in vars(transfer) or hasattr(type(transfer), name)):
            return ""
        return f". Its transfer has it: `callback.transfer.{name}`"

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
        self._warn_of_the_same_term(trainer)
        transfer = self.transfer
        if not self._resumed:
            transfer.reset()  # here, since a finder saves the state, tries some steps and loads it again
        transfer.run_state.processes.set(*shared_batch(trainer, strict=transfer.strict))
        transfer.teacher.follow(student_dtype(trainer))
        self._term = TransferTerm(transfer, trainer, pl_module)
        # The module's own `setup` comes after this one, and may build the network, as `configure_model` may.
        if not any(is_overridden(name, pl_module) for name in ("setup", "configure_model")):
            transfer.attach(pl_module)
        add_term(pl_module, self._term)

    def _warn_of_the_same_term(self, trainer: pl.Trainer) -> None:
        """Warn where a callback before this one adds the same term, as beside a wrapped module."""
        before = takewhile(lambda each: each is not self, trainer.callbacks)  # type: ignore[attr-defined]
        if any(isinstance(each, TransferCallback) and each._settings == self._settings for each in before):
            rank_zero_warn(
                f"Two transfers of this Trainer have the same teacher ({type(self.transfer.teacher.source).__name__}), "
                "layers, plan and cost, so that their term counts twice, as where a wrapped module is trained with a "
                "callback of its own. Leave one of them out, or add up their weights."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to a module whose layers exist only after its own ``setup`` or ``configure_model``."""
        if self._term is not None:
            self._term.attach()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the trial steps of finders, unless a checkpoint was loaded."""
        if not self._resumed:
            self.transfer.reset()
        self.transfer.run_state.check_every = trainer.log_every_n_steps or CHECK_EVERY  # type: ignore[attr-defined]
        if self._term is not None:
            self._term.restart()

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
        if self._term is not None:
            self._term.has_run = False

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise if another training step ran."""
        # Lightning skips the step for a batch that is None.
        has_run = batch is None or (self._term is not None and self._term.has_run)
        if self.transfer.strict and not has_run:
            raise MisconfigurationException(
                f"The `training_step` of {type(pl_module).__name__} was replaced after the fit began, so that the "
                "transfer term is not added any more. Replace it before `trainer.fit`, or call the one that was there."
            )

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise where all steps so far were without a term. A single step without one may be that of a GAN's critic."""
        if self.transfer.cache is not None:
            self.transfer.cache.end_epoch()
        self.transfer.check_layers()
        if self.transfer.strict and self._term is not None:
            self._term.effect.check_epoch(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report values that were not finite, and bring the statistics of all processes together."""
        self.transfer.check_finite()
        self.transfer.synchronize()
        if self._term is not None and self.transfer.has_weight and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._term.effect.check_schedule(self.transfer.schedule)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the term and all hooks, and restore the teacher."""
        self._is_testing = False
        if stage == "fit":
            self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same: Lightning does not call ``teardown`` after an exception."""
        self._release()

    def _release(self) -> None:
        if self._term is not None:
            remove_term(self._term.module, self._term)
            self._term.reevaluations.stop()
        self.transfer.detach()
        self.transfer.run_state.forget_processes()
        self.transfer.run_state.check_every = CHECK_EVERY
        self._term, self._resumed, self._is_testing = None, False, False

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plans, statistics and counters; not the teacher."""
        # All processes save together. Not so after an error: the others may wait elsewhere.
        if self._term is not None and not self._term.trainer.interrupted:
            self.transfer.synchronize()
        return self.transfer.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint. A test, which needs no plans, leaves those of the next fit alone."""
        if not self._is_testing:
            self.transfer.load_state_dict(state_dict)
            self._resumed = True
            if self._term is not None:
                self._term.forget_batch()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Raise for a checkpoint with other layers or another teacher, whose plans would be dropped silently."""
        self._is_testing = trainer.state.fn != TrainerFn.FITTING
        if self._is_testing:
            return
        saved = checkpoint.get("callbacks", {})
        mine = {callback.state_key for callback in trainer.callbacks if isinstance(callback, TransferCallback)}  # type: ignore[attr-defined]
        others = [key for key in saved if key.startswith(f"{type(self).__qualname__}{{") and key not in mine]
        if self.state_key in saved:
            return
        if others:
            changed = min((self._changed(key) for key in others), key=len)
            message = (
                f"The checkpoint holds the state of {' and '.join(others)}, but this run has {self.state_key}: "
                f"{changed}, so that its plans and statistics cannot be used"
            )
            if self.transfer.strict:
                raise MisconfigurationException(
                    f"{message}. Resume with the same ones, or load the weights alone and start a new fit."
                )
            rank_zero_warn(f"{message}. They start from this run, because of strict=False.")
            return
        rank_zero_info(f"The checkpoint has no state of {type(self).__name__}: its plans start from this run.")

    def _changed(self, key: str) -> str:
        """Which settings of a saved state key are others than here, in words."""
        saved, own = (ast.literal_eval(one[one.index("{") :]) for one in (key, self._state_key))
        names = [shown for name, shown in _SETTINGS.items() if name in saved and saved[name] != own[name]]
        return f"{' and '.join(names) or 'another setting'} changed"


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
