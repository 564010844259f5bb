"""A teacher that shares anything with its student is refused, and the error says what and where."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from teacher.networks import Lit, Net
from torch import nn

from lightning_otrt.teacher.frozen.separate import check_separate

OUTSIDE = (
    "keep it where the student does not register it: in a list, as self.momentum = [encoder], or by "
    "object.__setattr__(self, 'momentum', encoder). Move it to self.device in on_fit_start, and save and load it in "
    "on_save_checkpoint and on_load_checkpoint. A deep copy would not follow its updates."
)


def test_independent_networks(net: Net) -> None:
    check_separate(net, copy.deepcopy(net))


def test_same_object(net: Net) -> None:
    expected = (
        "The teacher is the student itself: it would change with it, and the term would stay 0. For a student that "
        "starts as its teacher use copy.deepcopy(student) as the teacher."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_separate(net, net)


def test_one_inside_the_other(net: Net) -> None:
    task = Lit()
    task.teacher = net
    expected = (
        "The teacher is the submodule 'teacher' of the student (Lit): training would change both. Use "
        "copy.deepcopy(teacher) as the teacher, which stays as it is now. For a momentum encoder: freeze it, and "
        f"{OUTSIDE}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_separate(net, task)
    expected = (
        "The student is the submodule 'net' of the teacher (Lit): training would change both. Use "
        "copy.deepcopy(teacher) as the teacher."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_separate(task, task.net)
    with pytest.raises(ValueError, match=r"^The teacher is the submodule '_orig_mod' of the student .* would change"):
        check_separate(net.requires_grad_(False), torch.compile(net))


@pytest.mark.parametrize("name", ["momentum", "net.momentum"])
def test_a_momentum_encoder_inside_of_the_student(net: Net, name: str) -> None:
    """It shares nothing with what is trained, and a copy of it would not follow its updates."""
    task, (around, _, last) = Lit(), name.rpartition(".")
    setattr(task.get_submodule(around), last, net.requires_grad_(False))
    expected = (
        f"The teacher is the submodule '{name}' of the student (Lit). It shares no weights with the rest, but what a "
        "module registers is put into training mode, moved, wrapped and sharded with it, and its checkpoints hold the "
        f"teacher too, while the transfer runs the teacher alone. So {OUTSIDE} It is right for a part that is never "
        "updated, such as a frozen backbone."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_separate(net, task)
    for key in ("momentum", "hidden"):  # what the error says helps
        held = Lit()
        if key == "momentum":
            held.momentum = [net]
        else:
            object.__setattr__(held, key, net)
        check_separate(net, held)


@pytest.mark.parametrize("shared", ["parameter", "buffer", "view"])
def test_a_frozen_part_that_shares_weights_with_the_rest(net: Net, shared: str) -> None:
    task = Lit()
    task.teacher = net.requires_grad_(False)
    if shared == "parameter":
        task.net.head.bias = net.head.bias
    elif shared == "buffer":
        task.net.body[1].running_mean = net.body[1].running_mean
    else:
        task.net.head.bias = nn.Parameter(net.head.bias.detach())
    with pytest.raises(
        ValueError, match=r"^The teacher is the submodule 'teacher' .* training would change both\. Use"
    ):
        check_separate(net, task)


def test_shared_parameter(net: Net) -> None:
    task = Lit()
    task.net.head = net.head
    expected = (
        "The teacher shares 'head.weight' with the student, where it is 'net.head.weight': training would change "
        "both. Use copy.deepcopy(teacher) as the teacher."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_separate(net, task)


def test_shared_memory_and_buffers(net: Net) -> None:
    student = Net()
    student.head.bias = nn.Parameter(net.head.bias.detach())
    with pytest.raises(ValueError, match=r"shares 'head\.bias' with the student, where it is 'head\.bias'"):
        check_separate(net, student)
    student = Net()
    student.body[1].running_mean = net.body[1].running_mean
    with pytest.raises(ValueError, match=r"shares 'body\.1\.running_mean' with the student"):
        check_separate(net, student)


def test_no_values() -> None:
    with torch.device("meta"):
        empty = Net()
    expected = "'body.0.weight' of the teacher is on the meta device: materialise the teacher first, with its weights."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_separate(empty, Net())
    with pytest.raises(ValueError, match=r"^'weight' of the teacher is not initialised: materialise the teacher first"):
        check_separate(nn.LazyLinear(2), Net())


def test_students_without_values_and_sparse_buffers(net: Net) -> None:
    with torch.device("meta"):
        check_separate(net, Net())
    net.register_buffer("adjacency", torch.eye(3).to_sparse())
    check_separate(net, nn.Sequential(nn.LazyLinear(2), nn.Identity()))
