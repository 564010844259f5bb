"""Representation transfer for any PyTorch module: options, attached student, engine and schedule put together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.checks import check_count
from lightning_otrt.distillation import LogitDistillation, as_distillation
from lightning_otrt.layers.pairs import LayerOptions, LayerPair, LayerSpec
from lightning_otrt.notices import Notices
from lightning_otrt.options import FixedOptions, as_written
from lightning_otrt.processes import Processes
from lightning_otrt.reading.hooks.views import NoTermError
from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.recording import RecordedStudent
from lightning_otrt.run_state import RunState
from lightning_otrt.schedules import Schedule
from lightning_otrt.steps.distillation_term import Distillation
from lightning_otrt.steps.pair_distance import PairDistance
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.teacher.attachment import Attachment
from lightning_otrt.teacher.cache.cached_run import CacheUse
from lightning_otrt.teacher.cache.options import TeacherCache
from lightning_otrt.teacher.cache.sample_cache import SampleCache
from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.identities import Identities
from lightning_otrt.teacher.loading.load import TeacherSource, load_teacher
from lightning_otrt.teacher.logit_recording import LogitRecording
from lightning_otrt.teacher.pair_choice import ChoosePairs
from lightning_otrt.terms import make_terms
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.plans import check_plan_and_cost
from lightning_otrt.weights import StepWeights, Weights

__all__ = ["RepresentationTransfer"]

log = logging.getLogger(__name__)


class RepresentationTransfer(RecordedStudent, FixedOptions):
    r"""Optimal transport between the neurons of a frozen teacher and those of a student, as a term of the loss.

    While it is attached, each training forward of the student records the neurons of the chosen layers and runs the
    teacher on the same inputs. :meth:`loss` turns what was recorded since the last call into

    .. math:: \alpha \sum_{pairs} w_{pair} \langle P^*, M \rangle

    (arXiv 2007.06737, equation 3, summed over layers). The student is not changed, and needs no projection layers: the
    widths of student and teacher may differ. With ``distillation`` a term of the logits is added, see
    :class:`LogitDistillation`.

    Args:
        teacher: A module (compiled or not), a LightningModule, the name of a torchvision model (its default weights),
            ``(name, weights)``, ``"timm:name"``, a folder of Hugging Face or ``(checkpoint path, class)``; see
            :func:`load_teacher`. It is run in evaluation mode without gradient, in its own dtype, and never changed.
        layers: Which student layers are matched to which teacher layers: a mapping ``{student: teacher}``, a list of
            pairs or of names that both have, globs, ``"re:..."``, negative indices, ``"name:input"``,
            ``"penultimate"``, ``"blocks"``, ``"auto"`` (blocks where there are positions or tokens, else penultimate),
            ``"matched"`` (blocks of the student with the closest teacher layers on the first batch, in order),
            :class:`LayerPair` objects, or a list of these. Words are resolved once, by the first process for all, and
            a resumed run uses the pairs of its checkpoint.
        weight: Weight α of the term. 32 suits the correlation of blocks; for others there is
            :func:`~lightning_otrt.suggest_weight`. It may be set again at any time, as ``schedule`` may.
        student_root: Name of the student's submodule whose inputs the teacher gets too, or of its method, as in
            ``"net:forward_features"``; None: the outermost one that holds the layers and is called.
        cost: ``"correlation"``, ``"euclidean"``, ``"sqeuclidean"`` or a function of raw neurons ``(N, n)``, ``(M, n)``
            that gives ``(N, M)``. ``plan="orthogonal"`` takes ``"correlation"`` (standardised neurons) or
            ``"covariance"`` (neurons keep their scale).
        plan: ``"sinkhorn"``, ``"exact"``, ``"static"`` (fixed once 256 samples were seen), ``"orthogonal"`` (a rotation
            of the teacher's neurons instead), ``"auto"`` (orthogonal for pairs without axes of their own, else
            Sinkhorn), or a control: ``"identity"``, ``"uniform"``, ``"random"``, ``"random_orthogonal"``.
        epsilon: Entropic regularisation, relative to the mean cost.
        memory: Decay of a running cost behind the plan: 0 sees the current batch alone; ``"auto"`` is 0.98 for layers
            with more neurons than the batch has samples, else 0.
        solve_every: Calls between two solves of the plan; the first come after 0, 1, 2, 4 and 8 calls.
        grid: Positions kept along each axis of a feature map; see :func:`neurons`.
        schedule: From the step (``trainer.global_step``, or calls of :meth:`loss`) to a factor on both weights, such as
            :class:`LinearWarmup`.
        distillation: Weight of a second term, the distillation of logits (arXiv 1503.02531), or
            :class:`LogitDistillation` with a temperature. It compares the softmax over classes: for several labels of
            a sample there is ``activation="sigmoid"``, and for a regression it is wrong. The gradient of the logits in
            the first backward pass shows most such tasks, and there is a warning.
        teacher_inputs: From the inputs of the student's root to those of the teacher: a function that returns a tensor,
            a tuple of positional or a dictionary of keyword arguments.
        teacher_dtype: Run a copy of the teacher in this dtype, such as ``"bfloat16"``. The copy follows a teacher that
            its owner trains. None: its own dtype, or that of a true precision (``"bf16-true"``) of the Trainer.
        teacher_cache: Run the teacher once for each distinct sample, and keep what is used of its outputs: in
            ``"memory"``, in memory up to a size such as ``"4GB"``, or in a folder that runs and processes share; see
            :class:`TeacherCache`, and :class:`FixedViews` for random augmentation.
        global_batch: Whether the term is that of the batch over all processes: the same numbers as one process with all
            samples, where gradients are averaged, as DDP and FSDP do. None: where torch.distributed runs several
            processes. False is another objective: plans and a term of the samples of each process.
        strict: Raise where a term cannot be formed; else warn once and leave it out.
        seed: Seed of random plans and rotations.
        process_group: The processes of the global batch; None: the default group, where one is initialised. Only for
            loops without a Trainer, whose strategy knows its processes.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.
        FileNotFoundError: If the teacher is a checkpoint that does not exist.
        ImportError: If the package or the class of a teacher that has to be loaded cannot be imported.
        RuntimeError: If its weights cannot be read or downloaded.

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
        >>> transfer
        RepresentationTransfer(Sequential(...), 'penultimate', weight=0.5)
        >>> transfer.pairs
        (LayerPair('2:input', '2:input', neuron_axis=(1, 1)),)
    """

    def __init__(
        self,
        teacher: TeacherSource,
        layers: LayerSpec = "auto",
        *,
        weight: float = 32.0,
        student_root: str | None = None,
        cost: str | Callable[[Tensor, Tensor], Tensor] = "correlation",
        plan: str = "sinkhorn",
        epsilon: float = 0.01,
        memory: float | str = "auto",
        solve_every: int = 10,
        grid: int | None = 4,
        schedule: Schedule | None = None,
        distillation: float | LogitDistillation = 0.0,
        teacher_inputs: Callable[..., Any] | None = None,
        teacher_dtype: torch.dtype | str | None = None,
        teacher_cache: TeacherCache | str | os.PathLike[str] | None = None,
        global_batch: bool | None = None,
        strict: bool = True,
        seed: int = 0,
        process_group: Any | None = None,
    ) -> None:
        self.layers, self.weight, self.student_root = layers, weight, student_root
        self.cost, self.plan, self.epsilon = cost, plan, epsilon
        self.memory, self.solve_every, self.grid = memory, solve_every, grid
        self.schedule, self.distillation, self.teacher_cache = schedule, distillation, teacher_cache
        self.teacher_inputs, self.teacher_dtype = teacher_inputs, teacher_dtype
        self.global_batch, self.strict, self.seed, self.process_group = global_batch, strict, seed, process_group
        #: The cost behind its name.
        self.ground_cost = get_cost(cost)
        check_plan_and_cost(plan, self.ground_cost)
        self._teacher_text = as_written(teacher)
        self.teacher = Teacher(load_teacher(teacher), inputs=teacher_inputs, dtype=teacher_dtype)
        self._check_every: int | None = None
        #: Called with the table of chosen layers and other notes. By default they go to the logger of this module.
        self.report: Callable[[str], None] | None = None
        self.distances: list[PairDistance] = []  #: The distances of the last call of :meth:`loss`.
        self.samples = 0  #: Number of samples in the forwards of the last call of :meth:`loss`.
        #: The unweighted transport term of the last call of :meth:`loss`, detached; None if it had none.
        self.transport_value: Tensor | None = None
        #: The unweighted distillation of logits of that call, likewise.
        self.distillation_value: Tensor | None = None
        # Plain, since it is saved: a number of NumPy would need `weights_only=False` to be loaded.
        decay = memory if isinstance(memory, str) else float(memory)
        settings = TermSettings(self.ground_cost, plan, float(epsilon), decay, solve_every, seed, strict)
        processes = Processes(global_batch, process_group)
        option = as_distillation(distillation)
        state, logits = None, None
        if option.weight:
            state, logits = Distillation(option.temperature, strict=strict), LogitRecording(option, grid)
        identities = Identities(self.teacher, logits)
        self.run_state = RunState(layers, settings, processes, identities, state)
        #: What is kept of the teacher's outputs, with counts of hits and misses; None without ``teacher_cache``.
        self.cache = SampleCache.of(teacher_cache)
        cache = None if self.cache is None else CacheUse(self.cache, strict, processes.agree)
        chosen = LayerOptions(layers, student_root, grid, plan)
        attachment = Attachment(self.teacher, chosen, self._choose_pairs, cache, logits)
        super().__init__(attachment, StepWeights(Weights(weight, option.weight), schedule))
        self._notices = Notices(strict=strict)

    @property
    def pairs(self) -> tuple[LayerPair, ...]:
        """The resolved pairs, empty before the first forward."""
        return self.run_state.pairs

    @property
    def labels(self) -> tuple[str, ...]:
        """The name under which each pair is logged. It is the student layer, and more if that has several pairs."""
        return self.run_state.labels

    @property
    def engine(self) -> Any:
        """What keeps plans and statistics; None before the first forward."""
        return self.run_state.engine

    @property
    def check_every(self) -> int | None:
        """Calls between two reads of the flags for values that are not finite.

        With None ``log_every_n_steps`` of the Trainer, or 50.
        """
        return self._check_every

    @check_every.setter
    def check_every(self, value: int | None) -> None:
        check_count("check_every", value, optional=True)
        self._check_every = value

    @property
    def cuda_graphs(self) -> bool:
        """Whether steps of one process on a CUDA device are captured as graphs, which saves most launches.

        They hold memory: some four times the neurons and the cost matrices of a step. Set it to False to save that.
        """
        return self.run_state.graphs.is_enabled

    @cuda_graphs.setter
    def cuda_graphs(self, value: bool) -> None:
        self.run_state.graphs.is_enabled = value
        if not value:
            self.run_state.graphs.forget()

    def detach(self) -> None:
        """Remove all hooks, and give the teacher back on its device and in its mode. Plans and statistics are kept."""
        super().detach()
        self.run_state.graphs.forget()

    @contextmanager
    def attached(self, student: nn.Module) -> Iterator[RepresentationTransfer]:
        """Record every training forward of ``student`` inside the ``with`` block; no hook is left after it.

        Args:
            student: The module that is trained.

        Raises:
            TypeError: If the student is no module.
            ValueError: If a layer name does not exist, or the teacher shares parameters with the student.
            RuntimeError: If it is attached already, or at the end of the block if a layer never ran.
        """
        self.attach(student)
        try:
            with self.recording():
                yield self
                self.check_layers()
                self.check_finite()
                if self.has_views and not self._was_asked:
                    self._notices.warn(
                        f"{len(self.views)} forwards of the student were recorded, but `loss` was never called while "
                        "it was attached, so that no transfer term was trained on. Add `transfer.loss()` to the loss "
                        "of each step.",
                        key="loss",
                    )
        finally:
            self.detach()

    def loss(self, *, reevaluation: bool = False) -> Tensor:
        """The weighted term of all forwards since the last call. It also counts one step.

        Args:
            reevaluation: Whether this is the batch of the last call again, as in the closures of LBFGS. Plans,
                statistics and the step then stay as they are.

        Returns:
            A scalar in float32 or wider; zero without graph where the weight is 0.

        Raises:
            RuntimeError: If it is not attached, the student was not called, a layer ran twice or in none of 32 calls,
                no layer in any of 8, or the term does not depend on the student's parameters.
            ValueError: On the first call, if a value is not finite or there are too few observations.
        """
        if (student := self._attachment.student) is None:
            raise RuntimeError("`loss` needs an attached student: call it inside `with transfer.attached(student):`.")
        self._was_asked = True
        self._attachment.check_task()
        weights, views = self._weights.of_call(again=reevaluation), self._attachment.take()
        if not reevaluation:
            self.step += 1
        self._forget_values()
        self.samples = self._attachment.samples(views)
        if not any(weights):
            return self._zero()
        if (problem := self._attachment.root.take_problem()) is not None:
            self._notices.fail(RuntimeError(problem), otherwise=problem, key="root")
        try:
            terms = make_terms(self._attachment, self.run_state, views, self.samples, weights, reevaluation)
        except NoTermError as error:
            self._give_up(str(error))
            return self._zero()
        for message in terms.left_out:
            self._notices.warn(message)
        if terms.transport is not None and (note := self._attachment.unreached(views)):
            (self.report or log.info)(note)
        if constant := terms.constant:
            message = f"The student layers {constant} get no gradient: nothing before them is trained."
            self._notices.warn(message, key="constant")
        self.transport_value, self.distillation_value = terms.transport, terms.distillation
        self.distances = terms.distances
        missed = self.run_state.look_for_missed(student)
        if missed.error:
            self._give_up(missed.error)
        if missed.warning:
            self._notices.warn(missed.warning, key="missing")
        if self.run_state.calls % (self._check_every or self.run_state.check_every) == 0:
            self.check_finite()
        return terms.total

    def check_layers(self) -> None:
        """Raise a RuntimeError, or warn unless ``strict``, if a layer never ran. Call it at the end of a loop."""
        self._attachment.check_task()
        if missed := self.run_state.look_for_missed().error:
            self._give_up(missed)

    def check_finite(self) -> int:
        """Read how many values were not finite, and warn once. This waits for the device.

        Returns:
            The number of calls since the last read whose value was NaN or infinite.
        """
        bad, message = self.run_state.take_bad_calls(self.distances)
        if bad:
            self._notices.warn(f"Up to step {self.step}, {message}", key="not finite")
        return bad

    def synchronize(self) -> None:
        """Bring the running cost of a global batch together: a collective before a save, which callbacks do."""
        self.run_state.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """Step, resolved pairs, plans and statistics; without the teacher. Loads with ``weights_only=True``."""
        return {"step": self.step, **self.run_state.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; plans are placed on the student's device when the layers are resolved.

        If ``layers`` is the same, the saved pairs are used: a new choice may depend on the first batch.

        Raises:
            ValueError: If it is no such state, or was saved with other layers; for a student that has not run yet the
                latter comes in its first forward.
        """
        self.discard()
        if self.run_state.load_state_dict(state, self._attachment.device):
            self._attachment.choose_again()
        self.step = state["step"]

    def reset(self) -> None:
        """Forget plans, statistics and counters, as at the start of a training run."""
        self.discard()  # a forward of before is none of the new run
        self.step, self._weights.last = 0, None
        self._forget_values()
        self.run_state.reset(self.student if self.has_chosen else None)
        self._attachment.reset()
        self._notices = Notices(strict=self.strict)

    def _forget_values(self) -> None:
        """Forget what the last call of :meth:`loss` found."""
        self.samples, self.distances = 0, []
        self.transport_value = self.distillation_value = None

    def _choose_pairs(self, choose: ChoosePairs) -> Pairing:
        """The pairs of this run, chosen in the first forward of the student and reported as a table."""
        student = self.student
        assert student is not None
        report = self.report or log.info
        pairing = self.run_state.choose_pairs(student, choose, self._attachment.device, report)
        names = type(self.teacher.module).__name__, type(student).__name__
        notes = "\n".join(filter(None, (pairing.table(), self._attachment.note)))
        report(f"Representation transfer from {names[0]} to {names[1]}:\n{notes}")
        return pairing

    def _option_changed(self) -> None:
        """The weight or the schedule was set."""
        self._weights.set(Weights(self.weight, self._weights.full.distillation), self.schedule)
        self._switch()

    def _give_up(self, message: str) -> None:
        self._notices.fail(RuntimeError(message), otherwise=f"{message} (strict=False: it is left out.)")

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self._attachment.device)
