"""Representation transfer for any PyTorch module: teacher, layers, recording and transport put together."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.agreement import agree_on_pairs
from lightning_otrt.checks import (
    check_callable,
    check_count,
    check_decay,
    check_flag,
    check_number,
    check_seed,
)
from lightning_otrt.layers.names import has_layers, named_layers
from lightning_otrt.layers.pairs import LayerPair, LayerSpec, pairs_from_state, pairs_to_state
from lightning_otrt.reading.masks import padding_mask
from lightning_otrt.reading.pairing import Pairing, can_be_root, check_layers, pair_layers
from lightning_otrt.reading.recorder import Recorder
from lightning_otrt.reading.views import NoTermError, View, matched_neurons, trained_views
from lightning_otrt.schedules import Schedule, weight_at
from lightning_otrt.steps.engine import PairDistance, TransportEngine
from lightning_otrt.steps.global_engine import GlobalTransportEngine
from lightning_otrt.steps.ranks import Ranks
from lightning_otrt.teacher.frozen import Teacher
from lightning_otrt.teacher.load import load_teacher
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.plans import check_epsilon, check_plan

__all__ = ["RepresentationTransfer"]

log = logging.getLogger(__name__)


class RepresentationTransfer:
    r"""Optimal transport between the neurons of a frozen teacher and those of a student, as a term of the loss.

    While it is attached, each forward of the student in training records the neurons of the chosen layers, and runs the
    teacher on the same inputs. :meth:`loss` turns what was recorded since the last call into

    .. math:: \alpha \sum_{pairs} w_{pair} \langle P^*, M \rangle

    (arXiv 2007.06737, equation 3, summed over layers). The student is not changed, and needs no projection layers: the
    widths of student and teacher may differ.

    Args:
        teacher: A module, a LightningModule, the name of a torchvision model (its default weights), ``(name, weights)``
            or ``(checkpoint path, class)``; see :func:`load_teacher`. It is run in evaluation mode without gradient,
            and never changed.
        layers: Which student layers are matched to which teacher layers: a mapping ``{student: teacher}``, a list of
            pairs or of names that both have, globs, ``"re:..."``, negative indices, ``"name:input"``,
            ``"penultimate"``, ``"blocks"``, ``"auto"`` (blocks where there are positions or tokens, else penultimate),
            ``"matched"`` (blocks of the student with the closest teacher layers on the first batch, in order),
            :class:`LayerPair` objects, or a list of these. Words are resolved once, by the first process for all, and
            a resumed run goes on with the pairs of its checkpoint.
        weight: α. About 8 suits the correlation cost; see the README for others.
        student_root: Name of the student's submodule whose inputs the teacher gets too; None: the outermost one that
            holds the layers and is called.
        cost: ``"correlation"``, ``"euclidean"``, ``"sqeuclidean"`` or a function of raw neurons ``(N, n)``, ``(M, n)``
            that gives ``(N, M)``.
        plan: ``"sinkhorn"``, ``"exact"``, ``"static"`` (solved once 256 samples were seen), or a control:
            ``"identity"``, ``"uniform"``, ``"random"``.
        epsilon: Entropic regularisation, relative to the mean cost.
        memory: Decay of a running cost behind the plan: 0 sees the current batch alone; ``"auto"`` is 0.98 for layers
            with more neurons than the batch has samples, else 0.
        solve_every: Calls between two solves of the plan; the first come after 0, 1, 2, 4 and 8 calls.
        grid: Positions kept along each axis of a feature map; see :func:`neurons`.
        schedule: From the step to a factor on the weight, such as :class:`LinearWarmup`.
        teacher_inputs: From the inputs of the student's root to those of the teacher: a function that returns a tensor,
            a tuple of positional or a dictionary of keyword arguments.
        teacher_dtype: Run a copy of the teacher in this dtype, such as ``"bfloat16"``.
        global_batch: Whether the term is that of the batch over all processes: the same numbers as one process with all
            samples, where gradients are averaged, as DDP and FSDP do. None: where torch.distributed runs several
            processes. False is another objective: each process has plans and a term of its own samples.
        strict: Raise where a term cannot be formed; else warn once and leave it out.
        seed: Seed of ``plan="random"``.
        process_group: The processes of the global batch; None: the default group, where one is initialised.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_otrt import RepresentationTransfer
        >>> teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
        >>> transfer = RepresentationTransfer(teacher, layers="penultimate", weight=0.5)
        >>> x, y = torch.randn(64, 8), torch.randint(10, (64,))
        >>> with transfer.attached(student):
        ...     loss = nn.functional.cross_entropy(student(x), y) + transfer.loss()
        >>> loss.backward()
        >>> transfer.pairs
        (LayerPair(student='2:input', teacher='2:input', weight=1.0, neuron_axis=(1, 1), select=None),)
    """

    def __init__(
        self,
        teacher: Any,
        layers: LayerSpec = "auto",
        *,
        weight: float = 8.0,
        student_root: str | None = None,
        cost: str | Callable[[Tensor, Tensor], Tensor] = "correlation",
        plan: str = "sinkhorn",
        epsilon: float = 0.01,
        memory: float | str = "auto",
        solve_every: int = 10,
        grid: int | None = 4,
        schedule: Schedule | None = None,
        teacher_inputs: Callable[..., Any] | None = None,
        teacher_dtype: torch.dtype | str | None = None,
        global_batch: bool | None = None,
        strict: bool = True,
        seed: int = 0,
        process_group: Any | None = None,
    ) -> None:
        check_plan(plan)
        check_epsilon(epsilon)
        check_number("weight", weight)
        check_decay("memory", memory)
        check_count("solve_every", solve_every)
        check_count("grid", grid, optional=True)
        check_callable("schedule", schedule)
        check_callable("teacher_inputs", teacher_inputs)
        if global_batch is not None:
            check_flag("global_batch", global_batch)
        check_flag("strict", strict)
        check_seed("seed", seed)
        self.layers, self.weight, self.student_root = layers, weight, student_root
        self.cost, self.plan, self.epsilon = get_cost(cost), plan, epsilon
        self.memory, self.solve_every, self.grid = memory, solve_every, grid
        self.schedule, self.strict, self.seed = schedule, strict, seed
        self.global_batch, self.process_group = global_batch, process_group
        self.teacher = Teacher(load_teacher(teacher), inputs=teacher_inputs, dtype=teacher_dtype)
        #: Step that the schedule sees; :meth:`loss` advances it unless it is given one.
        self.step = 0
        #: Calls between two reads of the flags for values that are not finite.
        self.check_every = 50
        #: Told once, as a table, which layers were chosen.
        self.report: Callable[[str], None] = log.info
        #: The distances of the last call of :meth:`loss`.
        self.distances: list[PairDistance] = []
        self.engine: TransportEngine | None = None
        #: Whether the processes of torch.distributed, where there are any, each see a part of the batch and take all
        #: steps together. None: nobody has said so, as a Trainer does; then a global batch alone asks the others.
        self.shares_batch: bool | None = None
        self._student: nn.Module | None = None
        self._root: str | None = None
        self._recorder = Recorder(self._on_forward)
        self._pairing: Pairing | None = None
        self._paired_for = ""
        self._is_recording = False
        self._asked = False
        self._stance = ExitStack()
        self._saved: dict[str, Any] | None = None
        self._warned: set[str] = set()

    @property
    def pairs(self) -> tuple[LayerPair, ...]:
        """The resolved pairs, empty before the first forward."""
        return () if self._pairing is None else self._pairing.pairs

    @property
    def pairing(self) -> Pairing | None:
        """The resolved pairs with the traces of both networks; None before the first forward."""
        return self._pairing

    @property
    def student(self) -> nn.Module | None:
        """The attached student."""
        return self._student

    @property
    def views(self) -> list[View]:
        """The forwards recorded since the last call of :meth:`loss`; the list goes on filling until that takes it."""
        return self._recorder.views

    @property
    def current_weight(self) -> float:
        """The weight at the current step.

        Raises:
            ValueError: If the schedule gives anything but a finite number that is not negative.
        """
        return weight_at(self.step, self.weight, self.schedule)

    @contextmanager
    def attached(self, student: nn.Module) -> Iterator[RepresentationTransfer]:
        """Record every training forward of ``student`` inside the ``with`` block; no hook is left after it.

        Args:
            student: The module that is trained.

        Raises:
            ValueError: If a layer name does not exist, or the teacher shares parameters with the student.
        """
        self.attach(student)
        try:
            with self.recording():
                yield self
                if self.has_views and not self._asked:
                    self._warn(
                        f"{len(self._recorder.views)} forwards of the student were recorded, but `loss` was never "
                        "called while it was attached, so that no transfer term was trained on. Add "
                        "`transfer.loss()` to the loss of each step.",
                        key="loss",
                    )
        finally:
            self.detach()

    def attach(self, student: nn.Module) -> None:
        """Put hooks on ``student`` and prepare the teacher; :meth:`recording` switches them on.

        Raises:
            RuntimeError: If it is attached already.
            ValueError: If a layer name does not exist, or the teacher shares parameters with the student.
        """
        if self._student is not None:
            raise RuntimeError("This RepresentationTransfer is attached already. Detach it first, or use another one.")
        if not isinstance(student, nn.Module):
            raise TypeError(f"Expected the student to be a torch.nn.Module, but got {type(student).__name__}.")
        self.teacher.check_against(student)
        check_layers(self.layers, student, self.teacher.module, self.student_root)
        if "torch._dynamo" in sys.modules:
            # Code compiled before has no hooks in it and would never call ours.
            torch.compiler.reset()
        self._student, self._asked = student, False
        self._watch_candidates(student)

    def _watch_candidates(self, student: nn.Module) -> None:
        """Wait for the first forward of what may be the root: it resolves the layers."""
        modules = named_layers(student)
        names = modules if self.student_root is None else {self.student_root: modules[self.student_root]}
        self._root = None
        self._recorder.watch_roots(list(names.items()))

    def detach(self) -> None:
        """Take all hooks off and give the teacher back as it came. Plans and statistics are kept."""
        self._stance.close()
        self._recorder.remove()
        self.teacher.release()
        self._student = None
        self._root = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record forwards inside the block; outside, hooks do nothing."""
        before, self._is_recording = self._is_recording, True
        self._open_or_close()
        try:
            yield
        finally:
            self._is_recording = before
            self._open_or_close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave forwards inside the block out of the term, such as the inner steps of an attack."""
        before, self._is_recording = self._is_recording, False
        self._open_or_close()
        try:
            yield
        finally:
            self._is_recording = before
            self._open_or_close()

    def _open_or_close(self) -> None:
        """Let hooks record or not. A flag that seldom changes: compiled code would be compiled anew for each step."""
        self._recorder.enabled = self._is_recording and self.current_weight > 0
        if self._recorder.enabled and self._root is None and "torch._dynamo" in sys.modules:
            # The first forward resolves the layers, in plain Python; hooks added there are in what is compiled later.
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        else:
            self._stance.close()

    @property
    def is_attached(self) -> bool:
        """Whether a student is attached."""
        return self._student is not None

    @property
    def recorded_samples(self) -> int:
        """Number of samples in the forwards that :meth:`loss` would take."""
        return sum(view.samples for view in trained_views(self._recorder.views))

    @property
    def has_views(self) -> bool:
        """Whether a forward with gradient was recorded that :meth:`loss` has not taken yet."""
        return any(view.has_gradient for view in self._recorder.views)

    def discard(self) -> None:
        """Forget what was recorded since the last call of :meth:`loss`."""
        self._recorder.take()

    def loss(self, *, reevaluation: bool = False) -> Tensor:
        """The weighted term of all forwards since the last call, and one step on.

        Args:
            reevaluation: Whether the batch is that of the last call again, as in the closures of LBFGS: plans,
                statistics and the step then stay.

        Returns:
            A scalar in float32 or wider; zero without graph where the weight is 0.

        Raises:
            RuntimeError: If it is not attached, the student was not called, a layer did not run or ran twice, or the
                term does not depend on the student's parameters.
            ValueError: On the first call, if a value is not finite or there are too few observations.
        """
        if self._student is None:
            raise RuntimeError("`loss` needs an attached student: call it inside `with transfer.attached(student):`.")
        self._asked = True
        weight = self.current_weight
        views = trained_views(self._recorder.take())
        if not reevaluation:
            self.step += 1
        self._open_or_close()
        if weight == 0:
            return self._zero()
        try:
            matched, reason = self._matched(views), ""
        except NoTermError as error:
            matched, reason = [], str(error)
        if not self.strict and (ranks := self._ranks()) is not None and ranks.any(bool(reason), self._zero().device):
            # The others would wait for this process in the exchange of a term.
            reason = reason or "Another process of the global batch could form no transfer term."
        if reason:
            self.distances = []
            return self._give_up(reason)
        assert self.engine is not None  # views exist only once layers are resolved
        term, self.distances = self.engine.term(matched, sum(view.samples for view in views), reevaluation=reevaluation)
        if self.engine is not None and self.engine.calls % self.check_every == 0:
            self.check_finite()
        return weight * term

    def check_finite(self) -> int:
        """Read the flags that calls left on the device, which waits for it.

        Returns:
            How many calls since the last read gave a value that is not finite. A warning is given once.
        """
        if self.engine is None or self.engine.bad_calls is None:
            return 0
        bad = int(self.engine.bad_calls)
        self.engine.bad_calls.zero_()
        if bad:
            layers = [
                distance.name
                for distance in self.distances
                if distance.plan is not None and not distance.value.isfinite()
            ]
            self._warn(
                f"{bad} recent values of the transfer term up to step {self.step} were NaN or infinite"
                f"{f' (last in the layers {layers})' if layers else ''}. They are left in the loss, so that a gradient "
                "scaler skips the step and anomaly detection sees them; plans and statistics do not learn from them.",
                key="not finite",
            )
        return bad

    def _zero(self) -> Tensor:
        parameter = next(iter(self._student.parameters()), None) if self._student is not None else None
        return torch.zeros((), device=None if parameter is None else parameter.device)

    def _give_up(self, message: str) -> Tensor:
        if self.strict:
            raise RuntimeError(message)
        self._warn(f"{message} (strict=False: the term is left out.)", key=message)
        return self._zero()

    def _warn(self, message: str, key: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=3)

    def _matched(self, views: list[View]) -> list[list[tuple[Tensor, Tensor]]]:
        """The neurons of each view and pair."""
        if not views:
            raise NoTermError(self._why_no_view())
        matched, constant = matched_neurons(views, self.pairs)
        if constant:
            self._warn(f"The student layers {constant} get no gradient: nothing before them is trained.", "constant")
        return matched

    def _why_no_view(self) -> str:
        assert self._student is not None
        if self._root is not None:
            root = self._root or "itself"
            return (
                f"The student ({type(self._student).__name__}) was not called with gradient since the last call, so "
                f"there is no transfer term: no forward of its root {root!r} was recorded. Call the module itself (not "
                "`.forward`), once per loss, outside `no_grad`; or pass the name of what is called as `student_root`."
            )
        if not any(parameter.requires_grad for parameter in self._student.parameters()):
            return (
                f"No parameter of the student ({type(self._student).__name__}) requires a gradient, so no transfer "
                "term can train it. Unfreeze what is to be trained before the fit."
            )
        where = f"the root {self.student_root!r}" if self.student_root else "a module that holds the layers"
        return (
            f"No forward of {where} of the student ({type(self._student).__name__}) was recorded, so there is no "
            f"transfer term for layers={self.layers!r}. It has to be called as a module (not `.forward`), with "
            "gradient; `student_root` names the submodule whose inputs the teacher gets."
        )

    def _on_forward(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A candidate for the root starts a forward: resolve the layers if need be, and run the teacher."""
        assert self._student is not None
        if self._root is None:
            if self.student_root is None and not can_be_root(name, self.layers, self._student, self.teacher.module):
                return False
            self._resolve(name, args, kwargs)
        view = self._recorder.current
        hooked = self.teacher.module
        self._prepare_teacher()
        if self.teacher.module is not hooked:
            self._watch_teacher()
        teacher_args, teacher_kwargs = self.teacher.inputs_for(args, kwargs)
        if view is not None:
            view.teacher_mask = padding_mask(teacher_args, teacher_kwargs)
        with self._recorder.teacher_running():
            self.teacher.run(teacher_args, teacher_kwargs)
        return True

    def _prepare_teacher(self) -> None:
        """The teacher follows the student's device, and its type where a precision plugin changed that."""
        assert self._student is not None
        for parameter in self._student.parameters():
            if parameter.is_floating_point():
                self.teacher.prepare(parameter.device, parameter.dtype)
                return  # not `next`, which torch 2.6 cannot compile

    def _resolve(self, root: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose the pairs from one traced forward of each network, and install the hooks on their layers."""
        assert self._student is not None
        student = self._student

        def choose() -> Pairing:
            with self._recorder.switched_off():
                self._prepare_teacher()
                given = self.teacher.inputs_for(args, kwargs)
                known = self._known_pairs(student)
                return pair_layers(self.layers, student, root, (args, kwargs), self.teacher.module, given, known)

        ranks = self._ranks() or (Ranks.world(self.process_group) if self.shares_batch else None)
        self._pairing, self._paired_for = agree_on_pairs(ranks, repr(self.layers), choose), repr(self.layers)
        self.engine = self._make_engine()
        if self._saved is not None:
            self.engine.load_state_dict(self._saved["engine"], self._zero().device)
            self._saved = None
        self.report(
            f"Representation transfer from {type(self.teacher.module).__name__} to {type(self._student).__name__}:\n"
            f"{self._pairing.table()}"
        )
        self._root = self._pairing.student.root
        self._recorder.watch_student(self._pairing.readers("student", self._student, self.grid))
        # After the readers: where the root itself is recorded, its reading comes before the view is closed.
        self._recorder.watch_roots([(self._root, named_layers(self._student)[self._root])])
        self._watch_teacher()

    def _known_pairs(self, student: nn.Module) -> tuple[LayerPair, ...] | None:
        """The pairs of a loaded state or of an earlier attachment, whose plans go on; None for a new choice.

        A choice may depend on the batch that it is made on, so that it would not be the same again.
        """
        if self._saved is not None:
            layers, pairs = self._saved["layers"], pairs_from_state(self._saved["pairs"])
        elif self.engine is not None and self.engine.calls:
            layers, pairs = self._paired_for, self.pairs
        else:
            return None
        return pairs if layers == repr(self.layers) and has_layers(student, pairs) else None

    def _make_engine(self) -> TransportEngine:
        """The engine of this attachment, with the plans and statistics of an earlier one for the same pairs."""
        names = [(pair.student, pair.teacher) for pair in self.pairs]
        weights = [pair.weight for pair in self.pairs]
        settings = (self.cost, self.plan, self.epsilon, self.memory, self.solve_every, self.seed)
        ranks = self._ranks()
        before = self.engine if self.engine is not None and list(self.engine.names) == names else None
        if ranks is None:
            if before is not None and not isinstance(before, GlobalTransportEngine):
                return before
            engine = TransportEngine(names, weights, *settings, strict=self.strict)
        else:
            engine = GlobalTransportEngine(names, weights, *settings, strict=self.strict, ranks=ranks)
            if ranks.rank == 0 and self._student is not None and _mixes_samples(self._student):
                self.report(
                    "The student has BatchNorm layers, which see the samples of one process alone: under a global "
                    "batch the term is not that of a single process with all samples; with SyncBatchNorm it is."
                )
        if before is not None:
            engine.load_state_dict(before.state_dict(), self._zero().device)
        return engine

    def _ranks(self) -> Ranks | None:
        """The processes of the global batch, None for this one alone."""
        if self.global_batch is False or self.shares_batch is False:
            return None
        return Ranks.world(self.process_group)

    def synchronize(self) -> None:
        """Bring the running cost of a global batch together, so that one process can save the state of all.

        A collective: call it on all processes before :meth:`state_dict`. The callbacks do.
        """
        if self.engine is not None:
            self.engine.synchronize()

    def _watch_teacher(self) -> None:
        assert self._pairing is not None
        self._recorder.watch_teacher(self._pairing.readers("teacher", self.teacher.module, self.grid))

    def state_dict(self) -> dict[str, Any]:
        """Step, resolved pairs, plans and statistics; without the teacher. Loads with ``weights_only=True``."""
        if self.engine is None:
            return {"step": self.step, **(self._saved or dict.fromkeys(("layers", "pairs", "engine")))}
        return {
            "step": self.step,
            "layers": self._paired_for,
            "pairs": pairs_to_state(self.pairs),
            "engine": self.engine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; plans are placed on the student's device when the layers are resolved.

        The saved pairs are taken as they are, where ``layers`` asks for the same: the first batch of this run, on which
        a choice may depend, is another one.

        Raises:
            ValueError: If it is no such state, or was saved with other layers; for a student that has not run yet the
                latter comes in its first forward.
        """
        expected = {"step", "layers", "pairs", "engine"}
        if missing := expected - set(state):
            raise ValueError(
                f"Expected the `state_dict` of a RepresentationTransfer, with the keys {sorted(expected)}, but "
                f"{sorted(missing)} are missing from {sorted(map(str, state))}. Pass what its `state_dict()` returned."
            )
        self.reset()
        self.step = state["step"]
        if state["engine"] is None:
            return
        may_choose = state["layers"] == repr(self.layers) and pairs_from_state(state["pairs"]) != self.pairs
        if self.engine is not None and not may_choose:
            self.engine.load_state_dict(state["engine"], self._zero().device)
            return
        self._saved = {name: state[name] for name in ("layers", "pairs", "engine")}
        self.engine = None
        if self._student is not None:
            self.discard()
            self._watch_candidates(self._student)

    def reset(self) -> None:
        """Forget plans, statistics and counters, as at the start of a training run."""
        self.step = 0
        self._saved = None
        if self.engine is not None:
            self.engine.reset()


def _mixes_samples(student: nn.Module) -> bool:
    """Whether statistics over the samples of one process change what it computes."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return any(
        isinstance(module, batch_norm) and not isinstance(module, nn.SyncBatchNorm) and module.training
        for module in student.modules()
    )
