"""How much of the machine's memory a cache may take without a limit of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["half_of_free_memory"]


def half_of_free_memory(root: Path = Path("/")) -> int | None:
    """Half of the memory that is free, shared by the processes of a launcher on this machine; None where unknown.

    A container may have less than the machine: the limits of cgroups count, too.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Returns:
        Bytes.
    """
    free = re.search(r"MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"))
    found = [int(free[1]) * 1024] if free else []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        sizes = [_read(root / "sys/fs/cgroup" / name).strip() for name in (limit, used)]
        if all(size.isdigit() for size in sizes):
            found.append(max(0, int(sizes[0]) - int(sizes[1])))
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    share = max(1, int(processes)) if processes.isdigit() else 1
    return max(1, min(found) // (2 * share)) if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
