"""Where the outputs of a teacher are kept: what a user writes as ``teacher_cache``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_otrt.checks import constructor_call, shown
from lightning_otrt.teacher.cache.folder_store import FolderStore
from lightning_otrt.teacher.cache.free_memory import half_of_free_memory
from lightning_otrt.teacher.cache.store import SampleStore, parse_dtype, parse_size

__all__ = ["MEMORY", "TeacherCache", "parse_cache"]

#: The word for a cache in the memory of the process.
MEMORY = "memory"
#: A text that is meant as a size: a number, perhaps with a sign, an exponent and a unit.
_LIKE_A_SIZE = re.compile(r"\s*[-+]?[.,]?\d[\d.,_]*(e[-+]?\d+)?\s*([a-z]{0,5}|[a-z]*bytes?|%)\s*", re.I)
#: A text that is meant as a place, as none, or as a place with a size. A folder may have such a name all the same.
_LIKE_A_PLACE = re.compile(r"\s*((ram|mem|disk|no|off|yes|on)\s*|memory\s*[:;,=( ].*)", re.I)
#: A text that is a mapping, a list, an object or a word of YAML or Python: no folder was meant.
_LIKE_A_VALUE = re.compile(r"\s*([{\[(<]|[\w.]+\((.*=|\))|(none|null|true|false)\s*$)", re.I)
_TO_MEAN_A_FOLDER = "If a folder is to have this name, write './' before it."


@dataclass(frozen=True)
class TeacherCache:
    """Keeps what is used of a teacher's outputs, so that the teacher runs once for each distinct sample.

    Args:
        folder: A folder that runs and processes share; None: the memory of this process. A relative one begins at the
            working directory in which this object is made.
        limit: Most that it may take, such as ``"4GB"``; None: half of the memory that is free at first, and all of the
            disk. A full cache takes no more samples.
        dtype: Type in which numbers are kept, ``"float32"`` or ``"bfloat16"`` (or ``"bf16"``). The latter takes half,
            and rounds to three digits: the term of later epochs then differs by about as much.

    Raises:
        TypeError: If the folder is no path.
        ValueError: If the limit is no size, the type another one, or the folder is a file or the text of a mapping.

    Example:
        >>> from lightning_otrt import RepresentationTransfer, TeacherCache
        >>> from torch import nn
        >>> RepresentationTransfer(nn.Linear(2, 2), teacher_cache=TeacherCache(limit="4GB", dtype="bfloat16"))
        RepresentationTransfer(Linear(...), teacher_cache=TeacherCache(limit='4GB', dtype='bfloat16'))
    """

    folder: str | None = None
    limit: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.folder is not None:
            # As text, so that it can be written to YAML.
            object.__setattr__(self, "folder", _as_folder(self.folder))
            # Once, so that a program that changes its directory goes on with the same folder.
            object.__setattr__(self, "_path", Path(self.folder).expanduser().absolute())
        if self.limit is not None:
            parse_size(self.limit)
        parse_dtype(self.dtype)

    def __repr__(self) -> str:
        """The constructor call, with the fields that differ from their defaults."""
        return constructor_call(self)

    @property
    def path(self) -> Path | None:
        """The folder as an absolute path, with ``~`` as the user's home; None for memory."""
        return getattr(self, "_path", None)

    def open(self, fingerprint: str) -> SampleStore:
        """The store for what one teacher gives.

        Args:
            fingerprint: See :class:`~lightning_otrt.teacher.cache.folder_store.FolderStore`.
        """
        if self.path is None:
            return SampleStore(limit=self.limit or half_of_free_memory(), dtype=self.dtype)
        return FolderStore(self.path, fingerprint, limit=self.limit, dtype=self.dtype)


def parse_cache(value: Any) -> TeacherCache | None:
    """What a user wrote as ``teacher_cache``; None for no cache.

    Raises:
        TypeError: If it is none of the accepted forms.
        ValueError: If it is meant as a size or a word, but is none, or the folder is a file or the text of a mapping.

    Example:
        >>> parse_cache("4GB"), parse_cache("outputs/teacher").folder, parse_cache(None)
        (TeacherCache(limit='4GB'), 'outputs/teacher', None)
    """
    if value is None or isinstance(value, TeacherCache):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            'Expected argument `teacher_cache` to be "memory", a size such as "4GB", a folder, a TeacherCache or None, '
            f"but got {shown(value)} of type {type(value).__name__}."
        )
    if isinstance(value, str):
        if value.strip().lower() == MEMORY:
            return TeacherCache()
        if _LIKE_A_PLACE.fullmatch(value):
            raise ValueError(
                f"Expected `teacher_cache` to be a folder, a size or 'memory', but got {value!r}. Write 'memory' for "
                "half of the free memory, a size such as '4GB' for memory up to that size, or leave `teacher_cache` "
                f"out for none. {_TO_MEAN_A_FOLDER}"
            )
        if _LIKE_A_SIZE.fullmatch(value):
            return TeacherCache(limit=_as_limit(value))
    return TeacherCache(folder=_as_folder(value))


def _as_limit(value: str) -> str:
    try:
        parse_size(value)
    except ValueError as error:
        raise ValueError(f"{error} {_TO_MEAN_A_FOLDER}") from None
    return value


def _as_folder(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Expected the folder of a teacher cache to be a path, but got {shown(value)}.")
    folder = os.fspath(value)
    if not isinstance(folder, str) or not folder.strip():
        raise ValueError(f"Expected the folder of a teacher cache to be a path, but got {value!r}.")
    if _LIKE_A_VALUE.match(folder):
        # What a parser of YAML makes of a mapping that is no TeacherCache, or of one with a limit that is no size.
        raise ValueError(
            f"Expected `teacher_cache` to be a folder, a size or a TeacherCache, but got the text {shown(folder)}, "
            "which is a value written out and no folder. The keys of a TeacherCache are `folder`, `limit`, a size such "
            f"as '4GB', and `dtype`, 'float32' or 'bfloat16'. {_TO_MEAN_A_FOLDER}"
        )
    if Path(folder).expanduser().is_file():
        raise ValueError(f"Expected `teacher_cache` to be a folder, but {folder!r} is a file. Choose another path.")
    return folder
