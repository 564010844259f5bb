"""What :mod:`benchmarks.gpu` measures of whole runs: callback, teacher cache, GeomLoss' loss, and two devices.

``cpu`` as the device rehearses all of it: two processes then talk through gloo.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.problems import CLOUDS, COSTS, make_problem
from benchmarks.rivals import tune_ours, tune_samples_loss
from benchmarks.steps import STAGES
from benchmarks.timing import Quartiles
from lightning_otrt import OTRTCallback, RepresentationTransfer

__all__ = ["against_samples_loss", "callback_epochs", "global_steps"]

#: Times a call of a function on a device.
Clock = Callable[[Callable[[], object]], Quartiles]
LAYERS = {stage: stage for stage in STAGES}


class _Task(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class _Epochs(pl.Callback):
    """Seconds of each epoch. The device has done its work when the clock is read."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        _finish(pl_module.device)
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        _finish(pl_module.device)
        self.seconds.append(time.perf_counter() - self._start)


def callback_epochs(
    device: str, build: Callable[[], nn.Module], images: Tensor, batch: int, epochs: int = 3
) -> dict[str, dict[str, Any]]:
    """Fits in a Trainer: milliseconds of a step in the first epoch, and in the fastest of the later ones.

    The first epoch has the trace of the layers, the early solves and the first batch's checks in it.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        build: Makes a network with the layers :data:`STAGES`.
        images: All images of an epoch.
        batch: Size of a batch.
        epochs: Epochs of each fit.

    Returns:
        By name: no callback, the callback, the same without CUDA graphs, and the callback with
        ``teacher_cache="memory"``, which also has the share of samples that were known.
    """
    data = TensorDataset(images, torch.randint(10, images.shape[:1]))
    found = {}
    fits: dict[str, dict[str, Any] | None] = {
        "no callback": None,
        "callback": {},
        "callback, no graphs": {},
        "teacher_cache": {"teacher_cache": "memory"},
    }
    for name, options in fits.items():
        torch.manual_seed(0)
        clock, callbacks = _Epochs(), []
        if options is not None:
            callbacks.append(OTRTCallback(build().eval(), LAYERS, solve_every=10, **options))
            callbacks[0].transfer.cuda_graphs = "no graphs" not in name
        trainer = pl.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            max_epochs=epochs,
            callbacks=[*callbacks, clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(data, batch_size=batch, pin_memory=device == "cuda", drop_last=True)
        trainer.fit(_Task(build()), loader)
        first, *later = (1e3 * seconds / len(loader) for seconds in clock.seconds)
        found[name] = {"first epoch": first, "later epochs": min(later)}
        if options:
            cache = callbacks[0].transfer.cache
            assert cache is not None
            found[name]["hit rate"] = cache.hit_rate
    return found


def against_samples_loss(device: str, shapes: tuple[tuple[int, int, int], ...], clock: Clock) -> list[dict[str, Any]]:
    """Cold solves, forward and backward, and GeomLoss' loss on the device, both tuned as in :mod:`benchmarks.speed`."""
    found = []
    for shape in shapes:
        for cloud in CLOUDS:
            for cost in COSTS:
                problem = make_problem(shape, cloud, cost)
                y, x, matrix = (side.to(device) for side in (problem.y, problem.x, problem.matrix))
                problem = replace(problem, y=y, x=x, matrix=matrix)
                methods = tune_ours(problem), tune_samples_loss(problem, debias=False)
                row: dict[str, Any] = {"shape": shape, "cloud": cloud, "cost": cost}
                for method in methods:
                    how = {"setting": method.setting, "value error": method.error, "accurate": method.accurate}
                    row[method.name] = {**how, "milliseconds": clock(method.solve)}
                found.append(row)
    return found


def global_steps(device: str, calls: int = 50) -> dict[str, float]:
    """Milliseconds of a step of two processes: without the term, with one for each process, and of the global batch.

    Through NCCL with a device for each, or through gloo on a CPU.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=_work, args=(rank, folder, device, calls)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found: dict[str, float] = json.loads(Path(folder, "out.json").read_text())
    return found


def _work(rank: int, folder: str, device: str, calls: int) -> None:
    torch.set_num_threads(1)
    where = torch.device(f"cuda:{rank}") if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: _step_of(name, where, calls) for name in ("no term", "local", "global")}
    if rank == 0:
        Path(folder, "out.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _step_of(name: str, device: torch.device, calls: int) -> float:
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device)
        for width in (64, 128)
    )
    parallel = nn.parallel.DistributedDataParallel(student)
    transfer = RepresentationTransfer(teacher, {"1": "1"}, global_batch=name == "global")
    images = torch.randn(16, 3, 16, 16, device=device)

    def step() -> None:
        loss = parallel(images).square().mean()
        (loss if name == "no term" else loss + transfer.loss()).backward()

    with nullcontext() if name == "no term" else transfer.attached(parallel):
        for _ in range(9):  # the early solves
            step()
        _finish(device)
        start = time.perf_counter()
        for _ in range(calls):
            step()
        _finish(device)
    return 1e3 * (time.perf_counter() - start) / calls


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
