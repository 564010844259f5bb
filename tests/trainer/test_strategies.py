"""Representation transfer under Lightning's strategies: the weights that one process with all samples would give."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from distributed_problem import LAYERS, assert_close, batch, net
from helpers import seeded
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from packaging.version import Version
from processes import free_port, run_processes
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader, IterableDataset

from lightning_otrt import LogitDistillation, OTRTCallback, OTRTModule, RepresentationTransfer
from lightning_otrt.trainer.strategies import shared_batch

OPTIONS = {"memory": 0.9, "solve_every": 3, "weight": 2.0}
#: Steps and micro-batches of each fit.
STEPS, ACCUMULATE = 5, 2
ROOT = Path(__file__).parents[2]


class Batches(IterableDataset[Any]):
    """The part of each batch that belongs to a process; all of it for a single one."""

    def __init__(self, sizes: Sequence[int], alone: bool = False, calls: int = STEPS * ACCUMULATE) -> None:
        self.sizes, self.alone, self.calls = list(sizes), alone, calls

    def __iter__(self) -> Iterator[Any]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for call in range(self.calls):
            x, y = batch(call, self.sizes)
            yield (x, y) if self.alone else (x.split(self.sizes)[rank], y.split(self.sizes)[rank])


class Task(pl.LightningModule):
    """Cross-entropy summed so that the average over processes is that of the whole batch."""

    def __init__(self, sizes: Sequence[int], alone: bool = False, sharded: bool = False) -> None:
        super().__init__()
        self.net = net(4, seed=1)
        self.share = (1 if alone else len(sizes)) / sum(sizes)
        self.sharded = sharded
        self.dies_at = -1

    def configure_model(self) -> None:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            # The root keeps parameters of its own, as a network has beside its blocks.
            fully_shard(self.net.get_submodule("3"), mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.dies_at and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="sum") * self.share

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class PlainTask(Task):
    """Without ``configure_model``, whose presence changes when layers are hooked."""

    configure_model = pl.LightningModule.configure_model


def make_trainer(**options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "accumulate_grad_batches": ACCUMULATE,
        "max_steps": STEPS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 3,
    }
    return pl.Trainer(**{**defaults, **options})


def fit(sizes: Sequence[int], cost: str, wrap: bool = False, alone: bool = False, **options: Any) -> list[Tensor]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sharded = isinstance(options.get("strategy"), ModelParallelStrategy)
    task = (Task if sharded else PlainTask)(sizes, alone, sharded)
    teacher = net(6, seed=2)
    layers = {f"net.{name}": other for name, other in LAYERS.items()}
    more = {**OPTIONS, **options.pop("more", {})}
    callbacks: list[pl.Callback] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = OTRTModule(task, teacher, layers, cost=cost, **more) if wrap else task
        if not wrap:
            callbacks = [OTRTCallback(teacher, layers, cost=cost, **more)]
        callbacks += options.pop("extra", [])
        make_trainer(callbacks=callbacks, **options).fit(trained, DataLoader(Batches(sizes, alone), batch_size=None))
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in task.parameters()]
    return [weight.detach().clone() for weight in weights]


def strategies() -> dict[str, Any]:
    return {
        "ddp": "ddp",
        "unused": "ddp_find_unused_parameters_true",
        "static": DDPStrategy(static_graph=True),
        "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }


def fit_under(names: Sequence[str], sizes: Sequence[int], cost: str, nodes: int = 1, **options: Any) -> Any:
    found = {}
    for name in names:
        # no_sync under static_graph fails in PyTorch itself, with any model.
        accumulate = {"accumulate_grad_batches": 1} if name == "static" else {}
        devices = len(sizes) // nodes
        found[name] = fit(
            sizes, cost, strategy=strategies()[name], devices=devices, num_nodes=nodes, **accumulate, **options
        )
    return found


def check(found: Sequence[dict[str, Any]], sizes: Sequence[int], cost: str, **options: Any) -> None:
    expected = fit(sizes, cost, alone=True, **options)
    static = fit(sizes, cost, alone=True, accumulate_grad_batches=1, **options) if "static" in found[0] else []
    start = [p.detach() for p in Task(sizes).parameters()]
    assert not torch.equal(expected[0], start[0])
    for results in found:
        for name, weights in results.items():
            assert_close(weights, static if name == "static" else expected)


@pytest.mark.parametrize("cost", ["correlation", pytest.param("euclidean", marks=pytest.mark.slow)])
def test_strategies(cost: str) -> None:
    sizes = (5, 1)
    names = ["ddp", "unused", "static"]
    if Version(torch.__version__) >= Version("2.7"):  # before it, that of PyTorch needs a GPU
        names.append("fsdp2")
    check(run_processes(2, fit_under, names, sizes, cost, init=False), sizes, cost)


@pytest.mark.parametrize(
    ("features", "names"),
    [(None, ["ddp"]), ("net.4:input", ["ddp", "fsdp2"]), pytest.param(None, ["fsdp2"], marks=pytest.mark.slow)],
)
def test_distillation(features: str | None, names: list[str]) -> None:
    """Soft targets, and a regression where one process has a single sample."""
    sizes = (5, 1)
    if Version(torch.__version__) < Version("2.7"):
        names = ["ddp"]
    more = {"distillation": LogitDistillation(3.0, features=features)}
    check(run_processes(2, fit_with, names, sizes, more, init=False), sizes, "correlation", more=more)


def fit_with(names: Sequence[str], sizes: Sequence[int], more: dict[str, Any]) -> Any:
    return fit_under(names, sizes, "correlation", more=more)


def conv_net(width: int) -> nn.Sequential:
    """In the first step of such a student more than one forward looks at it."""

    def build() -> nn.Sequential:
        first, second = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 8, 3, 2, 1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))

    return seeded(width, build)


def terms_of_shards() -> list[list[Tensor]]:
    """Terms of two steps of a whole student, of one in shards, and of one whose root alone is in shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x = seeded(torch.distributed.get_rank(), torch.randn, 8, 3, 16, 16)
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for parts in ([], ["2", ""], [""]):
        student, terms = conv_net(6), []
        for name in parts:
            fully_shard(student.get_submodule(name), mesh=mesh)
        transfer = RepresentationTransfer(conv_net(9))
        with transfer.attached(student):
            for _ in range(2):
                student(x)
                term = transfer.loss()
                term.backward()
                terms.append(term.detach())
        found.append(terms)
    return found


@pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="needs a GPU before torch 2.7")
def test_a_sharded_student_that_several_forwards_look_at() -> None:
    for whole, *sharded in run_processes(2, terms_of_shards):
        for terms in sharded:
            torch.testing.assert_close(terms, whole, rtol=1e-4, atol=0)


def test_wrapped() -> None:
    sizes = (1, 11)
    check(run_processes(2, fit_under_wrapped, sizes, init=False), sizes, "sqeuclidean")


def fit_under_wrapped(sizes: Sequence[int]) -> Any:
    return fit_under(["ddp"], sizes, "sqeuclidean", wrap=True)


def test_two_nodes() -> None:
    """Two groups of processes, each with a node rank of its own."""
    sizes = (2, 3, 4, 3)
    check(run_processes(4, fit_under, ["ddp"], sizes, "correlation", 2, init=False, nodes=2), sizes, "correlation")


def train_under_fsdp1() -> dict[str, Any]:
    """FSDP1 without Lightning, in float64."""
    wrap = ModuleWrapPolicy({nn.Linear, nn.Conv2d})
    cpu = torch.device("cpu")
    found = {}
    for cost in ("correlation", "euclidean", "sqeuclidean"):
        model = FullyShardedDataParallel(net(4, seed=1), use_orig_params=True, device_id=cpu, auto_wrap_policy=wrap)
        terms = train_plain(model, cost, (1, 11), torch.distributed.get_rank())
        with FullyShardedDataParallel.summon_full_params(model):
            found[cost] = terms, [p.detach().clone() for p in model.parameters()]
    return found


def train_plain(model: nn.Module, cost: str, sizes: Sequence[int], process: int | None) -> Tensor:
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, cost=cost, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    terms = []
    with transfer.attached(model):
        for call in range(STEPS):
            x, y = batch(call, sizes)
            part = slice(None) if process is None else slice(sum(sizes[:process]), sum(sizes[: process + 1]))
            loss = nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum") / sum(sizes)
            terms.append(transfer.loss())
            (terms[-1] + loss * (1 if process is None else len(sizes))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(terms).detach()


def test_fsdp1_without_lightning() -> None:
    for results in run_processes(2, train_under_fsdp1):
        for cost, (terms, weights) in results.items():
            alone = net(4, seed=1)
            assert_close(terms, train_plain(alone, cost, (1, 11), None))
            assert_close(weights, [p.detach() for p in alone.parameters()])


class CpuFSDPStrategy(FSDPStrategy):
    """Lightning looks at the very class, and allows its own on GPUs alone."""


def fit_under_fsdp1(sizes: Sequence[int]) -> list[Tensor]:
    found: list[Tensor] = []
    construct = FullyShardedDataParallel.__init__

    def on_cpu(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **{**options, "device_id": torch.device("cpu")})

    class Gather(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            with FullyShardedDataParallel.summon_full_params(trainer.strategy.model):
                found.extend(p.detach().clone() for p in pl_module.parameters())

    FullyShardedDataParallel.__init__ = on_cpu
    strategy = CpuFSDPStrategy(auto_wrap_policy={nn.Linear, nn.Conv2d}, process_group_backend="gloo")
    fit(sizes, "correlation", strategy=strategy, devices=2, extra=[Gather()])
    return found


@pytest.mark.slow
def test_fsdp1() -> None:
    expected = fit((5, 1), "correlation", alone=True)
    for weights in run_processes(2, fit_under_fsdp1, (5, 1), init=False):
        # Lightning's precision plugin casts to float32 inside.
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


def launch(strategy: str, folder: str) -> None:
    sizes = (5, 1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = PlainTask(sizes)
    teacher = net(6, seed=2)
    layers = {f"net.{name}": other for name, other in LAYERS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(strategy=strategy, devices=2)
        trainer.fit(OTRTModule(task, teacher, layers, **OPTIONS), DataLoader(Batches(sizes), batch_size=None))
        assert os.environ.get("LOCAL_RANK", "0") == "0"
    torch.save([p.detach() for p in task.parameters()], f"{folder}/{strategy}.pt")


@pytest.mark.parametrize("strategy", ["ddp_notebook", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_processes_started_by_lightning(strategy: str, tmp_path: Path) -> None:
    run_processes(1, launch, strategy, str(tmp_path), init=None, timeout=150)
    assert_close(torch.load(tmp_path / f"{strategy}.pt"), fit((5, 1), "correlation", alone=True))


def fit_and_die(folder: str, dies_at: int, resume: bool) -> Any:
    sizes = (5, 1)
    task = PlainTask(sizes)
    task.dies_at = dies_at
    teacher = net(6, seed=2)
    layers = {f"net.{name}": other for name, other in LAYERS.items()}
    # A checkpoint between two solves, with a running cost that the processes have not brought together.
    callback = OTRTCallback(teacher, layers, **{**OPTIONS, "solve_every": 20})
    saver = ModelCheckpoint(folder, filename="{step}", every_n_epochs=3, save_top_k=-1, save_on_train_epoch_end=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
            enable_checkpointing=True,
            callbacks=[callback, saver],
        )
        try:
            # A step is an epoch: Lightning does not resume data in the middle of one.
            data = DataLoader(Batches(sizes, calls=ACCUMULATE), batch_size=None)
            trainer.fit(task, data, ckpt_path=f"{folder}/step=3.ckpt" if resume else None)
        except BaseException as error:
            if dies_at < 0:
                raise
            return str(error)
    return [p.detach().clone() for p in task.parameters()]


def test_a_killed_run_resumes_with_identical_results(tmp_path: Path) -> None:
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    expected, _ = run_processes(2, fit_and_die, whole, -1, False, init=False)
    said, nothing = run_processes(2, fit_and_die, killed, 4, False, init=False, dies=True)
    assert isinstance(said, str)
    assert nothing is None
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["step=3.ckpt"]
    for weights in run_processes(2, fit_and_die, killed, -1, True, init=False):
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_untested_strategies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    assert shared_batch(trainer, strict=True) == (False, None)
    # Not installed here.
    monkeypatch.setattr(pl.Trainer, "strategy", property(lambda _: object.__new__(DeepSpeedStrategy)))
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda _: 2))
    with pytest.raises(MisconfigurationException, match=r"DeepSpeedStrategy was never tested .* strict=False"):
        OTRTCallback(net(6, seed=2), LAYERS).setup(trainer, PlainTask((1, 1)), "fit")
    with pytest.warns(UserWarning, match="DeepSpeedStrategy was never tested"):
        assert shared_batch(trainer, strict=False) == (True, None)


def test_tensor_parallel_layers_are_refused() -> None:
    [said, _] = run_processes(2, sharded_activations)
    assert "student layer '0' gives a DTensor" in said


def sharded_activations() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    student = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    plan = {"0": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    parallelize_module(student, init_device_mesh("cpu", (2,)), plan)
    transfer = RepresentationTransfer(nn.Sequential(nn.Linear(5, 6)), {"0": "0"})
    with transfer.attached(student):
        try:
            student(torch.randn(8, 5))
        except TypeError as error:
            return str(error)
    return ""


def test_batch_norm_is_told_once() -> None:
    first, second = run_processes(2, batch_norm)
    assert sum("BatchNorm layers" in line for line in first) == 1
    assert not any("BatchNorm layers" in line for line in second)


def batch_norm() -> list[str]:
    lines: list[str] = []
    student = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    transfer = RepresentationTransfer(nn.Sequential(nn.Linear(5, 6)), {"1": "0"})
    transfer.report = lines.append
    with transfer.attached(student):
        for _ in range(2):
            student(torch.randn(8, 5))
            transfer.loss()
    return lines


def teacher_runs(**options: Any) -> tuple[list[tuple[int, bool]], set[torch.dtype], int]:
    """For each of four steps: forwards of the teacher and whether the term was exchanged; types and copies run."""
    seen: list[torch.nn.Module] = []
    sent: list[int] = []
    all_reduce = torch.distributed.all_reduce

    def counted(*args: Any, **options: Any) -> Any:
        sent.append(1)
        return all_reduce(*args, **options)

    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, **options)
    run = transfer.teacher.run

    def watched(*args: Any) -> Any:
        seen.append(transfer.teacher.module)
        return run(*args)

    transfer.teacher.run = watched
    torch.distributed.all_reduce = counted
    student = net(4, seed=1)
    steps = []
    try:
        with transfer.attached(student):
            for call in range(4):
                seen_before, sent_before = len(seen), len(sent)
                student(batch(call, (8,))[0])
                transfer.loss()
                steps.append((len(seen) - seen_before, len(sent) > sent_before))
    finally:
        torch.distributed.all_reduce = all_reduce
    return steps, {next(module.parameters()).dtype for module in seen}, len(set(map(id, seen)))


def teacher_costs() -> dict[str, Any]:
    return {
        "bf16": teacher_runs(teacher_dtype="bfloat16"),
        "late": teacher_runs(schedule=lambda step: float(step >= 2)),
    }


def test_the_teacher_runs_once_in_its_type_and_not_at_weight_zero() -> None:
    for found in run_processes(2, teacher_costs):
        assert found["bf16"] == ([(1, True)] * 4, {torch.bfloat16}, 1)
        steps, _, _ = found["late"]
        assert steps == [(0, False), (0, False), (1, True), (1, True)]


def compiled_teacher() -> list[Tensor]:
    teacher = torch.compile(net(6, seed=2), backend="eager")
    part = batch(0, (4, 4))[0].split(4)[torch.distributed.get_rank()]
    return terms_of(teacher, part)


def terms_of(teacher: nn.Module, x: Tensor) -> list[Tensor]:
    transfer, student = RepresentationTransfer(teacher, LAYERS), net(4, seed=1)
    terms = []
    with transfer.attached(student):
        for _ in range(3):
            student(x)
            terms.append(transfer.loss().detach())
    return terms


@pytest.mark.slow
def test_compiled_teacher() -> None:
    expected = terms_of(net(6, seed=2), batch(0, (4, 4))[0])
    for terms in run_processes(2, compiled_teacher):
        assert_close(terms, expected)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_multi_node_example(launcher: str, tmp_path: Path) -> None:
    """Two nodes on this machine; both launchers end with the same weights."""
    port = free_port()
    workers = []
    for node in range(2):
        script = ["-m", "examples.multi_node", "--nodes", "2", "--devices", "1", "--epochs", "1"]
        if launcher == "torchrun":
            place = ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
            command = [sys.executable, "-m", "torch.distributed.run", *place, f"--master-port={port}", *script]
            environment = {}
        else:
            command = [sys.executable, *script]
            environment = {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        workers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        told = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(told)
    assert "accuracy" in told[0], told[0]
