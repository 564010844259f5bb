"""A teacher that fails is named, with its inputs and what to do, in the first batch and in later ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer
from lightning_otrt.reading.neurons.reader import NeuronReader
from lightning_otrt.reading.warnings.failed_teacher import teacher_failed


class Net(nn.Module):
    """It fails on batches of one kind."""

    def __init__(self, width: int, fails: Any = None) -> None:
        super().__init__()
        self.mix, self.head, self.fails = nn.Linear(4, width), nn.Linear(width, 3), fails

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.fails is not None and x[0].max() > 1:
            raise self.fails("CUDA out of memory")
        return self.head(self.mix(x))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError, IndexError])
def test_its_error_names_it(kind: type[Exception], first: int, cached: bool) -> None:
    student = Net(8)
    cache = {"teacher_cache": "memory"} if cached else {}
    transfer = RepresentationTransfer(Net(12, kind), {"mix": "mix"}, **cache)
    message = (
        r"The teacher \(Net\) failed on \(float32 \(6, 4\)\), from the inputs of the student \(Net\). "
        rf"{kind.__name__}: .?CUDA out of memory.*`teacher_inputs`"
    )
    with transfer.attached(student):
        for _ in range(first):
            student(torch.rand(6, 4))
            transfer.loss()
        with pytest.raises(RuntimeError, match=message):
            student(torch.rand(6, 4) + 2)
        # The next step goes on.
        student(torch.rand(6, 4))
        transfer.loss()


def test_an_error_of_this_library_stays_itself() -> None:
    """A mask of another length in a later batch, which only the teacher reads."""

    class Student(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    x, mask = torch.rand(6, 5, 4), torch.ones(6, 5, dtype=torch.bool)
    student = Student(8)
    transfer = RepresentationTransfer(Net(12), [LayerPair("mix", "mix", mask=(None, "mask"))])
    with transfer.attached(student):
        student(x, mask)
        transfer.loss()
        with pytest.raises(ValueError, match="The mask 'mask' has the shape .* teacher layer 'mix' has 5"):
            student(x, mask[:, :3])


def test_where_it_comes_from() -> None:
    try:
        torch.zeros(2) @ torch.zeros(3)
    except RuntimeError as error:
        failed = teacher_failed(error, nn.Linear(2, 2), ((1,), {"b": None}), nn.ReLU(), "net")
    assert "failed on (int, b=None), from the inputs of 'net' of the student (ReLU)" in str(failed)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_an_error_of_torch_inside_a_reading_is_none_of_the_teacher(
    first: int, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python code of torch that a hook calls is the innermost frame, and no module runs inside of the hook."""

    def fails(reader: NeuronReader, output: Any, *args: Any) -> Tensor:
        if "teacher" in reader.layer and output[0].max() > 1e3:
            return output.unflatten(1, (5, 5))
        return read(reader, output, *args)

    read = NeuronReader.__call__
    monkeypatch.setattr(NeuronReader, "__call__", fails)
    student, teacher = Net(8), Net(12)
    transfer = RepresentationTransfer(teacher, {"mix": "mix"}, **({"teacher_cache": "memory"} if cached else {}))
    with transfer.attached(student):
        for _ in range(first):
            student(torch.rand(6, 4))
            transfer.loss()
        with pytest.raises(RuntimeError, match="unflatten") as caught:
            student(torch.rand(6, 4) * 1e6 + 1e6)
    assert "The teacher" not in str(caught.value)


def test_a_hook_of_the_user_is_one_of_the_teacher() -> None:
    def fails(*args: Any) -> None:
        raise ValueError("no")

    teacher = Net(12)
    teacher.mix.register_forward_hook(fails)
    transfer = RepresentationTransfer(teacher, {"mix": "mix"})
    student = Net(8)
    with transfer.attached(student), pytest.raises(RuntimeError, match=r"The teacher \(Net\) failed.*ValueError: no"):
        student(torch.rand(6, 4))
