"""`plan="orthogonal"` in fits: the three ways in, the settings of a Trainer, and a loss by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    Net,
    Task,
    ValidatedTask,
    assert_same,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    weights,
)
from torch import Tensor, nn

from lightning_otrt import OTRTCallback, OTRTModule, OTRTMonitor, RepresentationTransfer, neurons, transport_distance

#: With these a rotation is that of the batch alone, as `transport_distance` finds it.
EXACT: dict[str, Any] = {"layers": LAYERS, "weight": 2.0, "plan": "orthogonal", "memory": 0, "solve_every": 1}
RUNNING: dict[str, Any] = {**EXACT, "memory": 0.9, "solve_every": 3}


class WithLBFGS(Task):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3)


SETTINGS: dict[str, tuple[type[Task], dict[str, Any]]] = {
    "plain": (Task, {}),
    "accumulation": (Task, {"accumulate_grad_batches": 4}),
    "bf16-mixed": (Task, {"precision": "bf16-mixed"}),
    "bf16-true": (Task, {"precision": "bf16-true"}),
    "64-true": (Task, {"precision": "64-true"}),
    "LBFGS": (WithLBFGS, {}),
    "clipping": (Task, {"gradient_clip_val": 0.1}),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, RUNNING) for name in SETTINGS),
        ("plain", EXACT),
        ("accumulation", {**RUNNING, "plan": "random_orthogonal"}),
    ],
)
def test_callback_and_wrapper_are_one(name: str, options: dict[str, Any]) -> None:
    kind, trainer = SETTINGS[name]
    first, second = make_task(kind), make_task(kind)
    callback = OTRTCallback(make_teacher(), **options)
    make_trainer(callbacks=[callback], **trainer).fit(first, loader())
    make_trainer(**trainer).fit(OTRTModule(second, make_teacher(), **options), loader())
    assert_same(weights(first), weights(second))
    plain = make_task(kind)
    make_trainer(**trainer).fit(plain, loader())
    assert any(not torch.equal(value, weights(plain)[key]) for key, value in weights(first).items())


def recorded(model: nn.Module, layer: str, batches: list[Tensor]) -> Tensor:
    """Neurons of a layer over all batches, by a hook of our own."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: seen.append(neurons(output, neuron_axis=1))
    )
    for x in batches:
        model(x)
    hook.remove()
    return torch.cat(seen, 1)


@pytest.mark.parametrize("options", [{}, {"cost": "covariance"}])
def test_a_loss_by_hand_has_the_same_gradients(options: dict[str, Any]) -> None:
    student, teacher = Net().double(), make_teacher().double().eval()
    transfer = RepresentationTransfer(teacher, **{**EXACT, **options, "layers": {"block1": "block1"}})
    for x, _ in list(loader())[:2]:
        with transfer.attached(student):
            student(x.double())
            transfer.loss().backward()
        found = [parameter.grad.clone() for parameter in student.block1.parameters()]
        student.zero_grad()
        sides = [recorded(model, "block1", [x.double()]) for model in (student, teacher)]
        (2.0 * transport_distance(*sides, plan="orthogonal", **options).value).backward()
        expected = [parameter.grad for parameter in student.block1.parameters()]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        student.zero_grad()


def test_validation_distances_are_those_of_the_set() -> None:
    """Of the monitor: over all samples at once, not the mean over batches."""
    task, teacher = make_task(ValidatedTask), make_teacher()
    options = {**RUNNING, "layers": {"net.block2": "block2"}}
    trainer = make_trainer(callbacks=[OTRTCallback(teacher, **options), OTRTMonitor(1, figures=False)], max_epochs=1)
    trainer.fit(task, loader(), loader(24))
    logged = float(trainer.callback_metrics["val/otrt/net.block2"])
    with torch.no_grad():
        batches = [x for x, _ in loader(24)]
        sides = [recorded(model.eval(), "block2", batches).double() for model in (task.net, teacher)]
    assert logged == pytest.approx(float(transport_distance(*sides, plan="orthogonal").value), rel=1e-4)


@pytest.mark.parametrize("plan", ["orthogonal", "random_orthogonal"])
def test_directions_are_logged_of_rotations_that_are_solved(plan: str) -> None:
    """Those of a random projection have no meaning."""
    callback = OTRTCallback(make_teacher(), **{**RUNNING, "plan": plan})
    trainer = make_trainer(callbacks=[callback, OTRTMonitor(every_n_steps=1)], max_steps=2)
    trainer.fit(make_task(), loader())
    logged = [name for name in trainer.callback_metrics if name.startswith("otrt/directions/")]
    assert len(logged) == (2 if plan == "orthogonal" else 0)


@pytest.mark.parametrize("memory", [pytest.param(0, marks=pytest.mark.slow), 0.9])
def test_it_trains(memory: float) -> None:
    """The term falls, and far below that of its control."""
    last = {}
    for plan in ("orthogonal", "random_orthogonal"):
        options = {**RUNNING, "plan": plan, "memory": memory, "weight": 20.0}
        callback = OTRTCallback(make_teacher(), **options)
        task = make_task()
        make_trainer(callbacks=[callback], max_epochs=8).fit(task, loader())
        last[plan] = float(torch.stack([distance.value for distance in callback.transfer.distances]).mean())
    assert last["orthogonal"] < 0.8 * last["random_orthogonal"]
