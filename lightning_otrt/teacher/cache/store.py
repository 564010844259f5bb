"""What is kept of each sample that a teacher has seen, by the sample's key, in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_otrt.notices import warn
from lightning_otrt.teacher.cache.key_index import Integers, KeyIndex
from lightning_otrt.teacher.cache.row_layout import RowLayout
from lightning_otrt.teacher.dtypes import named_dtype

__all__ = ["Found", "SampleStore", "Segment", "parse_dtype", "parse_size"]

#: Rows are kept in segments of so many bytes.
SEGMENT_BYTES = 32 * 2**20
_UNITS = {
    **{"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}


class Found(NamedTuple):
    """Answer to a lookup.

    Attributes:
        mask: ``(B,)``, true where a sample is known, on the CPU.
        tensors: What is kept of the known samples ``(mask.sum(), ...)``, in their order; empty where none is known.
    """

    mask: Tensor
    tensors: dict[str, Tensor]


@dataclass
class Segment:
    """Samples of one layout.

    Attributes:
        layout: What their rows mean.
        keys: ``(capacity, 2)``.
        rows: ``(capacity, words of 8 bytes)``.
        count: Samples that it holds.
        checks: Checksums ``(capacity,)`` of rows that have to be verified before their first use; None where the rows
            have never left this process.
        checked: Which rows have been.
    """

    layout: RowLayout
    keys: Integers
    rows: Integers
    count: int
    checks: Integers | None = None
    checked: np.ndarray[Any, np.dtype[np.bool_]] | None = None


class SampleStore:
    """Named tensors of samples, found by 128-bit keys; all of it in the memory of the host.

    The keys of a batch have to come to the host, since how many samples are new decides what the teacher runs on: with
    a device that is one wait for 16 bytes per sample and step, which :class:`HostCopy` starts early. So table and rows
    are there too, where there is more memory; known rows go to the device in one copy that nobody waits for.

    Args:
        limit: Bytes, or a size such as ``"4GB"`` or ``"512MiB"``; None: no limit. A full store takes no more samples,
            says so once, and goes on to answer.
        dtype: Type of what is kept: ``"float32"`` or ``"bfloat16"``. Tensors come back in the type that they had.

    Raises:
        ValueError: If the limit is no size, or the type another one.

    Example:
        >>> import torch
        >>> store = SampleStore(limit="1MB")
        >>> keys = torch.tensor([[1, 1], [2, 2], [3, 3]])
        >>> store.add(keys[:2], {"logits": torch.tensor([[0.5], [0.25]])})
        2
        >>> store.lookup(keys)
        Found(mask=tensor([ True,  True, False]), tensors={'logits': tensor([[0.5000],
                [0.2500]])})
    """

    #: Bytes of a sample besides its row: its key beside the row, and key and place in the index.
    bytes_of_a_key = 16 + 24

    def __init__(self, *, limit: int | str | None = None, dtype: torch.dtype | str = torch.float32) -> None:
        self.limit = None if limit is None else parse_size(limit)
        self.dtype = parse_dtype(dtype)
        #: Bytes of all samples, with their keys.
        self.bytes = 0
        #: Whether no sample is taken any more.
        self.is_full = False
        self._is_damaged = False
        self._index = KeyIndex()
        self._segments: list[Segment] = []
        # The segment that takes new samples.
        self._open: int | None = None

    @property
    def title(self) -> str:
        """What messages call it."""
        return "the teacher cache in memory"

    @property
    def samples(self) -> int:
        """The number of samples that are known."""
        return sum(segment.count for segment in self._segments)

    def lookup(self, keys: Tensor, device: torch.device | str = "cpu") -> Found:
        """What is kept of the samples of a batch.

        Args:
            keys: ``(B, 2)`` int64, on the CPU.
            device: Where the tensors are wanted; to a CUDA device they travel without a wait.

        Returns:
            Which samples are known, and their tensors, which are the caller's own.

        Raises:
            ValueError: If the keys have another form.
        """
        wanted = _as_keys(keys)
        places = self._find(wanted)
        numbers, known = places >> 32, places >= 0
        if known.any():
            # Inputs of one shape have outputs of one shape, so another layout is that of another kind of input.
            layout = self._segments[numbers[known][0]].layout
            alike = [number for number in np.unique(numbers[known]) if self._segments[number].layout == layout]
            known &= np.isin(numbers, alike)
            rows, intact = self._gather(wanted[known], places[known], layout, torch.device(device).type == "cuda")
            if not intact.all():
                self._drop(wanted[known][~intact])
                return self.lookup(keys, device)
            return Found(torch.from_numpy(known), layout.unpack(rows.to(device, non_blocking=True)))
        return Found(torch.from_numpy(known), {})

    def add(self, keys: Tensor, tensors: Mapping[str, Tensor]) -> int:
        """Keep samples; those that are known already stay as they are.

        Args:
            keys: ``(B, 2)`` int64, on the CPU.
            tensors: ``(B, ...)`` each. On a device this waits for it.

        Returns:
            How many samples were new and are kept.

        Raises:
            TypeError: If a tensor holds anything but floating-point numbers or booleans.
            ValueError: If there is no tensor, not one sample for each key, or the keys have another form.
        """
        wanted = _as_keys(keys)
        wrong = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.shape[:1] != (len(wanted),)}
        if wrong or not tensors:
            raise ValueError(f"Expected tensors of {len(wanted)} samples, one for each key, but got {wrong or 'none'}.")
        if self.is_full:
            return 0
        layout = RowLayout.of(tensors)
        chosen = self._new(wanted)
        size = layout.width * self.dtype.itemsize + self.bytes_of_a_key
        space = len(chosen) if self.limit is None else max(0, self.limit - self.bytes) // size
        if space < len(chosen):
            chosen = chosen[:space]
            self._stop(
                f"it holds {self.samples + space} samples of {size} bytes, up to its limit of {self.limit} bytes"
            )
        if len(chosen):
            picked = torch.from_numpy(chosen)
            rows = layout.pack({name: tensor[picked.to(tensor.device)] for name, tensor in tensors.items()}, self.dtype)
            self._append(wanted[chosen], rows.cpu(), layout)
            self.bytes += size * len(chosen)
        return len(chosen)

    def refresh(self) -> None:
        """Look for samples of other processes; there are none in memory."""

    def flush(self) -> None:
        """Make what was added last as durable as the rest; nothing to do in memory."""

    def _find(self, keys: Integers) -> Integers:
        return self._index.find(keys)

    def _new(self, keys: Integers) -> Integers:
        """Positions of keys that are not known, each key once."""
        unknown = np.nonzero(self._find(keys) < 0)[0]
        _, first = np.unique(keys[unknown], axis=0, return_index=True)
        return unknown[np.sort(first)]

    def _append(self, keys: Integers, rows: Tensor, layout: RowLayout) -> None:
        words = as_words(rows)
        while len(keys):
            number, segment = self._segment_for(layout)
            start = segment.count
            stop = min(len(segment.keys), start + len(keys))
            count = stop - start
            segment.keys[start:stop], segment.rows[start:stop] = keys[:count], words[:count]
            segment.count = stop
            # Last, so that nothing is found before it is there.
            self._index.insert(keys[:count], (number << 32) + np.arange(start, stop))
            keys, words = keys[count:], words[count:]
            if stop == len(segment.keys):
                self._close()

    def _segment_for(self, layout: RowLayout) -> tuple[int, Segment]:
        if self._open is not None and self._segments[self._open].layout != layout:
            self._close()
        if self._open is None:
            self._segments.append(Segment(layout, *self._new_arrays(layout), count=0))
            self._open = len(self._segments) - 1
        return self._open, self._segments[self._open]

    def _new_arrays(self, layout: RowLayout) -> tuple[Integers, Integers]:
        """Keys and rows of an empty segment."""
        words = layout.width * self.dtype.itemsize // 8
        capacity = max(1, SEGMENT_BYTES // (8 * words))
        return np.empty((capacity, 2), np.int64), np.empty((capacity, words), np.int64)

    def _close(self) -> None:
        """Let the next sample begin a segment."""
        self._open = None

    def _gather(
        self, keys: Integers, places: Integers, layout: RowLayout, pin_memory: bool
    ) -> tuple[Tensor, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Rows at ``places``, and which of them are what was written."""
        rows = torch.empty(len(places), layout.width, dtype=self.dtype, device="cpu", pin_memory=pin_memory)
        words = as_words(rows)
        intact = np.ones(len(places), np.bool_)
        numbers, inside = places >> 32, places & 0xFFFFFFFF
        for number in np.unique(numbers):
            segment, here = self._segments[number], np.nonzero(numbers == number)[0]
            found = inside[here]
            words[here] = segment.rows[found]
            if segment.checks is not None and segment.checked is not None and not segment.checked[found].all():
                intact[here] = checksums(keys[here], words[here]) == segment.checks[found]
                segment.checked[found] = intact[here]
        return rows, intact

    def _drop(self, keys: Integers) -> None:
        """Forget samples whose rows are damaged, and say so, once."""
        self._index.forget(keys)
        if not self._is_damaged:
            self._is_damaged = True
            warn(
                f"{len(keys)} samples in {self.title} are damaged: their checksums do not fit. Another copy is used, "
                "or the teacher runs again. This warning comes in each run until you delete the folder."
            )

    def _stop(self, reason: str) -> None:
        """Take no more samples, and say so, once."""
        if not self.is_full:
            self.is_full = True
            title = f"{self.title[0].upper()}{self.title[1:]}"
            warn(f"{title} takes no more samples: {reason}. The teacher runs on all others, in each epoch.")

    def _settings(self) -> dict[str, Any]:
        return {"limit": self.limit, "dtype": self.dtype}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._settings().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles hold no samples: another process starts with what the store can open."""
        return _make, (type(self), self._settings())

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleStore:
        """The store itself: a copied callback goes on with the same samples."""
        return self


def parse_size(size: int | str) -> int:
    """Bytes of a size.

    Raises:
        ValueError: If it is no positive size.

    Example:
        >>> parse_size("4GB"), parse_size("1.5 GiB"), parse_size(1000)
        (4000000000, 1610612736, 1000)
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*([KMGT]?i?B)(?:ytes?)?\s*", size, re.I) if isinstance(size, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    found = int(float(match[1]) * unit) if match and unit else size
    if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
        raise ValueError(f"Expected a size such as '4GB' or '512MiB', or a positive number of bytes, but got {size!r}.")
    return found


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The type that rows are kept in.

    Raises:
        ValueError: If it is neither float32 nor bfloat16.
    """
    found = named_dtype(dtype)
    if found not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"Expected the type of a teacher cache to be one of ['float32', 'bfloat16'], but got {dtype!r}."
        )
    return found


def as_words(rows: Tensor) -> Integers:
    """The memory of rows as words of 8 bytes, which NumPy has for types that it does not know."""
    words: Integers = rows.view(torch.uint8).numpy().view(np.int64)
    return words


def checksums(keys: Integers, words: Integers) -> Integers:
    """One number for each row and its key. It finds damage by accident, in one pass."""
    # Odd numbers that differ from place to place, so that moved words count.
    factors = np.arange(1, 2 * words.shape[1] + 1, 2, dtype=np.int64) * np.int64(0x1E3779B97F4A7C15)
    both: Integers = keys @ np.array([0x3C6EF372FE94F82B, 0x5BE0CD19137E2179], dtype=np.int64)
    return both + np.einsum("ij,j->i", words, factors)


def _as_keys(keys: Tensor) -> Integers:
    if keys.dtype != torch.int64 or keys.dim() != 2 or keys.shape[1] != 2 or keys.device.type != "cpu":
        raise ValueError(
            f"Expected keys (B, 2) in int64 on the CPU, but got {tuple(keys.shape)} in {keys.dtype} on {keys.device}."
        )
    found: Integers = keys.numpy()
    return found


def _make(kind: type[SampleStore], settings: dict[str, Any]) -> SampleStore:
    return kind(**settings)
