"""Wrong inputs of the teacher, values that are not finite, and schedules that give no factor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bad_inputs.bad_costs import negative, without_gradient
from bad_inputs.fits import INF, NAN, Fit, batches, check_mistake, in_all_ways, named
from helpers import Task, make_task, make_teacher
from torch import nn


def spoilt(name: str, value: float) -> Callable[[Task], nn.Module]:
    """A teacher with one bad parameter."""

    def build(task: Task) -> nn.Module:
        teacher = make_teacher()
        teacher.get_parameter(name).data.fill_(value)
        return teacher

    return build


def spoilt_task() -> Task:
    task = make_task()
    task.net.block2[0].weight.data.fill_(NAN)
    return task


MISTAKES = [
    # Inputs of the teacher
    Fit(
        "fewer samples for the teacher",
        ValueError,
        ("'net.block1' -> 'block1'", "batch sizes differ", "(8, 4, 4, 4)", "(4, 6, 4, 4)", "Check `teacher_inputs`"),
        options={"teacher_inputs": lambda x: x[:4]},
    ),
    Fit("adapter of nothing", TypeError, ("`teacher_inputs`", "NoneType"), options={"teacher_inputs": lambda x: None}),
    Fit("adapter of a list", TypeError, ("list", "in a tuple, `(images,)`"), options={"teacher_inputs": lambda x: [x]}),
    Fit(
        "inputs that the teacher cannot take",
        RuntimeError,
        ("The teacher (Net) failed on (float32 (8, 64))", "from the inputs of 'net'", "conv2d", "`teacher_inputs`"),
        options={"teacher_inputs": lambda x: x.flatten(1)},
    ),
    Fit(
        "root that gets features",
        RuntimeError,
        ("(float32 (8, 4, 4, 4)), from the inputs of 'net.block2' of the student (Task)", "`student_root`"),
        layers=named("net.block2", "block2"),
        options={"student_root": "net.block2"},
    ),
    # Values
    Fit(
        "batch of one for vectors",
        ValueError,
        (
            "'net.dropout:input' -> 'dropout:input' has 1 observations",
            "needs at least 3",
            "larger batch",
            "cost='euclidean'",
        ),
        layers="penultimate",
        data=lambda: batches(1, 1),
    ),
    Fit(
        "batch of none",
        ValueError,
        ("'net.block1' -> 'block1' has 0 observations", "needs at least 3", "larger batch"),
        data=lambda: batches(0, 0),
    ),
    Fit(
        "NaN in the teacher",
        ValueError,
        ("Teacher layer 'block2' has 1536 NaN or infinite values of 1536", "Check its inputs and its weights"),
        teacher=spoilt("block2.0.weight", NAN),
    ),
    Fit(
        "infinity in the teacher",
        ValueError,
        ("Teacher layer 'block1' has 768 NaN or infinite values of 768", "(6, 128)"),
        teacher=spoilt("block1.1.bias", INF),
    ),
    Fit(
        "NaN in the student at the start",
        ValueError,
        ("Student layer 'net.block2' has 1024 NaN", "(8, 128)", "Check its inputs and its weights"),
        task=spoilt_task,
    ),
    Fit("negative costs", ValueError, ("not to be negative", "Add a constant"), options={"cost": negative}),
    Fit(
        "cost of NaN",
        ValueError,
        ("NaN or infinite values of 24",),
        options={"cost": lambda y, x: torch.cdist(y, x) * NAN},
    ),
    Fit(
        "cost that stops gradients", ValueError, ("no gradient", "torch operations"), options={"cost": without_gradient}
    ),
    Fit(
        "schedule of nothing",
        ValueError,
        ("`schedule`", "None at step 0", "factor"),
        options={"schedule": lambda s: None},
    ),
    Fit("schedule of NaN", ValueError, ("`schedule`", "nan at step 0"), options={"schedule": lambda s: NAN}),
    Fit("schedule of tensors", ValueError, ("tensor(1.)", "step 0"), options={"schedule": lambda s: torch.tensor(1.0)}),
    Fit("schedule below zero later", ValueError, ("-1 at step 1",), options={"schedule": lambda s: 1 if s < 1 else -1}),
]


@pytest.mark.parametrize(("case", "way"), in_all_ways(MISTAKES))
def test_inputs_and_values(case: Fit, way: str) -> None:
    check_mistake(case, way)
