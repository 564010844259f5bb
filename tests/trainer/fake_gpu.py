"""Fits on a GPU that is not there: fake tensors hold no values, so that whatever would wait for the device raises."""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_otrt.teacher.cache.sample_cache import SampleCache
from lightning_otrt.teacher.cache.store import Found
from lightning_otrt.teacher.host_copy import HostCopy

__all__ = [
    "BATCH",
    "STEPS",
    "Task",
    "fake_cache",
    "fake_fit",
    "fake_gpu",
    "images",
    "layers_of_images",
    "network",
]

#: Steps of a fit: plans are solved in calls 0, 1, 2 and 4.
BATCH, STEPS = 12, 5


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Fake tensors, and without what is allowed to wait: it happens once, and not in each step.

    - the checksum of the teacher's weights, and the check that the student has none of them, when it is attached;
    - the generators of random numbers and the buffers that are restored after the trace of the first batch, and the
      values of its masks;
    - the look at the trace whether neurons are rectified;
    - the comparison of what the first layer gets in evaluation and in training, in the first forward;
    - the checks of the values and plans of the first batch, the look whether its plans need more updates, and the
      monitor's look whether the student is a copy;
    - the read of the gradient of the logits in the first backward pass, in the next step;
    - the look whether states are zeros, in the first forward, and the copy of its result to the host in later ones;
    - the read of the flags for values that are not finite, every ``log_every_n_steps`` and at the end.

    Weights of another precision are made on the device, since torch cannot convert fake ones in place: the types of
    ``precision="bf16-true"`` and of ``teacher_dtype`` are those of ``test_types``. ``plan="static"``, ``plan="exact"``
    and costs that users write do wait, as the docs say (docs/options.md).

    Sinkhorn makes few updates, all of which are alike.
    """
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr("lightning_otrt.teacher.frozen.identity._checksum", lambda *args: 1)
        patch.setattr("lightning_otrt.teacher.frozen.separate._identities", lambda tensor: (id(tensor),))
        patch.setattr("torch.random.fork_rng", lambda devices: contextlib.nullcontext())
        patch.setattr("lightning_otrt.reading.tracer.random_state", lambda *_: [])
        patch.setattr("lightning_otrt.reading.extra_forwards.evaluation._restore_buffers", lambda module, saved: None)
        patch.setattr("lightning_otrt.reading.trace_hooks.is_rectified", lambda value: False)
        patch.setattr("lightning_otrt.reading.warnings.train_only._is_same", lambda before, now: True)
        patch.setattr("lightning_otrt.reading.masks.shown_padding.padded_arguments", lambda call, is_inner: ())
        patch.setattr("lightning_otrt.reading.masks.search._is_causal", lambda valid, mask: False)
        patch.setattr("lightning_otrt.reading.masks.search.problem_of", lambda mask, source: "")
        patch.setattr("lightning_otrt.reading.masks.search._is_common", lambda value: True)
        patch.setattr("lightning_otrt.reading.masks.search._count", lambda samples: 0)
        patch.setattr("lightning_otrt.reading.masks.search.means_the_opposite", lambda *args: False)
        patch.setattr("lightning_otrt.trainer.monitor_warnings._is_copy", lambda student, teacher: False)
        patch.setattr("lightning_otrt.steps.term_engine.inspect_batch", lambda *args: ())
        patch.setattr(
            "lightning_otrt.steps.distillation_term.Distillation._check", lambda self, views, is_regression: None
        )
        patch.setattr("lightning_otrt.teacher.task_gradient._read", lambda sums: (0.0, 1.0, 0.0))
        patch.setattr("lightning_otrt.teacher.frozen.zero_states._read", lambda flag: True)
        patch.setattr("lightning_otrt.teacher.frozen.zero_states.HostCopy", _NoCopy)
        patch.setattr("lightning_otrt.steps.entropic_coupling.inspect_plan", lambda *args: ())
        patch.setattr("lightning_otrt.steps.entropic_coupling.EntropicCoupling.iterations", lambda *_: 3)
        patch.setattr(
            "lightning_otrt.steps.entropic_coupling.EntropicCoupling._finished", lambda self, *given: given[-1]
        )
        patch.setattr("lightning_otrt.run_state.RunState.take_bad_calls", lambda self, distances: (0, ""))
        # Else autocast is off where there is no driver.
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr("torch.cuda.is_bf16_supported", lambda: True)
        # torchmetrics copies the fake tensors that Lightning logs, which torch cannot do.
        patch.setattr(FakeTensor, "__deepcopy__", lambda self, memo: self.detach().clone(), raising=False)
        yield


class _NoCopy(HostCopy):
    """Takes a tensor of the device, and copies nothing: pinned memory and events need a driver."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.device.type == "cuda"

    def wait(self) -> Tensor:
        """Nothing to look at."""
        return torch.zeros(0)


@contextlib.contextmanager
def fake_cache(known: list[int]) -> Iterator[list[str]]:
    """A cache of the teacher that knows so many samples of each batch. Use it inside :func:`fake_gpu`.

    What the host does with a cache has no values to work on, so it is left out, by name:

    - the lookup, which waits in each step for 16 bytes of each sample (:meth:`SampleCache._find`), and with it the
      comparison of the teacher's weights, whose copies arrive with these bytes (:meth:`WeightWatch.changed`);
    - the copies themselves (:class:`HostCopy`), and those of indices, from pinned memory (``sample_cache._on``);
    - the fingerprint of the teacher when the cache is opened, and the checks of the first batch.

    Yields:
        What ran, in order: ``hash``, ``look`` (at the weights), ``copy`` (to the host), and of each run of the teacher
        the number of samples.
    """
    steps, rows, events = iter(known), {}, []

    class Copy(_NoCopy):
        """One that is noted."""

        def __init__(self, tensor: Tensor) -> None:
            super().__init__(tensor)
            events.append("copy")

    def find(self: SampleCache, copied: object, verify: Callable[[], None], device: torch.device) -> Any:
        """The first samples of the batch are known."""
        verify()
        count = next(steps)
        tensors = {name: like.new_empty(count, *like.shape[1:]) for name, like in rows.items()} if count else {}
        keys = torch.zeros(BATCH, 2, dtype=torch.int64)
        with unset_fake_temporarily():  # the host knows which samples are new
            known, missing = torch.arange(count), torch.arange(count, BATCH)
        return keys, Found(torch.zeros(0), tensors), known, missing

    def keep(self: SampleCache, keys: Tensor, fresh: dict[str, Tensor]) -> None:
        rows.update(fresh)
        assert len(keys) == len(next(iter(fresh.values())))
        events.append(str(len(keys)))
        kept(self, keys, fresh)

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (events.append(name), function(*args, **options))[1]

    kept, cache = SampleCache._keep, "lightning_otrt.teacher.cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{cache}.sample_cache.HostCopy", Copy)
        patch.setattr(f"{cache}.weight_watch.HostCopy", Copy)
        patch.setattr(f"{cache}.weight_watch._state", lambda tensors: [])
        patch.setattr(f"{cache}.weight_watch.WeightWatch.changed", lambda self, looked: "")
        patch.setattr(f"{cache}.cached_run.fingerprint", lambda *args, **options: "teacher")
        patch.setattr(f"{cache}.cached_run.state_restored", lambda *args: contextlib.nullcontext())
        patch.setattr(f"{cache}.sample_cache.why_not_per_sample", lambda *args, **options: "")
        patch.setattr(f"{cache}.sample_cache._on", lambda index, device: torch.zeros_like(index, device=device))
        patch.setattr(SampleCache, "_find", find)
        patch.setattr(SampleCache, "_keep", keep)
        patch.setattr(f"{cache}.sample_cache._add", lambda store, adding: adding.clear())
        look, hashed = "weight_watch.WeightWatch.look", "sample_hash.SampleHash.__call__"
        for name, place in (("look", look), ("hash", hashed)):
            patch.setattr(f"{cache}.{place}", noted(name, pkgutil.resolve_name(f"{cache}.{place}")))
        yield events


class _Accelerator(CPUAccelerator):
    """Takes the fake device."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""


class _OneDevice(SingleDeviceStrategy):
    """Leaves the parameters on the fake device, where they were made: torch cannot always move fake ones."""

    def model_to_device(self) -> None:
        """They are there."""

    def teardown(self) -> None:
        """Nothing to give back."""


def network(width: int, dtype: torch.dtype | None = None) -> nn.Sequential:
    """Two blocks of convolutions, and a head, on the fake device."""
    with torch.device("cuda"), _default(dtype):
        return layers_of_images(width)


@contextlib.contextmanager
def _default(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    yield
    torch.set_default_dtype(before)


def layers_of_images(width: int) -> nn.Sequential:
    """The same where torch makes tensors."""
    first = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Task(pl.LightningModule):
    """Classification of images."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or network(8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def backward(self, loss: Tensor) -> None:
        """Left out: autograd needs the driver of the device. Its operations are counted in other tests."""
        assert loss.device.type == "cuda"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Batches:
    """Random inputs with labels. It has no length, which Lightning would put on the device and read."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Batches on the CPU."""
        return iter([(self.draw(), torch.randint(10, (BATCH,))) for _ in range(STEPS)])


class Copies(TorchDispatchMode):
    """Counts the copies between host and device: each waits for what runs on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            sources = [arg for arg in args if isinstance(arg, Tensor)][-1:]
            self.count += any(source.device != found.device for source in sources)
        return found


class CopiesPerStep(pl.Callback):
    """The copies of each step, without those of the batch. Put it last."""

    def __init__(self) -> None:
        self.mode, self.found = Copies(), []
        self._counting = contextlib.ExitStack()

    def on_train_batch_start(self, *args: Any) -> None:
        """After the batch was moved."""
        self.mode.count = 0
        self._counting.enter_context(self.mode)

    def on_train_batch_end(self, *args: Any) -> None:
        """Before the next batch is moved."""
        self._counting.close()
        self.found.append(self.mode.count)

    def on_exception(self, *args: Any) -> None:
        """A step failed."""
        self._counting.close()


def images() -> Tensor:
    """A batch of images."""
    return torch.randn(BATCH, 3, 16, 16)


def fake_fit(
    task: pl.LightningModule,
    callbacks: list[pl.Callback],
    draw: Callable[[], Any] = images,
    **options: Any,
) -> list[int]:
    """Fit on random batches. Call it inside :func:`fake_gpu`.

    Returns:
        The copies between host and device in each step, those of the batch left out.
    """
    copies = CopiesPerStep()
    trainer = pl.Trainer(
        strategy=_OneDevice(device=torch.device("cuda:0"), accelerator=_Accelerator()),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, copies],
        **options,
    )
    trainer.fit(task, _Batches(draw))
    assert len(copies.found) == STEPS
    return copies.found
