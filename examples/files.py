"""Files that are there as a whole or not at all, so that a run that is killed leaves no torn ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write, until the block ends without an error; then it is the file ``path``."""
    part = path.with_name(f"{path.name}.part")
    yield part
    part.replace(path)
