"""Runs a function on several processes that talk to each other through gloo, with a deadline."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Forked from a server that has imported what takes long, and that no test has touched.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "lightning.pytorch", "lightning_otrt"])


def run_processes(
    count: int, function: Callable[..., Any], *args: Any, timeout: float = 180, **options: Any
) -> list[Any]:
    """What ``function(*args)`` returns on each of ``count`` processes, by rank.

    A process that is killed returns None.

    Args:
        count: Number of processes.
        function: Function of a module; what it returns is saved by torch.
        args: Its arguments.
        timeout: Seconds until all are killed and the test fails.
        options: ``init=False`` leaves torch.distributed to the function, with the environment of torchrun,
            ``init=None`` without; ``nodes``: over how many machines the processes are said to be spread; ``dies``:
            whether processes may be killed.
    """
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        workers = [
            CONTEXT.Process(
                target=_work,
                args=(
                    *(rank, count, options.get("nodes", 1), options.get("init", True), options.get("dies", False)),
                    *(port, folder, function, args),
                ),
            )
            for rank in range(count)
        ]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + timeout
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for rank in hanging:
            workers[rank].kill()
            workers[rank].join()
        results: list[Any] = []
        errors = {}
        for rank in range(count):
            path = Path(folder, f"{rank}.pt")
            found = torch.load(path, weights_only=False) if path.exists() else (None, None)
            results.append(found[0])
            errors[rank] = found[1]
        told = "\n".join(f"process {rank}: {error}" for rank, error in errors.items() if error)
        assert not hanging, f"processes {hanging} hang after {timeout} s\n{told}"
        assert not told, told
        codes = [worker.exitcode for worker in workers]
        assert options.get("dies") or not any(codes), f"exit codes {codes}"
        return results


@functools.cache
def start_server() -> None:
    """Imports take long on a busy machine, and are not part of a deadline."""
    first = CONTEXT.Process(target=int)
    first.start()
    first.join()


def set_threads() -> None:
    """As many threads as the environment says, else one: more of them only slow tiny tensors down."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(
    rank: int,
    count: int,
    nodes: int,
    init: bool | None,
    may_die: bool,
    port: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    set_threads()
    local = count // nodes
    place = {
        "RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_RANK": rank % local,
        "LOCAL_WORLD_SIZE": local,
        "GROUP_RANK": rank // local,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }
    if init is not None:
        os.environ.update({name: str(value) for name, value in place.items()})
    result = error = None
    try:
        if init:
            store = f"file://{folder}/store"
            dist.init_process_group("gloo", store, rank=rank, world_size=count, timeout=timedelta(seconds=40))
        torch.manual_seed(0)
        result = function(*args)
    except BaseException:
        error = traceback.format_exc()
    torch.save((result, error), Path(folder, f"{rank}.pt"))
    if dist.is_initialized():
        if error is None and not may_die:
            dist.barrier()
        dist.destroy_process_group()
