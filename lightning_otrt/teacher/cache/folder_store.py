"""What is kept of each sample that a teacher has seen, in a folder that runs and processes share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_otrt.notices import warn
from lightning_otrt.teacher.cache.key_index import Integers, KeyIndex
from lightning_otrt.teacher.cache.row_layout import RowLayout
from lightning_otrt.teacher.cache.sample_hash import VERSION as HASH_VERSION
from lightning_otrt.teacher.cache.store import SampleStore, Segment, as_words, checksums

__all__ = ["FolderStore"]

#: Version of the file format; each version has sub-folders of its own.
VERSION = 1
_ENDING = ".safetensors"
#: Samples wait no longer than this to be written, as long as batches come. A process that is killed loses that much.
SECONDS_UNTIL_WRITTEN = 60.0
#: A folder is listed no more often than this, when samples are missing.
SECONDS_BETWEEN_LISTINGS = 1.0
#: Age of unfinished files that no process writes any more.
_SECONDS_OF_A_LEFTOVER = 3600.0
_NO_KEYS: Integers = np.empty((0, 2), np.int64)


class FolderStore(SampleStore):
    """A store whose samples lie in files: a process reads those of all others, and keeps none of them in its memory.

    Each process writes segments of its own, files in the format of safetensors with ``keys``, ``rows`` and ``checks``.
    A segment is written under another name, flushed to the disk, and renamed when it is complete; then it never
    changes. So nothing has to be locked, and a process that is killed at any moment leaves whole segments, and at worst
    a file that nobody reads and a later process removes. Segments are mapped into memory, whose pages the system can
    take back at any time. Each row is compared with its checksum before its first use in a process; of a damaged
    one another copy is used.

    A folder that cannot be written is read; one message says so. The same holds for a full disk.

    Args:
        folder: Folder of any number of teachers; it is made if it is not there.
        fingerprint: All that decides what is kept of a sample: teacher, layers, grid, type. Each fingerprint has a
            sub-folder of its own.
        limit: See :class:`SampleStore`; it counts the samples of the sub-folder.
        dtype: See :class:`SampleStore`.

    Raises:
        ValueError: If the folder is a file, or as :class:`SampleStore` does.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> keys = torch.tensor([[1, 1], [2, 2]])
        >>> first = FolderStore(folder.name, "resnet50, layer4, grid 4")
        >>> first.add(keys, {"logits": torch.tensor([[0.5], [0.25]])})
        2
        >>> first.flush()
        >>> FolderStore(folder.name, "resnet50, layer4, grid 4").lookup(keys).mask
        tensor([True, True])
        >>> FolderStore(folder.name, "resnet50, layer3, grid 4").lookup(keys).mask
        tensor([False, False])
        >>> del first
        >>> folder.cleanup()
    """

    #: Bytes of a sample in a file besides its row: its key and its checksum.
    bytes_of_a_key = 16 + 8

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: str,
        *,
        limit: int | str | None = None,
        dtype: torch.dtype | str = torch.float32,
    ) -> None:
        super().__init__(limit=limit, dtype=dtype)
        self.folder, self.fingerprint = Path(folder), fingerprint
        identity = f"{VERSION} {HASH_VERSION} {self.dtype} {fingerprint}"
        #: Where the files of this fingerprint are.
        self.path = self.folder / hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._names: set[str] = set()
        self._listed = -np.inf
        self._began = 0.0
        # Samples that are in several files: where the second of each is, the third, ...
        self._copies: list[KeyIndex] = []
        # Arrays of the segment that was written last, for the next one: allocators keep some of each freed block.
        self._spare: tuple[RowLayout, Integers, Integers] | None = None
        self._prepare()
        self.refresh()

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"the teacher cache in {str(self.folder)!r}"

    def refresh(self) -> None:
        """Look for segments that other processes have written since."""
        self._listed = time.monotonic()
        try:
            names = {entry.name for entry in os.scandir(self.path) if entry.name.endswith(_ENDING)}
        except OSError:  # a folder that is not there, and cannot be made
            return
        for name in sorted(names - self._names):
            self._names.add(name)
            segment = self._read(self.path / name)
            if segment is not None:
                self._take(segment)

    def flush(self) -> None:
        """Write what was added since the last segment was full, for others to read."""
        self._close()

    def _prepare(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError) as error:
            raise ValueError(
                f"Expected `teacher_cache` to be a folder, but {str(self.folder)!r} is a file or lies in one, or is a "
                "link to a folder that does not exist. Choose another path."
            ) from error
        except OSError as error:
            self._stop(f"the folder cannot be made ({error})")
            return
        # Not `os.access`: what counts is whether a file can be made, on network drives and for root, too.
        trial = self._temporary()
        try:
            trial.touch()
            trial.unlink()
        except OSError as error:
            self._stop(f"the folder cannot be written and is only read ({error})")
            return
        for leftover in self.path.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _SECONDS_OF_A_LEFTOVER:
                    leftover.unlink()

    def _temporary(self) -> Path:
        return self.path / f".{uuid.uuid4().hex}.tmp"

    def _find(self, keys: Integers) -> Integers:
        self._write_what_waits()  # also where no new sample comes
        found = super()._find(keys)
        if (found < 0).any() and time.monotonic() - self._listed > SECONDS_BETWEEN_LISTINGS:
            self.refresh()
            found = super()._find(keys)
        return found

    def _append(self, keys: Integers, rows: torch.Tensor, layout: RowLayout) -> None:
        if self._open is None:
            self._began = time.monotonic()
        super()._append(keys, rows, layout)
        self._write_what_waits()

    def _write_what_waits(self) -> None:
        if self._open is not None and time.monotonic() - self._began > SECONDS_UNTIL_WRITTEN:
            self._close()

    def _close(self) -> None:
        """Write the open segment; from then on its rows are read from the file."""
        if self._open is None:
            return
        number, self._open = self._open, None
        self._began = time.monotonic()
        segment = self._segments[number]
        arrays = segment.keys, segment.rows
        segment.keys, segment.rows = segment.keys[: segment.count], segment.rows[: segment.count]
        try:
            written = self._read(self._write(segment))
        except (OSError, SafetensorError) as error:
            # What is in memory stays there: it is one segment.
            self._stop(f"a file could not be written ({error})")
            return
        if written is not None:
            written.keys = _NO_KEYS
            self._segments[number] = written
            self._spare = segment.layout, *arrays

    def _new_arrays(self, layout: RowLayout) -> tuple[Integers, Integers]:
        spare, self._spare = self._spare, None
        return spare[1:] if spare is not None and spare[0] == layout else super()._new_arrays(layout)

    def _write(self, segment: Segment) -> Path:
        rows = torch.from_numpy(segment.rows).view(self.dtype)
        tensors = {
            "keys": torch.from_numpy(segment.keys),
            "rows": rows,
            "checks": torch.from_numpy(checksums(segment.keys, segment.rows)),
        }
        header = {"fingerprint": self.fingerprint, "layout": segment.layout.to_json()}
        temporary = self._temporary()
        final = temporary.with_name(f"{uuid.uuid4().hex}{_ENDING}")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)
            _bring_to_disk(temporary)
            self._names.add(final.name)
            temporary.rename(final)
        finally:
            temporary.unlink(missing_ok=True)
        return final

    def _read(self, path: Path) -> Segment | None:
        """Map a file; None, with a warning, where it is not a whole segment of this store."""
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                keys, rows, checks = (file.get_tensor(name) for name in ("keys", "rows", "checks"))
            layout = RowLayout.from_json(header["layout"])
            count = len(keys)
            shapes = [(count, 2), (count, layout.width), (count,)]
            if [tuple(tensor.shape) for tensor in (keys, rows, checks)] != shapes or rows.dtype != self.dtype:
                raise ValueError("its tensors are not those of its header")
            if header["fingerprint"] != self.fingerprint:
                raise ValueError("it belongs to another fingerprint")
        except FileNotFoundError:  # somebody has cleared the folder
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            warn(f"{path} is left out of the teacher cache: {error}. It can be deleted.")
            return None
        # Keys and checksums are copied, so that the pages that are mapped are those of rows in use.
        return Segment(
            layout, keys.numpy().copy(), as_words(rows), count, checks.numpy().copy(), np.zeros(count, np.bool_)
        )

    def _take(self, segment: Segment) -> None:
        """Add a segment of another process."""
        keys, places = segment.keys, (len(self._segments) << 32) + np.arange(segment.count)
        self._segments.append(segment)
        for index in (self._index, *self._copies):
            new = index.find(keys) < 0
            index.insert(keys[new], places[new])
            keys, places = keys[~new], places[~new]
        if len(keys):
            self._copies.append(KeyIndex())
            self._copies[-1].insert(keys, places)
        # The index has them.
        segment.keys = _NO_KEYS
        self.bytes += segment.count * (segment.rows.shape[1] * 8 + self.bytes_of_a_key)

    def _drop(self, keys: Integers) -> None:
        """Go on with other copies of damaged samples, which another process or a later run has written."""
        super()._drop(keys)
        for copies in self._copies:
            places = copies.find(keys)
            there = places >= 0
            self._index.insert(keys[there], places[there])
            copies.forget(keys[there])
            keys = keys[~there]

    def _settings(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "fingerprint": self.fingerprint, **super()._settings()}


def _bring_to_disk(path: Path) -> None:
    """Wait until a file would survive a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
