"""A teacher that runs on the samples of a batch that are new, and whose readings of the others come from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_otrt.layers.names import listed
from lightning_otrt.notices import warn
from lightning_otrt.random_numbers import draw
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.extra_forwards.evaluation import state_restored
from lightning_otrt.reading.hooks.recorder import Readers, Recorder
from lightning_otrt.reading.hooks.views import View
from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.reading.traced.arguments import Inputs
from lightning_otrt.reading.traced.batch_facts import holds_image
from lightning_otrt.teacher.cache.fingerprint import fingerprint
from lightning_otrt.teacher.cache.sample_cache import CannotCacheError, SampleCache
from lightning_otrt.teacher.cache.weight_watch import WeightWatch
from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.frozen.plain_watch import STEPS_BETWEEN_LOOKS, PlainWatch

__all__ = ["CacheUse", "CachedRun"]

#: Raise this number whenever readings change, as with another pooling: entries of older caches are then not used.
READING = 1
#: Changes of what the teacher computes, in one run, after which a warning says so.
PATIENCE = 3
#: Names of the teacher's logits and of their mask in the cache. Those of layers are ``"pair.call"``, two numbers.
_LOGITS, _LOGIT_MASK = "logits.0", "logit mask.0"
#: Why teachers such as the detectors of torchvision are refused.
_ITEMS = (
    "its samples enter as items of a list, and the cache reads samples along the first axis of tensors. Where all have "
    "one size and the teacher takes a batch, stack them in `teacher_inputs`"
)


@dataclass(frozen=True)
class CacheUse:
    """How a cache is used.

    Args:
        cache: Where readings are kept.
        strict: Raise where they cannot be; else warn once, and run the teacher on all samples.
        agree: Makes the problem of one process that of all. A collective where processes train together.
    """

    cache: SampleCache
    strict: bool
    agree: Callable[[str], str]


class CachedRun:
    """Fills the current view with the readings of the teacher, whatever its hooks put there.

    A reading ``(B, C, *positions)`` is a tensor per sample. Masks of the teacher are read with the samples that run.

    Args:
        teacher: The teacher.
        recorder: The recorder whose hooks are on it.
        use: The cache.
        read: Called with what the teacher returned, after each run. It may add readings to the current view.
    """

    def __init__(self, teacher: Teacher, recorder: Recorder, use: CacheUse, read: Callable[[Any], None]) -> None:
        self.teacher, self.recorder, self.cache = teacher, recorder, use.cache
        self._strict, self._agree, self._read = use.strict, use.agree, read
        self._watch: WeightWatch | None = None
        self._plain: PlainWatch | None = None
        self._settings: dict[str, Any] = {}
        self._known = ""
        self._compared = self._changes = self._batches = 0
        self._off = self._is_deep = False

    def learning(self) -> AbstractContextManager[None]:
        """Learn what forwards of the teacher in the block change, such as counters, which make no other teacher."""
        return self._watch_of_module().learning()

    def first(self, inputs: Inputs, pairing: Pairing, readers: Readers, more: str = "") -> None:
        """Open the cache for the chosen pairs, and run the first batch. All processes call it together.

        Args:
            inputs: The teacher's inputs.
            pairing: The pairs of layers.
            readers: What is recorded of the teacher.
            more: What else is kept of its output, in words that are equal for equal readings.

        Raises:
            ValueError: If the teacher cannot be cached, here or on another process, and ``strict``.
        """
        self._off, self._compared, self._changes, self._batches, problem = False, self.cache.epoch, 0, 0, ""
        kept = [
            (str(index), layer.name, layer.reader, [mask for mask, _ in layer.masks if not mask.is_full])
            for index, layer in readers.items()
        ]
        self._settings = {
            "reading": READING,
            "layers": kept,
            "root": self.teacher.call.root,
            "method": self.teacher.call.method,
            **({"more": more} if more else {}),
        }
        try:
            self._watch_of_module().changed(everything=True)
            self._known = self._fingerprint()
            self._watch = WeightWatch(self.teacher.source)
            self.cache.open(self._known, _batch_size(pairing, inputs), inputs, self.teacher.run_dtype)
            self._fill(inputs)
        except CannotCacheError as error:
            problem = _ITEMS if _enter_as_items(pairing, inputs) else str(error)
        problem = self._agree(problem)
        if problem:
            self._give_up(problem, inputs)

    def __call__(self, inputs: Inputs) -> None:
        """Run a later batch.

        Raises:
            ValueError: If the teacher cannot be cached, or its weights have changed, and ``strict``.
        """
        if self._off:
            self._run_whole(inputs)
            return
        try:
            self._fill(inputs)
        except CannotCacheError as error:
            self._give_up(str(error), inputs)

    def close(self) -> None:
        """Write what was kept, at the end of a run."""
        self._watch = None
        self.cache.flush()

    def _fill(self, inputs: Inputs) -> None:
        assert self.recorder.current is not None
        before, watch = self._plain, self._watch or WeightWatch(self.teacher.source)
        plain = self._watch_of_module()
        is_other = plain is not before
        # At the start of each epoch all of the weights, since a short look sees some of each tensor.
        everything = self._compared != self.cache.epoch
        looked = watch.look(everything=everything)
        self._is_deep = is_deep = everything or self._batches % STEPS_BETWEEN_LOOKS == 0
        self._batches += 1
        self._watch, self._compared = watch, self.cache.epoch

        def verify() -> None:
            if name := watch.changed(looked):
                self._compare(name)
            if is_other or (names := plain.changed(everything=is_deep)):
                self._warn_of_changes(["its copy in another type"] if is_other else names)
                self._change_store()

        given = list(all_tensors((inputs[0], dict(inputs[1]))))
        tensors = self.cache.tensors(inputs, self._run, verify, lambda: self._undone(given))
        _put(tensors, self.recorder.current)

    @contextmanager
    def _undone(self, given: list[Tensor]) -> Iterator[None]:
        """Undo what the check of the first batch changes. In it a random teacher draws other numbers than before."""
        call = self.teacher.call
        self.teacher.call = replace(call, draws_random=False)
        try:
            with state_restored(self.teacher.module, given):
                draw(given)
                yield
        finally:
            self.teacher.call = call

    def _run(self, inputs: Inputs, size: int) -> dict[str, Tensor]:
        """Run the teacher, and take what its hooks read out of the view."""
        view = self.recorder.current
        assert view is not None
        _forget(view)
        self._run_whole(inputs)
        if self._plain is not None and self._plain.learn(everything=self._is_deep):
            self._change_store()
        tensors = _as_tensors(view, size)
        _forget(view)
        return tensors

    def _run_whole(self, inputs: Inputs) -> None:
        self._read(self.teacher.run_recorded(self.recorder, *inputs))

    def _watch_of_module(self) -> PlainWatch:
        """The watch of the teacher as it runs: another copy has another one, where the same does not count."""
        if self._plain is None or self._plain.module is not self.teacher.module:
            changing = set() if self._plain is None else self._plain.changing
            self._plain = PlainWatch(self.teacher.module)
            self._plain.changing |= changing
        return self._plain

    def _warn_of_changes(self, names: Sequence[str]) -> None:
        """Say once in a run that a teacher changes again and again."""
        self._changes += 1
        if self._changes == PATIENCE:
            warn(
                f"What the teacher computes has changed {PATIENCE} times in this run: {listed(names, at_most=3)}. Each "
                "time `teacher_cache` starts anew, so that it saves little. Leave it out, or let what is changed enter "
                "the teacher as an input."
            )

    def _change_store(self) -> None:
        """Go on with the store of what the teacher computes now."""
        self._known = self._fingerprint()
        self.cache.reopen(self._known)

    def _fingerprint(self) -> str:
        changing = self._watch_of_module().changing
        try:
            return fingerprint(self.teacher.module, changing, dtype=self.teacher.run_dtype, **self._settings)
        except (TypeError, ValueError) as error:
            raise CannotCacheError(f"its weights cannot be compared ({error})") from error

    def _compare(self, name: str) -> None:
        """Compare all weights with those that the cache was opened for.

        Args:
            name: One that may have changed.
        """
        if self._fingerprint() != self._known:
            raise CannotCacheError(
                f"its weights changed during the run ({name!r} among them), as those of a moving average do, so that "
                "what was kept is that of another teacher"
            )
        self._watch = WeightWatch(self.teacher.source)

    def _give_up(self, problem: str, inputs: Inputs) -> None:
        """Raise; or warn, and go on without the cache."""
        kind, reason = type(self.teacher.source).__name__, problem.rstrip(".")
        message = f"`teacher_cache` cannot be used with this teacher ({kind}): {reason}."
        if self._strict:
            raise ValueError(f"{message} Leave out `teacher_cache`; with strict=False the teacher runs on all samples.")
        self._off = True
        warn(f"{message} It runs on all samples, because of strict=False.")
        assert self.recorder.current is not None
        _forget(self.recorder.current)
        self._run_whole(inputs)


def _layer_sizes(pairing: Pairing) -> list[int]:
    """How many samples each recorded layer had in the trace."""
    traced = [pairing.teacher.tensor(pair.teacher, pair.select) for pair in pairing.pairs]
    return [tensor.shape[tensor.batch_axis] for tensor in traced if tensor is not None]


def _enter_as_items(pairing: Pairing, inputs: Inputs) -> bool:
    """Whether an input is a list of images, one for each sample of a recorded layer."""
    lists = [value for value in (*inputs[0], *inputs[1].values()) if isinstance(value, (list, tuple)) and value]
    sizes = _layer_sizes(pairing)
    return any(len(value) in sizes and all(map(holds_image, value)) for value in lists)


def _batch_size(pairing: Pairing, inputs: Inputs) -> int:
    """Samples of the traced batch: as many as a recorded layer has, if an input has that many, too.

    Layers may have the windows of all samples along that axis, and the inputs of the whole network may be ambiguous.
    """
    sizes = _layer_sizes(pairing)
    given = all_tensors((inputs[0], dict(inputs[1])))
    entered = {len(tensor) for tensor in given if not tensor.is_nested and tensor.dim()}
    return next((size for size in sizes if size in entered), pairing.teacher.batch_size)


def _forget(view: View) -> None:
    """Take out of a view what was read of the teacher."""
    view.teacher, view.teacher_logits, view.teacher_logit_mask = {}, None, None
    view.teacher_version = None


def _as_tensors(view: View, size: int) -> dict[str, Tensor]:
    """What was read of the teacher: one tensor ``(samples, rows of a sample, ...)`` for each call of each layer.

    Of all rows where size is 0. A mask is one of numbers, as a cache keeps them.
    """
    named = {f"{index}.{call}": one for index, calls in view.teacher.items() for call, one in enumerate(calls)}
    if view.teacher_logits is not None:
        named[_LOGITS] = view.teacher_logits
        if view.teacher_logit_mask is not None:
            named[_LOGIT_MASK] = view.teacher_logit_mask.to(view.teacher_logits.dtype)
    found = {}
    for name, reading in named.items():
        rows = len(reading)
        if size and rows % size:
            raise CannotCacheError(f"a layer gives {rows} rows for {size} samples, which belong to no single one")
        found[name] = reading.reshape(size or 1, rows // (size or 1), *reading.shape[1:])
    return found


def _put(tensors: Mapping[str, Tensor], view: View) -> None:
    """Fill a view with the tensors of :func:`_as_tensors`."""
    _forget(view)
    for name, tensor in tensors.items():
        reading = tensor.flatten(0, 1)
        if name == _LOGITS:
            view.teacher_logits = reading
        elif name == _LOGIT_MASK:
            view.teacher_logit_mask = reading != 0
        else:
            view.teacher.setdefault(int(name.partition(".")[0]), []).append(reading)
