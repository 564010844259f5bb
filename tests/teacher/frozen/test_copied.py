"""A copy of the teacher in another type computes what the teacher computes now."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer
from lightning_otrt.teacher.frozen.copied import has_dtype

X = seeded(0, torch.randn, 8, 4)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(4, width), nn.Linear(width, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.scale * self.body(x)))


CHANGES: dict[str, Callable[[Net], object]] = {
    "an attribute": lambda net: setattr(net, "scale", 3.0),
    "a hook": lambda net: net.body.register_forward_hook(lambda module, args, output: output * 3),
    "a layer of equal shape": lambda net: setattr(net, "body", nn.Sequential(nn.Linear(4, 8), nn.ReLU())),
    "weights": lambda net: net.body.weight.data.mul_(3),
}


@pytest.mark.parametrize(
    ("name", "cache"),
    [*((name, None) for name in CHANGES), *((name, "memory") for name in ("an attribute", "a hook"))],
)
def test_a_change_reaches_the_copy(name: str, cache: str | None) -> None:
    """As where the teacher runs in its own type."""
    found: list[list[float]] = []
    for dtype in (None, torch.float64):
        teacher, student = seeded(1, Net, 8), seeded(2, Net, 6)
        transfer = RepresentationTransfer(
            teacher, ["head:input"], distillation=1.0, teacher_dtype=dtype, teacher_cache=cache
        )
        values = []
        with transfer.attached(student):
            for step in range(3):
                if step == 1:
                    with torch.random.fork_rng():
                        torch.manual_seed(5)
                        CHANGES[name](teacher)
                student(X)
                transfer.loss()
                values.append(float(transfer.distillation_value))
        found.append(values)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][0] != pytest.approx(found[0][1], rel=1e-2)


class Holder:
    def __init__(self, scale: float) -> None:
        self.scale = scale


class WithHolder(Net):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.holder = Holder(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.holder.scale * self.body(x)))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_what_changes_inside_of_an_object_is_seen_in_a_loop_without_epochs(dtype: torch.dtype | None) -> None:
    teacher, student = seeded(1, WithHolder, 8), seeded(2, Net, 6)
    options = {"distillation": 1.0, "teacher_dtype": dtype}
    transfer = RepresentationTransfer(teacher, ["head:input"], teacher_cache="memory", **options)
    values = []
    with transfer.attached(student):
        for step in range(103):
            if step == 1:
                teacher.holder.scale = 3.0
            student(X)
            transfer.loss()
            values.append(float(transfer.distillation_value))
    fresh = RepresentationTransfer(teacher, ["head:input"], **options)
    with fresh.attached(student):
        student(X)
        fresh.loss()
    assert values[0] != pytest.approx(values[-1], rel=1e-2)
    assert values[-1] == pytest.approx(float(fresh.distillation_value), rel=1e-4)


def test_buffers_of_another_type_are_kept() -> None:
    """Networks of half precision keep the frequencies of their positions in float32."""
    teacher = Net(8).to(torch.bfloat16)
    teacher.register_buffer("frequencies", torch.full((4,), 1 / 3))
    assert has_dtype(teacher, torch.bfloat16)
    assert not has_dtype(teacher, torch.float32)
    statistics = nn.BatchNorm1d(3, affine=False)
    assert has_dtype(statistics, torch.float32)
    assert not has_dtype(statistics, torch.float64)


def test_a_copy_is_gone_after_the_last_step() -> None:
    transfer, student = RepresentationTransfer(Net(8), ["head:input"], teacher_dtype=torch.float64), Net(6)
    with transfer.attached(student):
        student(X)
        transfer.loss()
        copied = weakref.ref(transfer.teacher.module)
        assert copied().body.weight.dtype == torch.float64
    gc.collect()
    assert copied() is None
