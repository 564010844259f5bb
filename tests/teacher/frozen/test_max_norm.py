"""A teacher whose embeddings renormalise their weights in the forward keeps them, and gives what it would give."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer, transport_distance
from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.frozen.max_norm import WithoutWrites

IDS = torch.randint(0, 16, (6, 5), generator=torch.Generator().manual_seed(0))


class Words(nn.Module):
    """Words as vectors, and a layer on their mean."""

    def __init__(self, width: int, kind: type[nn.Module] = nn.Embedding, **options: Any) -> None:
        super().__init__()
        self.words, self.mix, self.head = kind(20, width, **options), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.words(ids)
        return self.head(self.mix(found if found.dim() == 2 else found.mean(1)))


OPTIONS = [
    (nn.Embedding, {"max_norm": 1.0}),
    (nn.Embedding, {"max_norm": 0.5, "norm_type": 1.0, "padding_idx": 2}),
    (nn.EmbeddingBag, {"max_norm": 1.0, "mode": "mean"}),
    (nn.EmbeddingBag, {"max_norm": 1.0, "mode": "max", "padding_idx": 3}),
    (nn.EmbeddingBag, {"max_norm": 0.7, "norm_type": 1.0, "mode": "sum"}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_it_gives_what_torch_gives(kind: type[nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Words(8, kind, **options).eval()
    by_torch = copy.deepcopy(net)
    with torch.no_grad():
        expected = by_torch(IDS)
    assert not torch.equal(by_torch.words.weight, net.words.weight)
    before = net.words.weight.clone()
    teacher = Teacher(net)
    teacher.prepare("cpu")
    torch.testing.assert_close(teacher(IDS), expected)
    assert torch.equal(net.words.weight, before)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(copied(IDS), expected)
    teacher.release()
    assert "forward" not in vars(net.words)
    with torch.no_grad():
        net(IDS)
    assert torch.equal(net.words.weight, by_torch.words.weight), "it writes again when it is given back"


@pytest.mark.parametrize("options", [{}, {"teacher_cache": "memory"}, {"distillation": 1.0}])
def test_its_weights_stay(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    teacher, student = Words(12, max_norm=1.0), Words(8)
    before = copy.deepcopy(teacher.state_dict())
    transfer = RepresentationTransfer(
        teacher, {"mix": "mix"}, weight=1.0, plan="exact", memory=0.0, solve_every=1, **options
    )
    with transfer.attached(student):
        for step in range(4):
            student(IDS.roll(step, 0) + step)
            loss = transfer.loss()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    if not options:
        ids = IDS.roll(3, 0) + 3
        rows = before["words.weight"]
        rows = rows * (1 / rows.norm(dim=1, keepdim=True)).clamp(max=1)
        x = teacher.mix(rows[ids].mean(1)).detach()
        y = student.mix(student.words(ids).mean(1)).detach()
        expected = transport_distance(y.detach().T, x.T, plan="exact").value
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_two_borrowers() -> None:
    teacher = Words(12, max_norm=1.0)
    before = teacher.words.weight.clone()
    first, second = (RepresentationTransfer(teacher, {"mix": "mix"}) for _ in range(2))
    student = Words(8)
    with first.attached(student):
        student(IDS)
        with second.attached(student):
            student(IDS)
            second.loss()
        student(IDS)
        first.loss()
    assert torch.equal(teacher.words.weight, before)
    assert "forward" not in vars(teacher.words)


def test_a_forward_of_its_own_stays() -> None:
    class Own(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    net = nn.Sequential(Own(4, 2, max_norm=1.0))
    writes = WithoutWrites(net)
    writes.stop()
    assert "forward" not in vars(net[0])
    writes.allow()


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_an_owner_who_trains_it_meanwhile(kind: type[nn.Module], options: dict[str, Any]) -> None:
    """As in mutual learning: the same weights to the last bit as without the transfer."""

    def trained(transfer: bool) -> Tensor:
        torch.manual_seed(0)
        net, student = Words(8, kind, **options), Words(6)
        optimizer = torch.optim.SGD(net.parameters(), 0.5)
        term = RepresentationTransfer(net, {"mix": "mix"}) if transfer else None
        with nullcontext() if term is None else term.attached(student):
            for step in range(3):
                if term is not None:
                    student(IDS)
                    term.loss()
                optimizer.zero_grad()
                net(IDS.roll(step, 0)).square().mean().backward()
                optimizer.step()
        return net.words.weight.detach()

    assert torch.equal(trained(True), trained(False))


@pytest.mark.parametrize("options", [{}, {"teacher_cache": "memory"}])
def test_an_owner_who_calls_a_frozen_one_in_training_mode(options: dict[str, Any]) -> None:
    """As where a LightningModule that holds it goes to training mode."""
    teacher, student = Words(12, max_norm=1.0).requires_grad_(False), Words(8)
    before = teacher.words.weight.clone()
    transfer = RepresentationTransfer(teacher, {"mix": "mix"}, **options)
    with transfer.attached(student):
        for _ in range(2):
            student(IDS)
            transfer.loss()
            teacher.train()(IDS)
    assert torch.equal(teacher.words.weight, before)
