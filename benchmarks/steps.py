"""Training steps with and without the transfer term: what the term adds to a step, alone and as a difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.problems import neurons
from lightning_otrt import LayerPair, RepresentationTransfer
from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.transport.named_costs import get_cost

#: Outputs of the four stages and what enters the head.
STAGES = ("layer1", "layer2", "layer3", "layer4", "avgpool")


def engine_step(
    shape: tuple[int, int, int],
    cost: str,
    memory: float,
    solve: bool = False,
    device: str = "cpu",
    *,
    plan: str = "sinkhorn",
    cold: bool = False,
    graphs: bool = True,
) -> Callable[[], object]:
    """Forward and backward of the term of one pair, always or never solving its plan.

    ``cold`` forgets the last plan. On a CUDA device later calls are replayed from a graph, unless ``graphs`` is false.
    """
    y, x = (side.to(device) for side in neurons(shape, "independent"))
    y.requires_grad_()
    settings = TermSettings(get_cost(cost), plan, memory=memory, solve_every=1 if solve else 10**9)
    engine = TransportEngine([("student", "teacher")], [1.0], settings)
    engine.graphs.is_enabled = graphs

    def step() -> None:
        y.grad = None
        if cold:
            engine.states = [PairState()]
        engine.term([[(y, x)]], shape[2])[0].backward()
        # The first calls would solve.
        engine.calls = 9

    step()
    return step


class _CorrelationByHand(torch.autograd.Function):
    """The closed form of the correlation cost for live neurons, and nothing else: no checks, no engine.

    ``running`` are the moments of a running cost: two reference points, the sums of products of deviations from them,
    and for each side its sums and squares. They are fed from the centred neurons that the value needs anyway.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, plan: Tensor, decay: float, running: Sequence[Tensor]) -> Tensor:
        mean_y, mean_x = y.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
        y, x = y - mean_y, x - mean_x
        norm_y, norm_x = (torch.linalg.vector_norm(side, dim=-1) for side in (y, x))
        if running:
            reference_y, reference_x, products, moments_y, moments_x = running
            shift_y, shift_x = mean_y - reference_y, mean_x - reference_x
            products.addmm_(y, x.mT, beta=decay).addmm_(shift_y, shift_x.mT, alpha=y.shape[-1])
            for moments, shift, norm in ((moments_y, shift_y, norm_y), (moments_x, shift_x, norm_x)):
                shift = shift.squeeze(-1)
                squares = torch.addcmul(norm * norm, shift, shift, value=y.shape[-1])
                moments.mul_(decay).add_(torch.stack((shift * y.shape[-1], squares)))
        inverse_y, inverse_x = norm_y.reciprocal_(), norm_x.reciprocal_()
        z = plan @ x.mul_(inverse_x[:, None])
        products = torch.linalg.vecdot(y, z).mul_(inverse_y)
        along = products * inverse_y * inverse_y
        ctx.save_for_backward(z.mul_(-inverse_y[:, None]).addcmul_(y, along[:, None]))
        return plan.sum() - products.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


def correlation_by_hand(shape: tuple[int, int, int], memory: float) -> Callable[[], object]:
    """A step between solves in as few PyTorch operations as it takes: the floor of :func:`engine_step`."""
    y, x = neurons(shape, "independent")
    y.requires_grad_()
    plan = torch.rand(shape[:2]) / (shape[0] * shape[1])
    running: list[Tensor] = []
    if memory:
        means = [side.detach().mean(-1, keepdim=True) for side in (y, x)]
        running = [*means, torch.zeros(shape[:2]), torch.zeros(2, shape[0]), torch.zeros(2, shape[1])]

    def step() -> None:
        y.grad = None
        _CorrelationByHand.apply(y, x, plan, memory, running).backward()

    return step


def resnet18_cifar() -> nn.Module:
    """ResNet-18 with the stem for 32 × 32 images: stride 1 and no pooling."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Steps:
    """One training step of a network in three forms: task alone with a teacher forward, with the term, and the term.

    Args:
        build: Makes a network with the layers :data:`STAGES`.
        images: A batch of images.
        context: Autocast, or nothing.
        solve_every: Calls between two solves.
        graphs: Whether calls on a CUDA device are captured.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        images: Tensor,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        solve_every: int = 10,
        *,
        graphs: bool = True,
    ) -> None:
        device = images.device
        self.images, self.labels = images, torch.randint(10, images.shape[:1], device=device)
        self.teacher, self.student = build().to(device).eval().requires_grad_(False), build().to(device)
        self.context = context
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-3)
        layers = {stage: stage for stage in STAGES}
        self.transfer = RepresentationTransfer(self.teacher, layers, weight=1.0, solve_every=solve_every)
        self.transfer.cuda_graphs = graphs

    def task(self) -> None:
        """Forward of the teacher; forward, backward and update of the student. While attached, hooks do nothing."""
        with self.context(), self.transfer.paused():
            with torch.no_grad():
                self.teacher(self.images)
            loss = functional.cross_entropy(self.student(self.images), self.labels)
        self._update(loss)

    def whole(self) -> None:
        """The same with the term, whose hooks run the teacher; inside ``transfer.attached(student)``."""
        with self.context():
            loss = functional.cross_entropy(self.student(self.images), self.labels) + self.transfer.loss()
        self._update(loss)

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the stages of student and teacher give."""
        found: list[list[Tensor]] = []
        for model in (self.student, self.teacher):
            kept: list[Tensor] = []
            handles = [
                getattr(model, stage).register_forward_hook(lambda *call, kept=kept: kept.append(call[2].detach()))
                for stage in STAGES
            ]
            with self.context(), torch.no_grad():
                model(self.images)
            for handle in handles:
                handle.remove()
            found.append(kept)
        return found[0], found[1]


class _Give(nn.Module):
    def __init__(self, output: Tensor, trained: bool) -> None:
        super().__init__()
        self.output = nn.Parameter(output.clone(), requires_grad=trained)
        if trained:
            # Adding to a gradient that is there costs what it costs where the task's gradient arrives.
            self.output.grad = torch.zeros_like(output)

    def forward(self, images: Tensor) -> Tensor:
        return self.output


class _Stages(nn.Module):
    """A network whose stages cost nothing: they give stored outputs."""

    def __init__(self, outputs: Sequence[Tensor], trained: bool) -> None:
        super().__init__()
        for stage, output in zip(STAGES, outputs, strict=True):
            self.add_module(stage, _Give(output, trained))

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.children():
            images = stage(images)
        return images


class TermAlone:
    """Everything that the term adds to a step, and nothing else: hooks, pooling, cost, plan, value and gradients.

    Args:
        steps: Whose stages it stands for.
        solve_every: Calls between two solves.
    """

    def __init__(self, steps: Steps, solve_every: int = 10) -> None:
        student, teacher = steps.outputs()
        self.images = steps.images[:, :1, :1, :1]
        self.student = _Stages(student, trained=True)
        pairs = [LayerPair(stage, stage, neuron_axis=1) for stage in STAGES]
        self.transfer = RepresentationTransfer(_Stages(teacher, trained=False), pairs, solve_every=solve_every)
        self.transfer.cuda_graphs = steps.transfer.cuda_graphs

    def __call__(self) -> None:
        """Forward and backward of the term; inside ``transfer.attached(student)``."""
        self.student(self.images)
        self.transfer.loss().backward()
