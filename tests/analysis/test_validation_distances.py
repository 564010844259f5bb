"""Distances over a validation set: those of a comparison of the same layers, whatever goes wrong in the middle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import loader, make_task, make_teacher
from torch import nn

from lightning_otrt import RepresentationTransfer, compare_representations
from lightning_otrt.analysis.validation_distances import ValidationDistances

LAYERS = {"block1": "block1", "block2": "block2"}


@pytest.fixture
def student() -> nn.Module:
    return make_task().net


@pytest.fixture
def transfer(student: nn.Module) -> Iterator[RepresentationTransfer]:
    """Attached, after a first training step."""
    transfer = RepresentationTransfer(make_teacher(), LAYERS)
    with transfer.attached(student):
        student(next(iter(loader()))[0])
        transfer.loss()
        yield transfer


def count_hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def validate(student: nn.Module) -> None:
    student.eval()
    with torch.no_grad():
        for x, _ in loader():
            student(x)
    student.train()


def test_is_the_distance_over_the_whole_set(student: nn.Module, transfer: RepresentationTransfer) -> None:
    distances = ValidationDistances(transfer, student)
    validate(student)
    found = distances.compute()
    distances.close()
    assert distances.error is None
    assert len(transfer.views) == 0
    expected = compare_representations(student, transfer.teacher.module, loader(), layers="block?", progress=False)
    torch.testing.assert_close(torch.stack(found), expected.distances.diagonal(), rtol=1e-5, atol=0)


def test_a_teacher_that_writes_to_its_inputs(student: nn.Module, transfer: RepresentationTransfer) -> None:
    transfer.teacher.module.register_forward_pre_hook(lambda _, args: (args[0].mul_(2), None)[1])
    distances = ValidationDistances(transfer, student)
    x, _ = next(iter(loader()))
    before = x.clone()
    with torch.no_grad():
        student(x)
    distances.close()
    assert torch.equal(x, before)
    assert distances.error is None


def test_no_hook_is_left(student: nn.Module, transfer: RepresentationTransfer) -> None:
    teacher = transfer.teacher.module
    before = count_hooks(student), count_hooks(teacher)
    distances = ValidationDistances(transfer, student)
    # On the root two, and one on each layer.
    assert (count_hooks(student), count_hooks(teacher)) == (before[0] + 4, before[1] + 2)
    distances.close()
    assert (count_hooks(student), count_hooks(teacher)) == before


@pytest.mark.filterwarnings("ignore:.*was called before the ``update`` method")
def test_no_data_is_nan(student: nn.Module, transfer: RepresentationTransfer) -> None:
    distances = ValidationDistances(transfer, student)
    assert all(value.isnan() for value in distances.compute())
    assert distances.error is None


def test_an_error_is_stored_and_the_forward_goes_on(student: nn.Module, transfer: RepresentationTransfer) -> None:
    distances = ValidationDistances(transfer, student)
    x = torch.full((4, 1, 8, 8), torch.nan)
    with torch.no_grad():
        assert student(x).shape == (4, 3)
    assert "NaN or infinite" in str(distances.error)
    before = [metric.update_count for metric in distances.metrics]
    validate(student)
    assert [metric.update_count for metric in distances.metrics] == before, "the recording has stopped"


def test_a_failed_forward_records_nothing(student: nn.Module, transfer: RepresentationTransfer) -> None:
    distances = ValidationDistances(transfer, student)
    with student.head.register_forward_pre_hook(lambda *_: 1 / 0), torch.no_grad(), pytest.raises(ZeroDivisionError):
        student(torch.zeros(4, 1, 8, 8))
    assert distances.error is None
    validate(student)
    assert [metric.update_count for metric in distances.metrics] == [8, 8]


def test_a_plan_that_is_not_found_is_nan(
    student: nn.Module, transfer: RepresentationTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = ValidationDistances(transfer, student)
    validate(student)

    def fail() -> None:
        raise RuntimeError("did not converge")

    monkeypatch.setattr(distances.metrics[0], "compute", fail)
    first, second = distances.compute()
    assert first.isnan()
    assert second.isfinite()
    assert str(distances.error) == "did not converge"


@pytest.mark.parametrize("plan", ["random", "random_orthogonal"])
def test_each_pair_has_the_random_plan_that_it_is_trained_with(student: nn.Module, plan: str) -> None:
    transfer = RepresentationTransfer(make_teacher(), LAYERS, plan=plan, seed=3, memory=0, solve_every=1)
    x = next(iter(loader()))[0]
    student.eval()
    with transfer.attached(student):
        student(x)
        transfer.loss()
        trained = torch.stack([distance.value for distance in transfer.distances])
        distances = ValidationDistances(transfer, student)
        with torch.no_grad():
            student(x)
        found = distances.compute()
        distances.close()
        transfer.discard()
    torch.testing.assert_close(torch.stack(found).to(trained), trained, rtol=1e-4, atol=1e-5)
