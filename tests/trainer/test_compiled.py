"""Compiled tasks, networks and layers train as others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    Net,
    Task,
    ValidatedTask,
    assert_agree,
    hooks,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    seeded,
    weights,
)
from old_versions import needs_one_graph
from torch import Tensor
from torch.nn import functional as F
from trainer.contexts import CONTEXTS, EXACT, Context, by_hand, by_name, without

from lightning_otrt import LinearWarmup, OTRTCallback, OTRTModule, RepresentationTransfer


def whole(task: Any, **how: Any) -> Any:
    return torch.compile(task, **how)


def submodule(task: Any, **how: Any) -> Any:
    task.net = torch.compile(task.net, **how)
    return task


def submodule_in_place(task: Any, **how: Any) -> Any:
    task.net.compile(**how)
    return task


def layer(task: Any, **how: Any) -> Any:
    task.net.block1 = torch.compile(task.net.block1, **how)
    return task


def layer_in_place(task: Any, **how: Any) -> Any:
    task.net.block1.compile(**how)
    return task


def task_in_place(task: Any, **how: Any) -> Any:
    task.compile(**how)
    return task


def step_alone(task: Any, **how: Any) -> Any:
    task.training_step = torch.compile(task.training_step, **how)
    return task


class Called(Task):
    """Calls itself, as LightningModules with a forward do."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


#: The fits that compiled ones are compared with.
CALLED, NOT_CALLED = Context(Called), Context()

SOME_COMPILED = [
    pytest.param(how, marks=[] if how in (whole, submodule, submodule_in_place) else [pytest.mark.slow])
    for how in (whole, submodule, submodule_in_place, layer, layer_in_place, task_in_place, step_alone)
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("way", ["callback", pytest.param("wrapper", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("compiled", SOME_COMPILED)
def test_compiled(compiled, ran_before, way):
    """Hooks put on code that ran compiled before would never fire, silently."""
    context = CALLED
    task = context.make()
    fitted = task if way == "callback" else OTRTModule(task, make_teacher(), **EXACT)
    fitted = compiled(fitted, backend="eager")
    if ran_before:
        before = weights(task)
        task.net(next(iter(loader()))[0]).sum().backward()
        with torch.no_grad():
            task(next(iter(loader()))[0])
        task.zero_grad()
        task.load_state_dict(before)
    context.fit(fitted, callbacks=[OTRTCallback(make_teacher(), **EXACT)] if way == "callback" else [])
    assert_agree(by_name(weights(task)), by_hand(context), without(context))
    assert not hooks(task)


@needs_one_graph
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [submodule, pytest.param(layer_in_place, marks=pytest.mark.slow)])
def test_compiled_as_one_graph(compiled):
    context = NOT_CALLED
    task = compiled(context.make(), backend="eager", fullgraph=True)
    context.fit(task, callbacks=[OTRTCallback(make_teacher(), **EXACT)])
    assert_agree(by_name(weights(task)), by_hand(context), without(context))


def stack(width: int) -> torch.nn.Sequential:
    """Layers in a row."""
    torch.manual_seed(width)
    first = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.ReLU())
    return torch.nn.Sequential(first, torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("inside", [True, False], ids=["inside of a task", "itself the student"])
def test_a_compiled_sequential(inside: bool) -> None:
    """Of which Dynamo cannot list the parameters."""
    found = []
    for compiles in (True, False):
        net = stack(8)
        module = torch.compile(net, backend="eager") if compiles else net
        task = module
        if inside:
            task = torch.nn.Module()
            task.net = module
        prefix = "net." if inside else ""
        transfer = RepresentationTransfer(stack(12), {f"{prefix}0": "0", f"{prefix}1": "1"})
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
        with transfer.attached(task):
            for _ in range(2):
                module(x)
                loss = transfer.loss()
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in net.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_longer_fits_compile_no_more():
    """Flags that change from step to step, or between training and validation, would be compiled anew each time."""

    def graphs(steps: int) -> int:
        torch.compiler.reset()
        found: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            found.append(1)
            return graph.forward

        task = make_task(ValidatedTask)
        task.net = torch.compile(task.net, backend=backend)
        callback = OTRTCallback(make_teacher(), **EXACT, schedule=LinearWarmup(100))
        make_trainer(max_steps=steps, callbacks=[callback], val_check_interval=2, num_sanity_val_steps=1).fit(
            task, loader(), loader(16)
        )
        return len(found)

    assert 0 < graphs(5) == graphs(12)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_by_inductor():
    context = CONTEXTS["32-true"]
    task = submodule(context.make())
    context.fit(task, callbacks=[OTRTCallback(make_teacher(), **EXACT)])
    assert_agree(by_name(weights(task)), by_hand(context), without(context), context.tolerance)


@pytest.mark.usefixtures("fresh_compiler")
def test_what_others_compiled_stays_compiled() -> None:
    """A reset throws away all that the process has compiled."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    other = torch.compile(lambda x: x.sin() + 1, backend=backend)
    other(torch.ones(3))
    context = Context()
    context.fit(context.make(), callbacks=[OTRTCallback(make_teacher(), **EXACT)])
    other(torch.ones(3))
    assert len(graphs) == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_function_around_the_student_ran_before() -> None:
    """It cannot be found from the student, and its code has no hooks in it."""
    student, teacher = seeded(0, Net), make_teacher()
    images = next(iter(loader()))[0]
    step = torch.compile(lambda images: student(images).sum(), backend="eager")
    step(images)
    transfer = RepresentationTransfer(teacher)

    def train(steps: int) -> None:
        with transfer.attached(student):
            for _ in range(steps):
                (step(images) + transfer.loss()).backward()

    with pytest.raises(RuntimeError, match=r"compiled and ran before calls it, call `torch.compiler.reset\(\)`"):
        train(2)
    torch.compiler.reset()
    train(3)
    assert transfer.step > 3


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("teacher_in_place", [True, False])
@pytest.mark.parametrize("student_in_place", [True, False])
def test_both_networks_compiled(student_in_place: bool, teacher_in_place: bool) -> None:
    images = next(iter(loader()))[0]
    found = []
    for is_compiled in (False, True):
        networks = seeded(0, Net), make_teacher()
        if is_compiled:
            ways = [submodule_in_place if here else submodule for here in (student_in_place, teacher_in_place)]
            student, teacher = (
                way(torch.nn.ModuleDict({"net": each}), backend="eager").net
                for way, each in zip(ways, networks, strict=True)
            )
        else:
            student, teacher = networks
        with (transfer := RepresentationTransfer(teacher)).attached(student):
            for _ in range(2):
                student(images)
                term = transfer.loss()
                term.backward()
        found.append(term.detach())
        assert all(part.training for part in networks[1].modules())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)
