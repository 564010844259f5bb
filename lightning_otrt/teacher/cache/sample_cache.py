"""What a teacher gives for a batch, of which only the samples that are new run through it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_otrt.notices import warn
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.torch_internals import version_of
from lightning_otrt.reading.traced.arguments import Inputs
from lightning_otrt.teacher.cache.entries import SampleKeys, has_entries, split_entries
from lightning_otrt.teacher.cache.forms import Form, Forms
from lightning_otrt.teacher.cache.numerics import Numerics
from lightning_otrt.teacher.cache.options import TeacherCache, parse_cache
from lightning_otrt.teacher.cache.per_sample import Run, cloned, tolerance, why_not_per_sample
from lightning_otrt.teacher.cache.sample_hash import SampleHash, check_dense
from lightning_otrt.teacher.cache.samples import leaves, select_samples
from lightning_otrt.teacher.cache.store import Found, SampleStore
from lightning_otrt.teacher.host_copy import HostCopy

__all__ = ["CannotCacheError", "SampleCache"]

#: Makes a context.
Block: TypeAlias = Callable[[], AbstractContextManager[None]]
#: Keys of samples and their tensors, which are on their way to the host.
_Adding: TypeAlias = list[tuple[Tensor, dict[str, HostCopy]]]

#: Epochs of a run without a sample that was known, after which no more are kept until one is.
PATIENCE = 2


class CannotCacheError(Exception):
    """What the teacher gives cannot be kept by sample; the message says why."""


class SampleCache:
    """Tensors of samples, from a store or from a run of the teacher on those that the store does not have.

    It waits for a device once in a step, for 16 bytes of each sample: how many of them are new decides what the teacher
    runs on. What is kept is copied to the host while the step goes on, and is in the store with the next batch.

    Args:
        options: Where samples are kept.

    Attributes:
        store: The samples; None before :meth:`open`.
        hits: Samples that were known, so far.
        misses: Samples that the teacher ran on, so far.
        epoch: Epochs that have started.
        clones: Whether the teacher gets clones of its inputs, since it writes to them.
    """

    def __init__(self, options: TeacherCache) -> None:
        self.options = options
        self.store: SampleStore | None = None
        self.hits = self.misses = self.epoch = 0
        self.clones = False
        self._fingerprint = ""
        self._hash = SampleHash()
        # What the last batch added, at most one item: what writes at exit has it without this object.
        self._adding: _Adding = []
        self._at_exit: weakref.finalize[..., SampleCache] | None = None
        self._dtype = torch.float32
        self._forms = Forms()
        self._epochs = self._seen = self._hits_of_run = self._known_before = 0
        self._useless = False

    @classmethod
    def of(cls, option: Any) -> SampleCache | None:
        """The cache for what a user wrote as ``teacher_cache``; see :func:`parse_cache`."""
        options = parse_cache(option)
        return None if options is None else cls(options)

    @property
    def hit_rate(self) -> float:
        """Share of all samples so far that were known."""
        return self.hits / max(1, self.hits + self.misses)

    def open(self, fingerprint: str, batch_size: int, inputs: Inputs, dtype: torch.dtype) -> None:
        """Open the store of a teacher, unless it is open, and count the epochs of this run.

        Args:
            fingerprint: All that decides what is kept of a sample.
            batch_size: Samples of the batch of ``inputs``.
            inputs: The teacher's inputs, of which those with an entry for each sample are noted.
            dtype: Type of the teacher.

        Raises:
            CannotCacheError: If the inputs hold something that cannot be read.
        """
        self._dtype = dtype
        try:
            named = _tensors(inputs)
        except TypeError as error:
            raise CannotCacheError(str(error)) from error
        if self.store is None or fingerprint != self._fingerprint:
            self._forms = Forms()
        if not self._forms.first(named, batch_size).own:
            samples = f"one entry for each of the {batch_size} samples" if batch_size else "an axis of samples"
            raise CannotCacheError(f"none of its inputs has {samples}")
        if self.store is None or fingerprint != self._fingerprint:
            self.reopen(fingerprint)
        else:
            self._write_at_exit(self.store)
        # Each run may have data of its own, such as another fold.
        self._epochs = self._seen = self._hits_of_run = 0
        self._useless = False
        assert self.store is not None
        self._known_before = self.store.samples

    def reopen(self, fingerprint: str) -> None:
        """Go on with the store of another teacher, such as this one after a change."""
        self.flush()
        self.store, self._fingerprint, self._epochs = self.options.open(fingerprint), fingerprint, 0
        self._known_before = self.store.samples
        self._write_at_exit(self.store)

    @torch.no_grad()
    def tensors(self, inputs: Inputs, run: Run, verify: Callable[[], None], undone: Block) -> dict[str, Tensor]:
        """What the teacher gives for a batch, ``(B, ...)`` by name.

        Args:
            inputs: The teacher's inputs.
            run: Runs the teacher on inputs.
            verify: Called when the host has waited for the keys, before anything is looked up.
            undone: Makes a context in which further runs leave no trace, for the check of the first batch.

        Raises:
            CannotCacheError: If the inputs cannot be read, or on the first batch, if the teacher mixes samples or is
                random.
        """
        assert self.store is not None
        try:
            named = _tensors(inputs)
            form, size = self._forms.of(named)
            if form is None or not size:
                self._count(0, next((len(tensor) for _, tensor in named if tensor.dim()), 0))
                return run(self._given(inputs), 0)
            device = _device_of([named[place][1] for place in form.own])
            copied = self._keys(inputs, size, form, device)
        except TypeError as error:
            raise CannotCacheError(str(error)) from error
        keys, found, known, missing = self._find(copied, verify, device)
        self._count(len(known), len(missing))
        if not len(missing):
            return found.tensors
        if form.checked < min(size, 2):
            had_entries = form.has_entries
            try:
                fresh = self._checked_run(inputs, size, run, form, device, undone)
            except CannotCacheError as error:
                if form.is_first:
                    raise
                return self._left_out(form, inputs, run, error)
            form.checked = min(size, 2)
            if had_entries and not form.has_entries and has_entries(inputs, size):
                keys = self._keys(inputs, size, form, device).wait()
            self._keep(keys, fresh)
            return fresh
        if len(missing) == size:
            fresh = run(self._given(inputs), size)
            self._keep(keys, fresh)
            return fresh
        index = _on(missing, device)
        places_of_entries = missing.tolist() if form.has_entries else None
        fresh = run(self._given(select_samples(inputs, index, size, places_of_entries)), len(missing))
        if _layout(fresh) != _layout(found.tensors):
            return run(self._given(inputs), size)
        self._keep(keys[missing], fresh)
        places = _on(known, device)
        return {
            name: part.new_empty(size, *part.shape[1:]).index_copy_(0, index, part).index_copy_(0, places, kept)
            for (name, part), kept in zip(fresh.items(), found.tensors.values(), strict=True)
        }

    def _keys(self, inputs: Inputs, size: int, form: Form, device: torch.device) -> SampleKeys:
        """The keys of the samples of a batch, on their way to the host."""
        entries = None
        # A list of one, in a batch of one, may be common to the samples of other batches.
        if form.has_entries and (size > 1 or form.checked > 1):
            inputs, entries = split_entries(inputs, size)
        hashed = self._hash((((tuple(inputs[0]), dict(inputs[1]), str(Numerics.now(device))),), {}), size)
        return SampleKeys(HostCopy(hashed), entries)

    def _find(
        self, copied: SampleKeys, verify: Callable[[], None], device: torch.device
    ) -> tuple[Tensor, Found, Tensor, Tensor]:
        """Look samples up on the host, which waits for their keys: the only wait of a step.

        Returns:
            The keys, what is known, and the places of the known and of the other samples in the batch, on the CPU.
        """
        assert self.store is not None
        _add(self.store, self._adding)
        keys = copied.wait()
        verify()
        found = self.store.lookup(keys, device)
        return keys, found, torch.nonzero(found.mask)[:, 0], torch.nonzero(~found.mask)[:, 0]

    def start_epoch(self) -> None:
        """Look for what other processes have written. The callbacks call it; a plain loop may."""
        self.epoch += 1
        if self.store is not None:
            self.store.refresh()
        self._seen = 0

    def end_epoch(self) -> None:
        """Write what was added. Where no sample comes again say so, and keep no more until one does.

        See :meth:`start_epoch`.
        """
        self.flush()
        self._epochs += self._seen > 0
        # A store that was full before holds no sample of this run that could come again.
        may_hit = self.store is not None and (not self.store.is_full or self.store.samples > self._known_before)
        if may_hit and self._epochs >= PATIENCE and not self._hits_of_run and not self._useless:
            self._useless = True
            warn(
                f"In {self._epochs} epochs no sample came a second time, so that `teacher_cache` saved nothing. It "
                "keeps no more of them, unless one does. Random augmentation makes a new image each time: "
                "`FixedViews(dataset, views=8)` gives a few fixed versions of each. Texts that are padded to the "
                "longest of a batch differ as well: pad them to one length.",
            )

    def flush(self) -> None:
        """Write what was added, for other processes and later runs."""
        if self.store is not None:
            _write(self.store, self._adding)

    def _checked_run(
        self, inputs: Inputs, size: int, run: Run, form: Form, device: torch.device, undone: Block
    ) -> dict[str, Tensor]:
        """Run the teacher on a batch, and check that what it gives for a sample is of that sample alone."""
        own, numerics = cloned(inputs), Numerics.now(device)
        versions = _versions(own)
        whole = run(own, size)
        if _versions(own) != versions and not self.clones:
            self.clones = True
            warn(
                "The teacher writes to its inputs in place, as inplace=True in a normalisation does. It gets clones. "
                "Write the operation without in-place changes to save these copies."
            )
        limit = tolerance(numerics.autocast or self._dtype, is_float32_shortened=numerics.is_float32_shortened)
        # A list that is as long as the batch has entries of its samples, or by chance the names of as many classes.
        is_unclear = size > 1 and form.has_entries and has_entries(inputs, size)
        reason = ""
        for by_entry in (True, False) if is_unclear else (False,):
            with undone():
                reason = why_not_per_sample(inputs, size, run, whole, limit, device, by_entry=by_entry)
            if not reason:
                form.has_entries = by_entry if size > 1 else form.has_entries
                return whole
        raise CannotCacheError(reason)

    def _given(self, inputs: Inputs) -> Inputs:
        """What the teacher runs on: the student's inputs, or clones where it writes to them."""
        return cloned(inputs) if self.clones else inputs

    def _left_out(self, form: Form, inputs: Inputs, run: Run, error: CannotCacheError) -> dict[str, Tensor]:
        """Run the teacher on a batch whose form, unlike that of the first batch, cannot be kept by sample."""
        form.own = []
        warn(
            f"`teacher_cache` keeps no samples of batches that are built as this one, unlike the first: {error}. The "
            "teacher runs on all of them."
        )
        return run(self._given(inputs), 0)

    def _count(self, known: int, missing: int) -> None:
        self.hits, self.misses = self.hits + known, self.misses + missing
        self._hits_of_run += known
        self._useless &= not self._hits_of_run
        self._seen += known + missing

    def _keep(self, keys: Tensor, fresh: dict[str, Tensor]) -> None:
        if self.store is not None and not self._useless and not self.store.is_full:
            self._adding[:] = [(keys, {name: HostCopy(tensor) for name, tensor in fresh.items()})]

    def _write_at_exit(self, store: SampleStore) -> None:
        """Write what was added when this cache, or the process, ends without :meth:`flush`."""
        if self._at_exit is not None:
            self._at_exit.detach()
        self._at_exit = weakref.finalize(self, _write_here, os.getpid(), store, self._adding)

    def __getstate__(self) -> dict[str, Any]:
        """Without copies that are under way, and what was counted: a pickle holds no samples of memory."""
        return {**self.__dict__, "_adding": [], "_at_exit": None, "_epochs": 0}

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleCache:
        """The cache itself: a copied callback goes on with the same samples."""
        return self


def _add(store: SampleStore, adding: _Adding) -> None:
    while adding:
        keys, copies = adding.pop()
        store.add(keys, {name: copied.wait() for name, copied in copies.items()})


def _write(store: SampleStore, adding: _Adding) -> None:
    _add(store, adding)
    store.flush()


def _write_here(process: int, store: SampleStore, adding: _Adding) -> None:
    """Write in the process that added, and not in one that was forked from it."""
    if os.getpid() == process:
        _write(store, adding)


def _tensors(inputs: Inputs) -> list[tuple[str, Tensor]]:
    found = [(path, value) for path, value in leaves(inputs) if isinstance(value, Tensor)]
    for path, value in found:
        check_dense(value, path)
    return found


def _versions(inputs: Inputs) -> list[int]:
    return [version_of(tensor) for tensor in all_tensors((inputs[0], dict(inputs[1])))]


def _layout(tensors: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tensors.items()]


def _device_of(tensors: Sequence[Tensor]) -> torch.device:
    """The device of a batch: the first one besides the CPU, where lengths may stay."""
    devices = [tensor.device for tensor in tensors]
    return next((device for device in devices if device.type != "cpu"), devices[0])


def _on(index: Tensor, device: torch.device) -> Tensor:
    """An index on a device, without a wait."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)
