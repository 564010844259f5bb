"""The state of a run, to save, resume and reset: its pairs of layers, and the engine with plans and statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_otrt.layers.names import has_layers
from lightning_otrt.layers.pairs import LayerPair, LayerSpec, pair_labels, pairs_from_state, pairs_to_state
from lightning_otrt.missed_layers import Missed, MissedLayers
from lightning_otrt.notices import warn
from lightning_otrt.processes import Processes
from lightning_otrt.reading.extra_forwards.batch_norm import BATCH_NORM_NOTE, batch_norms_in_training
from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.steps.distillation_term import Distillation
from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.first_process import choice_of_first
from lightning_otrt.steps.global_engine import GlobalTransportEngine
from lightning_otrt.steps.last_student import LastStudent
from lightning_otrt.steps.pair_distance import PairDistance
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.steps.step_graphs import StepGraphs
from lightning_otrt.steps.term_engine import TermEngine
from lightning_otrt.teacher.identities import Identities, difference
from lightning_otrt.teacher.pair_choice import ChoosePairs

__all__ = ["RunState"]

#: Calls between two reads of flags, which wait for the device, as a logger does: it is the default of a Trainer, too.
CHECK_EVERY = 50
_KEYS = ("layers", "pairs", "engine", "leading_weights", "distillation")


class RunState:
    """The pairs and the engine of a run, which outlive one attachment of the student.

    A choice of layers may depend on the batch it was made on. So a run keeps the pairs that it has plans for, a resumed
    run takes those of its checkpoint, and several processes take those of the first one.

    Args:
        layers: What the user passed as ``layers``.
        settings: The settings of the engine.
        processes: The processes of the run.
        identities: What plans and statistics belong to.
        distillation: The term of the logits, where they are distilled.
    """

    def __init__(
        self,
        layers: LayerSpec,
        settings: TermSettings,
        processes: Processes,
        identities: Identities,
        distillation: Distillation | None = None,
    ) -> None:
        self.layers, self.settings, self.processes, self._identities = layers, settings, processes, identities
        #: The resolved pairs, empty before the first forward.
        self.pairs: tuple[LayerPair, ...] = ()
        #: The names under which they are logged.
        self.labels: tuple[str, ...] = ()
        self.engine: TermEngine | None = None
        #: The captured calls of the engine.
        self.graphs = StepGraphs()
        #: Calls between two reads of the flags for values that are not finite, unless a user has another number.
        self.check_every = CHECK_EVERY
        self.distillation = distillation
        self.missed = MissedLayers()
        self._paired_for = ""
        #: What is regressed on what in the moments of the distillation.
        self._reading: dict[str, Any] | None = None
        self._pairing: Pairing | None = None
        self._saved: dict[str, Any] | None = None
        self._last_student = LastStudent()

    @property
    def calls(self) -> int:
        """Number of calls that had a term."""
        return max((each.calls for each in (self.engine, self.distillation) if each is not None), default=0)

    def choose_pairs(
        self, student: nn.Module, choose: ChoosePairs, device: torch.device | None, report: Callable[[str], None]
    ) -> Pairing:
        """Choose the pairs, or take those that this run has already, and make the engine for them.

        Args:
            student: The student.
            choose: Chooses pairs from one traced forward, or traces the given ones.
            device: Where loaded plans and statistics belong.
            report: Gets a note where the student's layers mix samples of one process alone.
        """
        self._check_student(student)
        known, pairings = self._known_pairs(student), []

        def choose_here() -> tuple[tuple[LayerPair, ...], tuple[str, ...]]:
            pairings.append(choose(known))
            return pairings[0].pairs, pairings[0].plans

        self.pairs, plans = choice_of_first(self.processes.in_step, repr(self.layers), choose_here)
        self.labels, self._paired_for = pair_labels(self.pairs), repr(self.layers)
        self.engine = self._make_engine(device, plans)
        self._pairing = replace(pairings[0], pairs=self.pairs)
        if self._saved is not None:
            self._check(self.engine, self._saved)
            self._load(self._saved, device)
            self._saved = None
        else:
            self._drop_other_moments(self._reading, self._identities.reading)
        self._reading = self._identities.reading
        # Those of an earlier call or a checkpoint, whose plans go on.
        self._pairing = replace(self._pairing, plans=self.engine.plans if plans else ())
        ranks = self.processes.of_batch
        if ranks is not None and ranks.rank == 0 and batch_norms_in_training(student, synchronized=False):
            report(BATCH_NORM_NOTE)
        return self._pairing

    def look_for_missed(self, student: nn.Module | None = None) -> Missed:
        """What to say of layers that did not run; see :meth:`MissedLayers.report`."""
        if self.engine is None:
            return Missed()
        engine = self.engine
        return self.missed.report(engine.absent_pairs(), self.pairs, engine.calls, student, is_global=engine.is_global)

    def take_bad_calls(self, distances: Sequence[PairDistance]) -> tuple[int, str]:
        """Number of calls since the last read whose value was not finite. Waits for the device.

        Args:
            distances: Those of the last call, to name layers.

        Returns:
            The number of calls, and a message about them.
        """
        terms = {"transfer": self.engine, "distillation": self.distillation}
        found = {name: term.bad_calls for name, term in terms.items() if term is not None}
        counts = {name: int(count) for name, count in found.items() if count is not None}
        for count in found.values():
            if count is not None:
                count.zero_()
        bad = max(counts.values(), default=0)
        which = " and of the ".join(name for name, count in counts.items() if count)
        names = [each.name for each in distances if bad and not each.is_skipped and not each.value.isfinite()]
        where = f" (last in the layers {names})" if names else ""
        return bad, (
            f"{bad} recent values of the {which} term were NaN or infinite{where}. They stay in the loss, so that a "
            "gradient scaler skips the step and anomaly detection sees them; plans and statistics leave them out."
        )

    def synchronize(self) -> None:
        """Bring the running sums of a global batch together. A collective."""
        if self.engine is not None:
            self.engine.synchronize()

    def forget_processes(self) -> None:
        """Drop the handles of the processes, which end with a Trainer's strategy and cannot be pickled."""
        self.processes.forget()
        if self.engine is not None:
            self.engine.release_ranks()

    def state_dict(self) -> dict[str, Any]:
        """Pairs, plans and statistics; plain data and tensors."""
        # A loaded state stays until an engine has taken it over, also where a check refuses it.
        if self._saved is not None or self.engine is None or self._pairing is None:
            return dict(self._saved or dict.fromkeys(_KEYS))
        return {
            "layers": self._paired_for,
            "pairs": pairs_to_state(self.pairs),
            "engine": self.engine.state_dict(),
            # As it is now: the owner may train it, and brings it back when the run is resumed.
            "leading_weights": self._identities.leading_weights(self._pairing),
            "distillation": self._distillation_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None) -> bool:
        """Restore :meth:`state_dict`.

        Returns:
            Whether the pairs have to be settled again, in the next forward.

        Raises:
            ValueError: If it is no such state, or was saved with other layers or another teacher. Without an engine,
                the latter are noticed when one is made.
        """
        expected = {"step", *_KEYS}
        if missing := expected - set(state):
            raise ValueError(
                f"Expected the `state_dict` of a RepresentationTransfer, with the keys {sorted(expected)}, but "
                f"{sorted(missing)} are missing from {sorted(map(str, state))}. Pass what its `state_dict()` returned."
            )
        if state["engine"] is None:
            self.reset()
            return False
        has_other_pairs = state["layers"] == repr(self.layers) and pairs_from_state(state["pairs"]) != self.pairs
        if self.engine is not None and not has_other_pairs:
            self._check(self.engine, state)
            self.reset()
            self._load(state, device)
            return False
        self.reset()
        self._saved = {name: state[name] for name in _KEYS}
        self.engine = None
        return True

    def reset(self, student: nn.Module | None = None) -> None:
        """Forget plans, statistics and counters, as at the start of a training run.

        Args:
            student: The student that goes on, if there is one.
        """
        self._saved, self.missed = None, MissedLayers()
        self._last_student.forget()
        if student is not None:
            self._last_student.note(student)
        for kept in (self.engine, self.distillation):
            if kept is not None:
                kept.reset()

    def _check_student(self, student: nn.Module) -> None:
        """Warn where plans and statistics of another student go on."""
        kept = [each for each in (self.engine, self.distillation) if each is not None]
        if self._last_student.is_other(student) and any(each.calls for each in kept):
            warn(
                f"This student ({type(student).__name__}) is another one than the transfer had before, and goes on "
                "with its plans, statistics and step of the schedule. Call `reset()` before you attach a new student, "
                "as of another fold. `load_state_dict` is for one that resumes.",
            )
        self._last_student.note(student)

    def _load(self, state: Mapping[str, Any], device: torch.device | None) -> None:
        assert self.engine is not None
        device = device or torch.device("cpu")
        self.engine.load_state_dict(state["engine"], device)
        # A run may begin or cease to distill, as it may have another weight.
        if self.distillation is not None and state["distillation"] is not None:
            saved = state["distillation"]
            self.distillation.load_state_dict(saved, device)
            if saved.get("regression") is not None:
                self._drop_other_moments(saved["regression"], self._identities.regression)

    def _distillation_state(self) -> dict[str, Any] | None:
        if self.distillation is None:
            return None
        return {**self.distillation.state_dict(), "regression": self._identities.regression}

    def _drop_other_moments(self, saved: dict[str, Any] | None, own: dict[str, Any] | None) -> None:
        """Start the regression of logits anew where its moments are those of another one."""
        if self.distillation is None or not self.distillation.has_moments:
            return
        if what := difference(saved, own):
            self.distillation.reset()
            warn(
                f"The regression of the teacher's logits is another one than that of the run that goes on: {what}. It "
                "starts anew, without the moments of that run.",
            )

    def _check(self, engine: TermEngine, state: Mapping[str, Any]) -> None:
        """Refuse a state of other layers or of another teacher, before anything is changed."""
        engine.check_state(state["engine"])
        if self._pairing is None or self._identities.leading_weights(self._pairing) == state["leading_weights"]:
            return
        names = sorted({pair.teacher for pair in self.pairs})
        message = (
            f"The state was saved with another teacher: the weights that lead to its layers {names} differ, so that "
            "plans and statistics do not belong to this one"
        )
        if self.settings.strict:
            raise ValueError(f"{message}. Resume with the same teacher (its head may differ), or start a new run.")
        warn(f"{message}. The run goes on with them, because of strict=False.")

    def _known_pairs(self, student: nn.Module) -> tuple[LayerPair, ...] | None:
        """The pairs of a loaded state or of an earlier attachment, whose plans go on; None for a new choice."""
        if self._saved is not None:
            layers, pairs = self._saved["layers"], pairs_from_state(self._saved["pairs"])
        elif self.engine is not None and self.engine.calls:
            layers, pairs = self._paired_for, self.pairs
        else:
            return None
        return pairs if layers == repr(self.layers) and has_layers(student, pairs) else None

    def _make_engine(self, device: torch.device | None, plans: tuple[str, ...]) -> TermEngine:
        """The engine for the pairs, with the plans and statistics of an earlier one for the same pairs."""
        names = [(pair.student, pair.teacher) for pair in self.pairs]
        weights = [pair.weight for pair in self.pairs]
        before = self.engine if self.engine is not None and list(self.engine.names) == names else None
        if before is not None and plans and not before.calls and before.plans != plans:
            before = None
        ranks = self.processes.of_batch
        if ranks is not None:
            engine: TermEngine = GlobalTransportEngine(names, weights, self.settings, plans, ranks=ranks)
        elif before is not None and not before.is_global:
            return before
        else:
            engine = TransportEngine(names, weights, self.settings, plans, graphs=self.graphs)
        if before is not None:
            engine.continue_from(before, device or torch.device("cpu"))
        return engine
