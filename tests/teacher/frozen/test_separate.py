"""A teacher that shares anything with its student is refused, and the error says what and where."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from teacher.networks import Lit, Net
from torch import nn

from lightning_otrt.teacher.frozen.separate import check_separate


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
        "The teacher is the submodule 'teacher' of the student, so they share weights and modes. Use "
        "copy.deepcopy(teacher) as the teacher, or keep it outside the student."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_separate(net, task)
    with pytest.raises(ValueError, match=r"^The student is the submodule 'net' of the teacher, so they share"):
        check_separate(task, task.net)
    with pytest.raises(ValueError, match=r"^The teacher is the submodule '_orig_mod' of the student"):
        check_separate(net, torch.compile(net))


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
