"""The search for the root of an attached student: every candidate is watched until the first forward shows the root."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_otrt.layers.grammar import only_words
from lightning_otrt.layers.names import named_layers, primary_names
from lightning_otrt.layers.pairs import LayerSpec
from lightning_otrt.notices import warn
from lightning_otrt.reading.containers import tensors_in
from lightning_otrt.reading.extra_forwards.eager import EagerCode
from lightning_otrt.reading.hooks.recorder import Recorder
from lightning_otrt.reading.student_root.caller import holders, running_holder, with_caller
from lightning_otrt.reading.student_root.errors import (
    check_initialised,
    logits_outside,
    why_before,
    why_inside,
    why_no_view,
    why_outside,
)
from lightning_otrt.reading.student_root.rules import can_be_root, split_root
from lightning_otrt.reading.student_root.trained_forwards import TrainedForwards
from lightning_otrt.reading.torch_internals import lightning_base
from lightning_otrt.reading.traced.arguments import Inputs

__all__ = ["RootSearch"]


class RootSearch:
    """Finds the root of a student, the module whose inputs the teacher gets too, in its first recorded forward.

    It also notes which trained modules run outside of that root, since the term cannot reach them.

    Args:
        layers: What the user passed as ``layers``.
        student_root: What the user passed as ``student_root``.
        recorder: Calls back when a candidate starts a forward.
        distills: Whether logits are distilled.

    Attributes:
        name: Name of the root, None before it is found.
        method: Name of the method that is called in place of its forward, ``""`` for the forward.
    """

    def __init__(self, layers: LayerSpec, student_root: str | None, recorder: Recorder, *, distills: bool) -> None:
        self.name: str | None = None
        self._given, self.method = split_root(student_root)
        self._layers, self._student_root, self._recorder, self._distills = layers, student_root, recorder, distills
        self._student: nn.Module | None = None
        self._trained: TrainedForwards | None = None
        #: Trained modules that made what entered the root, before it ran.
        self._before: list[str] = []
        #: Names of the modules around the root by id, where one that runs later would make the logits.
        self._holders: dict[int, str] = {}
        self._holder: str | None = None
        #: The parameters that were trained when the student was attached, by id.
        self._trained_at_start: frozenset[int] = frozenset()
        self._eager = EagerCode()

    def start(self, student: nn.Module) -> None:
        """Forget the root, and watch all modules of ``student`` that may be it."""
        modules = named_layers(student)
        self._student, self.name, self._before = student, None, []
        self._holders, self._holder = {}, None
        self._trained_at_start = frozenset(id(each) for each in student.parameters() if each.requires_grad)
        self._forget_trained()
        # A head outside of the root would make features of what is taken for logits.
        if self._distills or self._student_root is None:
            self._trained = TrainedForwards(student, self._counts)
        if self._student_root is not None:
            self._recorder.watch_roots([(self._given, modules[self._given])], self.method)
            return
        # A module under two names is one candidate: two sets of hooks would count its forward twice.
        primary = primary_names(modules, "")
        self._recorder.watch_roots([(name, module) for name, module in modules.items() if primary[id(module)] == name])

    def stop(self) -> None:
        """Forget the student."""
        self._eager.release()
        self._forget_trained()
        self._student = self.name = None

    def hold_compiled_code(self, on: bool) -> None:
        """Run the forward that shows the root in plain Python.

        Code that is compiled later has the hooks in it.

        Args:
            on: Whether forwards are recorded.
        """
        if on and self.name is None:
            self._eager.hold()
        else:
            self._eager.release()

    def serves_another(self, name: str, inputs: Inputs) -> bool:
        """Whether this forward only leads a gradient to what made its inputs.

        So does a critic in the step of the generator: ``toggle_optimizer`` has frozen its weights for that step.

        Args:
            name: Name of the module.
            inputs: What enters it.
        """
        if torch.compiler.is_compiling() or not any(tensor.requires_grad for tensor in tensors_in(inputs)):
            return False
        assert self._student is not None
        own = list(named_layers(self._student)[name].parameters())
        return not any(each.requires_grad for each in own) and any(id(each) in self._trained_at_start for each in own)

    def is_possible(self, name: str, teacher: nn.Module) -> bool:
        """Whether the module that starts a forward may be the root.

        Raises:
            ValueError: If it has lazy parameters.
        """
        assert self._student is not None
        check_initialised(name, named_layers(self._student)[name])
        return self._student_root is not None or can_be_root(name, self._layers, self._student, teacher)

    def explained(self, error: Exception, name: str) -> Exception:
        """What to raise for an error of the choice of layers inside of this module, which may not be the root."""
        assert self._student is not None
        return error if self._student_root is not None else with_caller(error, self._student, name)

    def found(self, name: str, inputs: Iterable[Tensor]) -> None:
        """Watch this module alone. Call it after the hooks on its layers are in place.

        Where the root itself is recorded, it is then read before its view is closed.

        Args:
            name: Name of the root.
            inputs: What enters it.
        """
        assert self._student is not None
        self.name = name
        if self._trained is not None:
            self._before = self._trained.that_made(inputs)
        self._recorder.watch_roots([(name, named_layers(self._student)[name])], self.method)
        if self._distills and self._student_root is None:
            self._holders = holders(self._student, name)
            if lightning_base(type(self._student)) is not None:  # its forward is what its step does
                self._holders.pop(id(self._student), None)

    def note_forward(self) -> None:
        """Note whether a module around the root runs now: what the root returns is then no output of the network."""
        if self._holders and not torch.compiler.is_compiling():
            self._holder = running_holder(self._holders)

    def take_problem(self) -> str | None:
        """Why the root that was found may be the wrong one; given once, after the step that shows it."""
        if self.name is None:
            return None
        if self._trained is None:
            holder, self._holder = self._holder, None
            return None if holder is None else why_inside(self.name, holder)
        self._holder = None
        outside = self._trained.outside(None if self.method else self.name)
        self._forget_trained()
        if outside and self._student_root is not None:
            warn(logits_outside(self._student_root, outside))
            return None
        # Named layers may well be those of a part.
        if outside and (self._distills or only_words(self._layers)):
            return why_outside(self.name, outside, distills=self._distills)
        if self._before:
            warn(why_before(self.name, self._before))
        return None

    def why_no_view(self) -> str:
        """Why no forward of the student was recorded."""
        assert self._student is not None
        return why_no_view(self._student, self.name, self._student_root, self._layers)

    def _counts(self) -> bool:
        """Whether a module that runs now may lie outside of the root: of a method, what runs after it does."""
        return self._recorder.enabled and not (self.method and self._recorder.current is not None)

    def _forget_trained(self) -> None:
        if self._trained is not None:
            self._trained.remove()
        self._trained = None
