"""One transfer that the monitor follows: measurements in training steps, in validation, and pictures of plans."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_otrt.analysis.gradient_share import GradientProbe
from lightning_otrt.analysis.plot_curves import plot_singular_values
from lightning_otrt.analysis.plot_plans import plot_plan
from lightning_otrt.analysis.validation_distances import ValidationDistances
from lightning_otrt.notices import Notices, rank_zero_warn
from lightning_otrt.reading.hooks.views import View
from lightning_otrt.trainer.log_figure import log_figure
from lightning_otrt.trainer.monitor_warnings import TransferWarnings
from lightning_otrt.trainer.training_step import ExtraTerm, add_term, remove_term
from lightning_otrt.transfer import RepresentationTransfer
from lightning_otrt.transport.diagnostics import diagnose

__all__ = ["MonitoredTransfer"]

_NO_OUTPUTS = (
    "OTRTMonitor cannot measure the share of the transfer's gradient: the hooks that it puts on the recorded layers "
    "for one step were not called. Code that is compiled before does not call them. Pass gradients=False."
)
_NO_SUM = (
    "OTRTMonitor logs no distances in validation, because a cost that is a function need not be a sum over "
    'observations. Pass validation=False, or use cost="correlation", "euclidean" or "sqeuclidean".'
)


class MonitoredTransfer(ExtraTerm):
    """One transfer that the monitor follows. In the steps that are measured it is a term that adds nothing to the loss.

    Args:
        transfer: The transfer.
        suffix: End of all logged names, to tell several transfers apart.
    """

    def __init__(self, transfer: RepresentationTransfer, suffix: str) -> None:
        self.transfer = transfer
        self.suffix = suffix
        self.notices = Notices(tell=rank_zero_warn)
        #: Of what happened on this process alone.
        self._own_notices = Notices()
        self.warnings = TransferWarnings(transfer, self.notices)
        self.has_started = False
        self._probe: GradientProbe | None = None
        self._views: list[View] = []
        self._is_open = self._chooses = False
        self._shares: dict[str, Tensor] = {}
        self._validation: ValidationDistances | None = None

    def start(self, module: pl.LightningModule, *, gradients: bool, validation: bool) -> None:
        """Follow the coming training step.

        Args:
            module: The module that is trained.
            gradients: Whether to measure the share of the gradient.
            validation: Whether validation needs the pairs of layers, which a step without a term does not choose.
        """
        self._chooses = validation and not self.transfer.is_active and not self.transfer.has_chosen
        if gradients and self.transfer.has_chosen:
            self._probe = GradientProbe(module, self.transfer.pairs)
        self._is_open, self._shares, self._views = True, {}, []
        add_term(module, self)

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Keep the forwards of the step, and watch its recorded layers."""
        if self._chooses:
            with self.transfer.choosing():
                yield
            return
        # The list itself: it is filled during the step, and taken by the loss, in manual optimization during the step.
        self._views = self.transfer.views
        if self._probe is None:
            yield
            return
        with self._probe.watching():
            yield

    def measure(self, loss: Tensor) -> None:
        """Measure the gradients of the first loss of the step."""
        views = [view for view in self._views if view.has_gradient]
        if not self._is_open or not views:
            return
        self._is_open, self._views = False, []
        if not self.has_started:
            self.has_started = True
            self.warnings.on_first_step()
        if self._probe is None:
            return
        if not self._probe.has_outputs(views):
            self.notices.warn(_NO_OUTPUTS, key="compiled")
            return
        try:
            task, own, logits = self._probe.split(loss, views)
        except RuntimeError as error:
            self.notices.warn(
                f"OTRTMonitor could not measure the share of the transfer's gradient: {error}", key="graph"
            )
            return
        self._shares = {}
        whole = own.norm() + task.norm() + logits.norm()
        weights = self.transfer.last_weights
        if weights.transport:
            shares = own / (own + task + logits)
            self._shares = {
                f"otrt/layer_share/{name}": share for name, share in zip(self._probe.names, shares, strict=True)
            }
            self._shares["otrt/gradient_share"] = own.norm() / whole
        if weights.distillation:
            self._shares["otrt/distillation_share"] = logits.norm() / whole

    def stop(self, module: pl.LightningModule) -> None:
        """End the measurements of the step."""
        remove_term(module, self)
        self._is_open, self._views = False, []
        if self._probe is not None:
            self._probe.remove()
            self._probe = None

    def values(self) -> dict[str, float]:
        """The measured values by name. This waits for the device once."""
        if not any(self.transfer.last_weights):
            return {}
        found: dict[str, Tensor] = {}
        for label, distance in zip(self.transfer.labels, self.transfer.distances, strict=False):
            if distance.matrix is None or distance.is_skipped:
                continue
            if distance.alignment is not None:
                # Those of a random projection say nothing of both layers.
                if self.transfer.plan != "random_orthogonal":
                    found[f"otrt/directions/{label}"] = distance.alignment.directions
                continue
            numbers = diagnose(distance.matrix)
            found[f"otrt/marginal_error/{label}"] = numbers.teacher_error
            found[f"otrt/entropy/{label}"] = numbers.entropy
            rows, columns = distance.matrix.shape
            if rows == columns:
                found[f"otrt/off_identity/{label}"] = numbers.off_identity
        found.update(self._shares)
        self._shares = {}
        if not found:
            return {}
        values = dict(zip(found, torch.stack([value.float() for value in found.values()]).tolist(), strict=True))
        self.warnings.on_values(values, self.transfer.labels)
        return {f"{name}{self.suffix}": value for name, value in values.items() if math.isfinite(value)}

    def open_validation(self, module: pl.LightningModule) -> None:
        """Record validation forwards from now on."""
        if not self.transfer.has_chosen or self._validation is not None:
            return
        if not self.transfer.ground_cost.additive:
            self.notices.warn(_NO_SUM, key="cost")
            return
        self._validation = ValidationDistances(self.transfer, module)

    def close_validation(self, *, compute: bool = True) -> list[tuple[str, Tensor]]:
        """Stop recording, and return the distances by name."""
        distances, self._validation = self._validation, None
        if distances is None:
            return []
        distances.close()
        values: list[Tensor] = []
        if compute:
            with warnings.catch_warnings():
                # A metric without data warns, and gives NaN, which is left out here.
                warnings.simplefilter("ignore")
                values = distances.compute()
        if distances.has_stopped:
            self._own_notices.warn(
                f"OTRTMonitor stopped measuring distances in validation, and logs none of it, after this error: "
                f"{distances.error}",
                key="validation",
            )
        elif distances.error is not None:
            self.notices.warn(
                f"OTRTMonitor lacks a distance in validation, because of this error: {distances.error}",
                key="validation",
            )
        elif compute and not distances.forwards and not any(bool(value.isfinite()) for value in values):
            root = self.transfer.pairing.student.root if self.transfer.pairing else ""
            self.notices.warn(
                f"OTRTMonitor logs no distances of validation, because it saw no forward of {root or 'the network'!r} "
                "there, from which the teacher gets its inputs in training. Call the same module or method in "
                "`validation_step`, or pass validation=False.",
                key="validation",
            )
        names = [f"val/otrt/{label}{self.suffix}" for label in self.transfer.labels]
        return [(name, value) for name, value in zip(names, values, strict=False) if bool(value.isfinite())]

    def draw(self, loggers: list[Logger], step: int) -> bool:
        """Give figures of the current plans to all loggers. Returns whether figures can be drawn."""
        transfer = self.transfer
        for label, pair, distance in zip(transfer.labels, transfer.pairs, transfer.distances, strict=False):
            if distance.matrix is None:
                continue
            title = f"{pair.student} and {pair.teacher}, step {step}"
            try:
                if distance.alignment is None:
                    what = "plan"
                    figure, _ = plot_plan(distance.matrix, title=title, distance=distance.value)
                else:
                    what = "singular_values"
                    values = torch.linalg.svdvals(distance.alignment.correlations)
                    figure, _ = plot_singular_values({f"distance {float(distance.value):.3f}": values}, title=title)
            except ModuleNotFoundError as error:
                self.notices.warn(f"OTRTMonitor draws no plans. {error}", key="figures")
                return False
            for logger in loggers:
                log_figure(logger, f"otrt/{what}/{label}{self.suffix}", figure, step)
            # Else pyplot keeps the figure, and a notebook shows it.
            import_module("matplotlib.pyplot").close(figure)
        return True
