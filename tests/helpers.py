"""Tiny networks, data and trainers that the tests of the three ways in share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 3
#: Pairs of the shared networks. There are two: weights of a half are exact in binary, so that sums are too.
LAYERS = {"net.block1": "block1", "net.block2": "block2"}

needs_averaging = pytest.mark.skipif(
    not hasattr(pl.callbacks, "WeightAveraging"), reason="this version of Lightning has no WeightAveraging"
)


class Net(nn.Module):
    """Two convolutional blocks and a head on 8x8 images."""

    def __init__(self, width: int = 4, *, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.block1 = self._block(1, width, norm)
        self.block2 = self._block(width, 2 * width, norm)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, CLASSES)

    @staticmethod
    def _block(inputs: int, outputs: int, norm: bool) -> nn.Sequential:
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs) if norm else nn.Identity()]
        return nn.Sequential(*layers, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.block1(x), 2)
        return self.head(self.dropout(self.block2(x).mean((2, 3))))


class Task(pl.LightningModule):
    """Classification with the shared network; subclasses change one thing."""

    def __init__(self, width: int = 4, lr: float = 0.1, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(width, dropout=dropout, norm=norm)
        self.lr = lr
        self.term: Callable[[], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.add(self.loss(batch))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def add(self, loss: Tensor) -> Tensor:
        """What a user writes who adds the term without a callback; nothing unless a test sets ``term``."""
        return loss if self.term is None else loss + self.term()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class ValidatedTask(Task):
    """With validation and test, for which Lightning wants data."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))


def with_slow(names: Iterable[str], *starts: str) -> list[Any]:
    """Names as parameters of a test. Those that begin in one of these ways are slow; by default the others suffice."""
    return [pytest.param(name, marks=pytest.mark.slow) if name.startswith(starts) else name for name in names]


def seeded(seed: int, build: Any, *args: Any, **kwargs: Any) -> Any:
    """Build something from random numbers of its own, and leave the global ones alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args, **kwargs)


def make_teacher(width: int = 6) -> Net:
    """A teacher in the mode in which users have it after loading: train mode, statistics of its own."""
    teacher = seeded(1, Net, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for buffer in teacher.buffers():
            if buffer.is_floating_point():
                buffer.mul_(torch.empty_like(buffer).uniform_(0.1, 0.2)).add_(
                    torch.empty_like(buffer).uniform_(-0.1, 0.1)
                )
    return teacher


def make_task(kind: type[Task] = Task, **options: Any) -> Task:
    return seeded(0, kind, **options)


def make_data(samples: int = 64, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 1, 8, 8, generator=generator).to(dtype)
    return TensorDataset(x, torch.randint(0, CLASSES, (samples,), generator=generator))


def loader(samples: int = 64, batch_size: int = 8, *, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(make_data(samples), batch_size=batch_size, shuffle=shuffle)


def make_trainer(**options: Any) -> pl.Trainer:
    """A silent trainer on the CPU; four steps unless told otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    if "max_steps" not in options and "max_epochs" not in options:
        defaults["max_steps"] = 4
    return pl.Trainer(**{**defaults, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the last bit, which only the same operations in the same order are on every processor."""
    assert list(found) == list(expected)
    different = {
        name: float((found[name].double() - value.double()).abs().max())
        for name, value in expected.items()
        if found[name].dtype != value.dtype or not torch.equal(found[name], value)
    }
    assert not different


def distance(found: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two values."""
    assert list(found) == list(other)
    return max(float((found[name].double() - value.double()).abs().max()) for name, value in other.items())


def differ(found: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether they differ by more than rounding does."""
    return distance(found, other) > 1e-4


def assert_agree(
    found: dict[str, Tensor], expected: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float = 1e-6
) -> None:
    """Equal but for rounding: weights of two fits whose terms come from different operations.

    Args:
        found: Weights of one fit.
        expected: Those of the other, by hand.
        plain: Those of a fit without the term.
        tolerance: Largest difference, as a part of what the term does to the weights. A wrong factor, a missing step or
            the plan of another batch changes them by a large part of it; float64 differs by less than 1e-9 of it.
    """
    effect = distance(expected, plain)
    assert effect > 1e-4, "the term has no effect here, so that nothing is tested"
    assert distance(found, expected) <= tolerance * effect


def hooks(*modules: nn.Module) -> list[str]:
    """Where there are hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        f"{name}.{kind}"
        for module in modules
        for name, part in module.named_modules()
        for kind in kinds
        if getattr(part, kind)
    ]


def _counting() -> Generator[int, int | None, None]:
    number = 0
    while True:
        added = yield number
        number = 0 if added is None else number + added


class Count:
    """A number that extra forwards cannot set back as they do with lists and attributes: a generator holds it."""

    def __init__(self) -> None:
        self._number = _counting()
        next(self._number)

    def add(self) -> None:
        self._number.send(1)

    def clear(self) -> None:
        self._number.send(None)

    def __len__(self) -> int:
        return self._number.send(0)


@contextmanager
def forwards(module: nn.Module) -> Iterator[Count]:
    """Counts the forwards of a module, without a hook, which a deep copy would carry along."""
    count = Count()
    forward = module.forward

    # With its signature, by which masks are found.
    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count.add()
        return forward(*args, **kwargs)

    module.forward = counted  # type: ignore[method-assign]
    try:
        yield count
    finally:
        del module.forward
