"""A borrowed module is moved and put into evaluation mode once, and exactly what was changed is restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from teacher.networks import Lit, Net, digest, modes
from torch import nn

from lightning_otrt.teacher.frozen.borrowed import BorrowedModule


class Movable(nn.Linear):
    """Notes its moves. The meta device stands for one that this machine may lack; values do not survive on it."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.moves: list[str] = []

    def to(self, device: Any) -> Movable:  # type: ignore[override]
        self.moves.append(str(device))
        return self.to_empty(device=device)


def test_modes_come_back(net: Net) -> None:
    before = modes(net)
    with BorrowedModule(net).in_evaluation_mode():
        assert not any(modes(net).values())
    assert modes(net) == before


def test_modes_are_set_without_eval() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("would merge weights")

    module = Merging(4, 2)
    with BorrowedModule(module).in_evaluation_mode():
        assert not module.training
    assert module.training


def test_one_borrower_inside_another(net: Net) -> None:
    before = modes(net)
    first, second = BorrowedModule(net), BorrowedModule(net)
    with first.in_evaluation_mode():
        with second.in_evaluation_mode():
            assert not any(modes(net).values())
        assert not any(modes(net).values())
    assert modes(net) == before
    assert True in before.values()


def test_moves_once_and_back() -> None:
    net = Movable()
    borrowed = BorrowedModule(net)
    borrowed.move_to("cpu")
    assert net.moves == []
    borrowed.move_to("meta")
    borrowed.move_to(torch.device("meta"))
    assert net.moves == ["meta"]
    net.to_empty(device="cpu")  # the user moves it in between
    borrowed.move_to("meta")
    assert net.moves == ["meta", "meta"]
    borrowed.give_back()
    assert net.moves == ["meta", "meta", "cpu"]
    assert net.weight.device.type == "cpu"
    borrowed.give_back()
    assert len(net.moves) == 3


def test_a_module_that_the_other_borrower_moved_is_not_moved_back() -> None:
    net = Movable()
    first, second = BorrowedModule(net), BorrowedModule(net)
    first.move_to("meta")
    second.move_to("meta")
    second.give_back()
    assert net.moves == ["meta"]
    first.give_back()
    assert net.moves == ["meta", "cpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_tensor_goes_back_to_its_own_gpu_or_cpu(net: Net) -> None:
    before = digest(net)
    net.head.cuda()
    lit = Lit()
    lit.net = net
    borrowed = BorrowedModule(lit)
    borrowed.move_to("cuda")
    assert lit.device.type == "cuda"
    assert {tensor.device.type for tensor in (*net.parameters(), *net.buffers())} == {"cuda"}
    torch.cuda.set_sync_debug_mode("error")
    try:
        with borrowed.in_evaluation_mode():
            pass
        borrowed.move_to("cuda")
        with torch.no_grad():
            lit(torch.ones(5, 4, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    borrowed.give_back()
    assert lit.device.type == "cpu"
    assert {tensor.device.type for tensor in (*net.body.parameters(), *net.body.buffers())} == {"cpu"}
    assert net.head.weight.device.type == "cuda"
    assert digest(net.cpu()) == before


@pytest.mark.parametrize("where", ["", "inner"])
def test_a_part_that_is_replaced_in_a_run_is_in_evaluation_mode_too(where: str) -> None:
    net = nn.ModuleDict({"inner": nn.ModuleDict({"part": nn.Dropout()}), "part": nn.Dropout()})
    borrowed = BorrowedModule(net)
    around = net.get_submodule(where)
    for new in (nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.Embedding(3, 4, max_norm=0.1))):
        with borrowed.in_evaluation_mode():
            assert not any(part.training for part in net.modules())
        old, around["part"] = around["part"], new
        with borrowed.in_evaluation_mode():
            assert not any(part.training for part in net.modules())
            assert old.training
        assert all(part.training for part in net.modules())
    embedding = around["part"][1]
    before = embedding.weight.clone()
    with borrowed.in_evaluation_mode():
        embedding(torch.tensor([0, 1, 2]))
    assert torch.equal(embedding.weight, before)
    borrowed.give_back()
    embedding(torch.tensor([0, 1, 2]))
    assert not torch.equal(embedding.weight, before)
