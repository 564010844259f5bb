"""A cached teacher on several processes, in runs that are killed, and with more samples than memory should hold."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed_problem import LAYERS, batch, net
from helpers import forwards
from processes import CONTEXT, run_processes, set_threads, start_server
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_otrt import OTRTCallback, RepresentationTransfer

#: Batches of an epoch.
BATCHES = 3


class Random(nn.Module):
    """A teacher that is random on some processes."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.ranks = net(6, seed=2), ranks

    def forward(self, x: Tensor) -> Tensor:
        drops = int(os.environ["RANK"]) in self.ranks
        return self.net(F.dropout(x, 0.5) if drops else x)


def terms(sizes: list[int], cache: Any, alone: bool = False, **options: Any) -> tuple[list[Tensor], int, Any]:
    """The terms of two epochs on this process' part of each batch, the teacher's forwards, and the cache."""
    teacher, student = options.pop("teacher", None) or net(6, seed=2), net(4, seed=1)
    rank = 0 if alone else int(os.environ["RANK"])
    transfer = RepresentationTransfer(
        teacher, options.pop("layers", LAYERS), memory=0.9, solve_every=2, teacher_cache=cache, **options
    )
    found = []
    with transfer.attached(student), forwards(teacher) as count:
        for _ in range(2):
            if transfer.cache is not None:
                transfer.cache.start_epoch()
            for call in range(BATCHES):
                x, _ = batch(call, sizes)
                student(x if alone else x.split(sizes)[rank])
                found.append(transfer.loss().detach())
            if transfer.cache is not None:
                transfer.cache.end_epoch()
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()
        return found, len(count), transfer.cache and (transfer.cache.hits, transfer.cache.misses)


@pytest.mark.parametrize("sizes", [[4, 4], [5, 1], [7, 3]])
@pytest.mark.parametrize("place", ["memory", "folder"])
def test_the_term_of_the_global_batch(tmp_path: Path, sizes: list[int], place: str) -> None:
    expected, _, _ = terms(sizes, None, alone=True)
    found = run_processes(2, terms, sizes, place if place == "memory" else str(tmp_path))
    for size, (values, _, (hits, misses)) in zip(sizes, found, strict=True):
        for value, wanted in zip(values, expected, strict=True):
            assert float(value) == pytest.approx(float(wanted), rel=1e-6)
        assert hits == misses == BATCHES * size


def swapped(folder: str) -> tuple[int, int]:
    """An epoch on one half of the data, and one on the other half, which the other process has seen."""
    rank = int(os.environ["RANK"])
    x = batch(0, [16])[0].split(8)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, teacher_cache=folder, global_batch=False)
    student = net(4, seed=1)
    with transfer.attached(student):
        for part in (x[rank], x[1 - rank]):
            transfer.cache.start_epoch()
            student(part)
            transfer.loss()
            transfer.cache.end_epoch()
            torch.distributed.barrier()
    return transfer.cache.hits, transfer.cache.misses


def test_a_folder_is_shared_from_the_next_epoch_on(tmp_path: Path) -> None:
    assert run_processes(2, swapped, str(tmp_path)) == [(8, 8), (8, 8)]


def refused(strict: bool) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            layers = {"0": "net.0", "3": "net.3"}
            terms([4, 4], "memory", teacher=Random((1,)), layers=layers, strict=strict)
        except ValueError as error:
            return str(error)
    return next(str(each.message) for each in caught if "teacher_cache" in str(each.message))


@pytest.mark.parametrize("strict", [True, False])
def test_what_one_process_refuses_all_refuse(strict: bool) -> None:
    first, second = run_processes(2, refused, strict)
    assert "on process 1, it is random in evaluation mode" in first
    assert "with this teacher (Random): it is random in evaluation mode" in second


class Images(Dataset[Any]):
    """Random images, made where they are needed."""

    def __init__(self, count: int, size: int = 6) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(1, self.size, self.size, generator=generator)
        return x, index % 3


class Task(pl.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = net(width, seed=1).float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(folder: str | None, count: int, epochs: int, **options: Any) -> tuple[list[float], Any]:
    """Terms of all steps and the cache, in a process that may be killed."""
    set_threads()
    values: list[float] = []

    class Noting(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            values.append(float(trainer.callback_metrics["train/otrt"]))

    torch.manual_seed(0)
    layers = {"net.0": "0", "net.3": "3"}
    callback = OTRTCallback(net(6, seed=2).float(), layers, teacher_cache=folder)
    silent = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[callback, Noting()], **silent, **options
    )
    trainer.fit(Task(), DataLoader(Images(count), batch_size=16, shuffle=True))
    return values, callback.transfer.cache


def endless(folder: str) -> None:
    from lightning_otrt.teacher.cache import folder_store

    folder_store.SECONDS_UNTIL_WRITTEN = 0.05
    Path(f"{folder}-{os.getpid()}").touch()
    fit(folder, 512, 10_000)


def kill_and_compare(folder: Path, kills: int) -> int:
    start_server()
    draw = random.Random(0)
    expected, _ = fit(None, 256, 1)
    known = 0
    for _ in range(kills):
        run = CONTEXT.Process(target=endless, args=(str(folder),))
        run.start()
        while not Path(f"{folder}-{run.pid}").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.1, 2.0))
        os.kill(run.pid or 0, signal.SIGKILL)
        run.join()
        assert run.exitcode == -signal.SIGKILL
        # What is left is whole, and what it gives is right.
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*teacher cache")
            found, cache = fit(str(folder), 256, 1)
        assert found == pytest.approx(expected, rel=1e-5)
        assert cache.hits >= known
        known = cache.hits + cache.misses
    return known


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    assert kill_and_compare(tmp_path / "kept", kills=12) == 256


def test_killed_once(tmp_path: Path) -> None:
    assert kill_and_compare(tmp_path / "kept", kills=1) == 256


def fill_with_many(folder: str) -> tuple[int, int, int]:
    """Memory of this process after 20 000 samples, after 100 000, and after an epoch of reading them; in MiB."""
    from teacher.cache.test_folder_store import own_memory

    set_threads()
    teacher, student = net(64, seed=2).float(), net(4, seed=1).float()
    transfer = RepresentationTransfer(teacher, {"0": "0"}, solve_every=10**6, teacher_cache=folder)
    taken = []
    with transfer.attached(student):
        for epoch in range(2):
            transfer.cache.start_epoch()
            for start in range(0, 100_000, 250):
                x = torch.arange(start, start + 250.0)[:, None, None, None] + torch.linspace(0, 1, 36).view(1, 6, 6)
                student(x.sin())
                transfer.discard()
                if epoch == 0 and start in (20_000, 99_750):
                    taken.append(own_memory())
            transfer.cache.end_epoch()
        assert (transfer.cache.hits, transfer.cache.misses) == (100_000, 100_000)
    return taken[0], taken[1], own_memory()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux")
def test_many_samples_in_little_memory(tmp_path: Path) -> None:
    """10⁵ samples of 4 kB: what is mapped does not count, keys and checksums are 2.4 MB."""
    here = Path(__file__).parents[1]
    code = (
        f"import sys; sys.path[:0] = [{str(here)!r}, {str(here / 'trainer')!r}]; import test_shared_cache;"
        f"print(*test_shared_cache.fill_with_many({str(tmp_path)!r}))"
    )
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    early, late, after = map(int, run.stdout.split())
    assert late - early < 48
    assert after - early < 48
    shutil.rmtree(tmp_path)
