"""Plain PyTorch: forwards, losses and attachments in a wrong order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_inputs.fits import KEPT, Error
from bad_inputs.messages import assert_message, collected_warnings
from helpers import Net, hooks, make_teacher, seeded
from torch import nn

from lightning_otrt import RepresentationTransfer

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(6))


def plain(**options: Any) -> RepresentationTransfer:
    KEPT.append(RepresentationTransfer(make_teacher(), **{"layers": {"block1": "block1"}, **options}))
    return KEPT[-1]


def calls(*steps: Callable[[RepresentationTransfer, nn.Module], Any], **options: Any) -> None:
    transfer, student = plain(**options), seeded(0, Net)
    with transfer.attached(student):
        for step in steps:
            step(transfer, student)


def twice_differentiated(transfer: RepresentationTransfer, student: nn.Module) -> None:
    student(IMAGES)
    parameters = list(student.block1.parameters())
    gradients = torch.autograd.grad(transfer.loss(), parameters, create_graph=True)
    sum(gradient.square().sum() for gradient in gradients).backward()


def two_students() -> None:
    transfer, student, other = plain(), seeded(0, Net, 4), seeded(0, Net, 5)
    with transfer.attached(student):
        one_step(transfer, student)
    with transfer.attached(other), pytest.warns(UserWarning, match="another one than the transfer had before"):
        one_step(transfer, other)


def other_state(transfer: RepresentationTransfer, student: nn.Module) -> None:
    first, same = plain(layers={"block2": "block2"}), seeded(0, Net)
    with first.attached(same):
        one_step(first, same)
    transfer.load_state_dict(first.state_dict())


def one_step(transfer: RepresentationTransfer, student: Any) -> None:
    student(IMAGES)
    transfer.loss()


def forward(transfer: RepresentationTransfer, student: nn.Module) -> None:
    student(IMAGES)


def forward_without_gradient(transfer: RepresentationTransfer, student: nn.Module) -> None:
    with torch.no_grad():
        student(IMAGES)


def loss(transfer: RepresentationTransfer, student: nn.Module) -> None:
    transfer.loss()


def attach(transfer: RepresentationTransfer, student: nn.Module) -> None:
    transfer.attach(student)


ORDERS: list[tuple[str, Callable[[], Any], Error, tuple[str, ...]]] = [
    (
        "loss outside",
        lambda: plain().loss(),
        RuntimeError,
        ("`loss` needs an attached student", "transfer.attached(student)"),
    ),
    (
        "loss before forward",
        lambda: calls(loss),
        RuntimeError,
        ("No forward", "student (Net)", "layers={'block1': 'block1'}"),
    ),
    (
        "loss twice",
        lambda: calls(one_step, loss),
        RuntimeError,
        ("not called with gradient since the last call", "once per loss"),
    ),
    ("loss of no_grad", lambda: calls(forward_without_gradient, loss), RuntimeError, ("No forward", "with gradient")),
    (
        "attached twice",
        lambda: calls(attach),
        RuntimeError,
        ("attached already", "Detach it first, or use another one"),
    ),
    ("attached to nothing", lambda: plain().attach(None), TypeError, ("student to be a torch.nn.Module", "NoneType")),
    (
        "second derivative",
        lambda: calls(twice_differentiated),
        RuntimeError,
        ("differentiated only once", "gradient penalty"),
    ),
    (
        "another student",
        two_students,
        ValueError,
        ("'block1' -> 'block1' has 5 student and 6 teacher neurons", "the shape (4, 6)", "`reset()`"),
    ),
    (
        "state of other layers",
        lambda: calls(other_state, one_step),
        ValueError,
        (
            "saved with the layer pairs [('block2', 'block2')]",
            "[('block1', 'block1')]",
            "Resume with the same `layers`",
        ),
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), [case[1:] for case in ORDERS], ids=[case[0] for case in ORDERS])
def test_orders_of_calls(make: Callable[[], Any], error: Error, words: tuple[str, ...]) -> None:
    with pytest.raises(error) as raised:
        make()
    assert_message(raised.value, words)
    assert not any(hooks(transfer.teacher.module) or transfer.is_attached for transfer in KEPT)
    calls(one_step, one_step)


def test_a_loss_that_is_never_asked_for() -> None:
    with collected_warnings() as messages:
        calls(forward, forward)
    [message] = messages
    assert_message(
        message, ("2 forwards of the student were recorded", "`loss` was never called", "Add `transfer.loss()`")
    )
