"""What is free is the least of what machine and container have, shared by processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_otrt.teacher.cache.free_memory import half_of_free_memory

GIB = 2**30


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def machine(root: Path) -> Path:
    write(root, "proc/meminfo", "MemTotal:  16777216 kB\nMemFree:  1 kB\nMemAvailable:  8388608 kB\nBuffers:  1 kB\n")
    return root


def test_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert half_of_free_memory(machine(tmp_path)) == 4 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert half_of_free_memory(tmp_path) == GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert half_of_free_memory(tmp_path) == 4 * GIB


@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    machine(tmp_path)
    write(tmp_path, f"sys/fs/cgroup/{limit}", f"{3 * GIB}\n")
    write(tmp_path, f"sys/fs/cgroup/{used}", f"{GIB}\n")
    assert half_of_free_memory(tmp_path) == GIB
    write(tmp_path, f"sys/fs/cgroup/{used}", f"{4 * GIB}\n")
    assert half_of_free_memory(tmp_path) == 1
    write(tmp_path, f"sys/fs/cgroup/{limit}", "max\n")
    assert half_of_free_memory(tmp_path) == 4 * GIB


def test_unknown(tmp_path: Path) -> None:
    assert half_of_free_memory(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads files of Linux")
def test_here() -> None:
    assert 0 < (half_of_free_memory() or 0) < 2**50
