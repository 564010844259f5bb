"""Fits with the callback on a real GPU: no step waits for it, and the student learns what it learns on a CPU."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainer.fake_gpu import BATCH, STEPS, Task, layers_of_images
from trainer.test_no_waiting import OPTIONS, Encoder, Manual, TwoViews, Words, padded_words

from lightning_otrt import LogitDistillation, OTRTCallback, OTRTModule, OTRTMonitor
from lightning_otrt.steps import step_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Of the fits on a CPU that others are compared with, and of torch's search for waits.
    pytest.mark.filterwarnings("ignore:GPU available but not used", "ignore:Synchronization debug mode is a prototype"),
]


@pytest.fixture(autouse=True)
def _captures_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture waits for the device, once for each kind of step."""
    capturing = step_graphs.CudaGraph.capturing

    @contextlib.contextmanager
    def allowed(self: step_graphs.CudaGraph, pool: Any) -> Iterator[None]:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        with capturing(self, pool):
            yield
        torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(step_graphs.CudaGraph, "capturing", allowed)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Convolutions of a GPU round to TF32 else, which a CPU does not."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield


class NoWaiting(pl.Callback):
    """Makes each wait for the device an error, from the second step on. Put it last."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """After the batch was moved."""
        if batch_idx:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *args: Any) -> None:
        """Before the next batch is moved."""
        torch.cuda.set_sync_debug_mode("default")

    on_exception = on_train_batch_end


class Trained(Task):
    """With the backward pass that the fit on fake tensors leaves out."""

    def backward(self, loss: Tensor) -> None:
        """Lightning's own."""
        loss.backward()


def data() -> tuple[Tensor, Tensor]:
    """Images and labels of a fit."""
    return torch.randn(STEPS * BATCH, 3, 16, 16), torch.randint(10, (STEPS * BATCH,))


def fit(
    task: pl.LightningModule,
    callbacks: list[pl.Callback],
    accelerator: str = "gpu",
    samples: Any = None,
    *,
    waits: bool = False,
    **options: Any,
) -> Tensor:
    """Fit, on a GPU without waiting unless ``waits``; returns all weights of the student, on the CPU."""
    last = [NoWaiting()] if accelerator == "gpu" and not waits else []
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, *last],
        **{"max_epochs": 1, "log_every_n_steps": 1000, **options},
    )
    loader = DataLoader(samples or TensorDataset(*data()), batch_size=BATCH)
    trainer.fit(task, loader)
    return nn.utils.parameters_to_vector(task.parameters()).detach().cpu()


def fits_of(task: Task, teacher: nn.Module, options: dict[str, Any], **trainer: Any) -> tuple[Tensor, Tensor]:
    """The weights after the same fit on a GPU and on a CPU."""
    found = []
    for accelerator in ("gpu", "cpu"):
        torch.manual_seed(1)
        own_task, own_teacher = copy.deepcopy((task, teacher))
        found.append(fit(own_task, [OTRTCallback(own_teacher, **options)], accelerator, **trainer))
    return found[0], found[1]


def close(weights: Tensor, expected: Tensor, start: Tensor) -> bool:
    """Whether training moved the weights in the same way, to a hundredth of the way."""
    return bool((weights - expected).norm() < 0.01 * (expected - start).norm())


def start_of(task: nn.Module) -> Tensor:
    """All weights as they are."""
    return nn.utils.parameters_to_vector(task.parameters()).detach().clone()


@pytest.mark.parametrize("options", [*OPTIONS, {"distillation": LogitDistillation(features="4:input")}], ids=repr)
def test_options(options: dict[str, Any]) -> None:
    task, teacher = Trained(layers_of_images(8)), layers_of_images(12)
    gpu, cpu = fits_of(task, teacher, options)
    plain = fit(copy.deepcopy(task), [], "cpu")
    assert close(gpu, cpu, start_of(task))
    assert not close(plain, cpu, start_of(task)), "the term changes nothing"


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_precision(precision: str) -> None:
    """The gradient scaler of float16 waits in each step, with or without the callback."""
    callbacks, waits = [OTRTCallback(layers_of_images(12))], precision == "16-mixed"
    start = start_of(task := Trained(layers_of_images(8)))
    found = fit(task, callbacks, waits=waits, precision=precision)
    assert found.isfinite().all()
    assert not torch.equal(found, start)


TYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("types", list(itertools.product(TYPES, TYPES)), ids=str)
def test_types(types: tuple[torch.dtype, torch.dtype]) -> None:
    images, labels = data()
    samples = TensorDataset(images.to(types[0]), labels)
    task = Trained(layers_of_images(8).to(types[0]))
    fit(task, [OTRTCallback(layers_of_images(12).to(types[1]))], samples=samples)


@pytest.mark.parametrize("kind", [TwoViews, Manual])
def test_tasks(kind: type[Task]) -> None:
    class Own(kind):
        def backward(self, loss: Tensor) -> None:
            loss.backward()

    task = Own(layers_of_images(8)) if kind is TwoViews else Own()
    task.net = layers_of_images(8)
    gpu, cpu = fits_of(task, layers_of_images(12), {})
    assert close(gpu, cpu, start_of(task))


def test_wrapper_and_callback_give_the_same_weights() -> None:
    task, teacher = Trained(layers_of_images(8)), layers_of_images(12)
    torch.manual_seed(1)
    wrapped = fit(OTRTModule(copy.deepcopy(task), copy.deepcopy(teacher)), [])
    torch.manual_seed(1)
    called = fit(copy.deepcopy(task), [OTRTCallback(copy.deepcopy(teacher))])
    assert close(wrapped, called, start_of(task))


def test_monitor() -> None:
    callbacks = [OTRTCallback(layers_of_images(12)), OTRTMonitor(every_n_steps=50)]
    fit(Trained(layers_of_images(8)), callbacks)


@pytest.mark.parametrize("cost", ["correlation", "sqeuclidean"])
def test_padding(cost: str) -> None:
    class Own(Words):
        def backward(self, loss: Tensor) -> None:
            loss.backward()

    batches = [padded_words() for _ in range(STEPS)]
    words, mask = (torch.cat(side) for side in zip(*batches, strict=True))
    samples = [((w, m), label) for w, m, label in zip(words, mask, torch.randint(10, (len(words),)), strict=True)]
    task, teacher = Own(Encoder(8)), Encoder(12)
    gpu, cpu = fits_of(task, teacher, {"cost": cost, "layers": "blocks"}, samples=samples)
    assert close(gpu, cpu, start_of(task))


@pytest.mark.parametrize("options", [{}, {"distillation": 1.0}, {"plan": "orthogonal"}], ids=repr)
def test_teacher_cache(options: dict[str, Any]) -> None:
    """The same weights with a cache, whose lookup waits in each step."""
    task, teacher, samples = Trained(layers_of_images(8)), layers_of_images(12), TensorDataset(*data())
    found = []
    for cache in (None, "memory"):
        torch.manual_seed(1)
        callback = OTRTCallback(copy.deepcopy(teacher), teacher_cache=cache, **options)
        found.append(fit(copy.deepcopy(task), [callback], samples=samples, waits=True, max_epochs=2))
    assert close(found[1], found[0], start_of(task))
    assert callback.transfer.cache is not None
    assert callback.transfer.cache.hit_rate == 0.5


@pytest.mark.parametrize("options", [{}, {"memory": 0.9}, {"cost": "sqeuclidean"}, {"plan": "orthogonal"}], ids=repr)
@pytest.mark.parametrize("trainer", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=repr)
def test_graphs(options: dict[str, Any], trainer: dict[str, Any]) -> None:
    """The weights after three epochs, most steps of which are replayed, are those without graphs."""
    task, teacher, samples = Trained(layers_of_images(8)), layers_of_images(12), TensorDataset(*data())
    found, captured = [], []
    for uses_graphs in (True, False):
        torch.manual_seed(1)
        callback = OTRTCallback(copy.deepcopy(teacher), solve_every=3, **options)
        callback.transfer.cuda_graphs = uses_graphs
        counter = Captures(callback)
        own = copy.deepcopy(task)
        found.append(fit(own, [callback, counter], samples=samples, waits=True, max_epochs=4, **trainer))
        captured.append(counter.found)
    assert close(found[0], found[1], start_of(task))
    assert captured[0] >= 2
    assert captured[1] == 0


class Captures(pl.Callback):
    """How many calls were captured, counted before the transfer lets go of them."""

    def __init__(self, callback: OTRTCallback) -> None:
        self.callback, self.found = callback, 0

    def on_train_batch_end(self, *args: Any) -> None:
        """After a step."""
        self.found = len(self.callback.transfer.engine.graphs._captured)
