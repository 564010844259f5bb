"""A forward in evaluation mode changes nothing of the model or of the random numbers."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import hooks
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation, state_restored
from lightning_otrt.reading.tracer import trace


class Noisy(nn.Module):
    """Draws random numbers, keeps statistics, replaces and adds buffers, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.full((2,), torch.nan))
        self.fails = False

    def train(self, mode: bool = True) -> Noisy:
        raise AssertionError("overridden `train` must not be called")

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x.mean((1, 2, 3))
        self.register_buffer("added", torch.ones(()))
        x = self.frozen(self.drop(self.norm(x + torch.randn_like(x))))
        torch.set_grad_enabled(True)
        if self.fails:
            raise RuntimeError("fails on purpose")
        return x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_changes(fails, grad):
    torch.manual_seed(0)
    model = Noisy()
    model.fails = fails
    before = copy.deepcopy(dict(model.named_buffers()))
    objects = dict(model.named_buffers())
    flags = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                trace(model, (torch.ones(2, 3, 4, 4),))
        else:
            trace(model, (torch.ones(2, 3, 4, 4),))
        assert torch.is_grad_enabled() is grad
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before)
    assert all(after[name] is objects[name] for name in before)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(model) == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pending_backward_survives():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 4, 4)
    loss = model(x).square().sum()
    trace(model, (x,))
    loss.backward()
    assert model[0].weight.grad is not None


def test_casts_of_a_trace_are_not_kept():
    """Autocast of torch 2.6 gives a forward with gradient what one without gradient left in its cache."""
    model = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        trace(model, (torch.randn(2, 4),))
        assert model(torch.randn(2, 4)).requires_grad
        assert torch.is_autocast_cache_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_generator_is_forked_too():
    model = Noisy().cuda()
    state = torch.cuda.get_rng_state()
    trace(model, (torch.ones(2, 3, 4, 4, device="cuda"),))
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_buffers_that_are_none_deleted_or_not_persistent():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("empty", None)
            self.register_buffer("gone", torch.ones(2))
            self.register_buffer("hidden", torch.ones(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.empty = torch.zeros(1)
            del self.gone
            self.hidden = None
            self.register_buffer("cache", x, persistent=False)
            return x

    model = Odd()
    before = dict(model.named_buffers())
    with in_evaluation(model):
        model(torch.ones(1))
    assert model.empty is None
    after = dict(model.named_buffers())
    assert set(after) == set(before) == {"gone", "hidden"}
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == ["gone"]
    model(torch.ones(1))  # the buffer that was added can be added once more


def test_state_restored_keeps_mode_and_gradient():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with state_restored(model):
        assert model(torch.randn(4, 2)).requires_grad
        assert model.training
        assert model[1].num_batches_tracked == 1
    assert model[1].num_batches_tracked == 0


def test_what_was_compiled_before_runs_its_new_hooks():
    compiled = torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager")
    compiled(torch.randn(2, 4))
    seen = []
    with in_evaluation(compiled), compiled._orig_mod[0].register_forward_hook(lambda *_: seen.append(1)):
        compiled(torch.randn(2, 4))
    assert seen == [1]
    torch.compiler.reset()


class Drawing(nn.Module):
    """Draws in evaluation mode, too, as LayerDrop of fairseq does."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.net, self.draw = nn.Linear(3, 4), draw

    def forward(self, x: Tensor) -> Tensor:
        self.draw()
        return self.net(x)


DRAWS = {"torch": lambda: torch.rand(1), "NumPy": np.random.rand, "Python": random.random}


def generators() -> list[object]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_generators_after_a_trace(draw):
    model = Drawing(draw)
    before = generators()
    found = trace(model, (torch.ones(2, 3),))
    assert generators() == before
    assert found.draws_random
    # It does nothing with them, as networks whose LayerDrop is for training alone.
    assert not found.is_random


class Jittered(nn.Module):
    """Adds what it draws in one layer, which the next one may undo."""

    def __init__(self, draw, *, undone=False):
        super().__init__()
        self.net, self.head, self.draw, self.undone = nn.Linear(3, 4), nn.Linear(4, 2), draw, undone

    def forward(self, x: Tensor) -> Tensor:
        noise = float(torch.as_tensor(self.draw()).sum())
        y = self.net(x + noise)
        return self.head(torch.zeros_like(y) if self.undone else y)


@pytest.mark.parametrize("undone", [False, True])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_a_layer_computes_from_drawn_numbers_is_random(draw, undone):
    model = Jittered(draw, undone=undone)
    before = generators()
    assert trace(model, (torch.ones(2, 3),)).is_random
    assert generators() == before


@pytest.mark.filterwarnings("ignore:The forward of the:UserWarning")
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_training_draws_what_it_would_draw_without_a_teacher(draw, who):
    """Also the teacher's forward in each step: a run with a tiny weight would else be another run."""
    torch.manual_seed(0)
    nets = [Drawing(draw if who in (side, "both") else lambda: None) for side in ("student", "teacher")]
    drawn = []
    for transfer in (RepresentationTransfer(nets[1], [("net", "net")]), None):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(3)
        with nullcontext() if transfer is None else transfer.attached(nets[0]):
            for _ in range(3):
                nets[0](torch.ones(8, 3) * torch.arange(8.0)[:, None])
                if transfer is not None:
                    transfer.loss()
            drawn.append(generators())
    assert drawn[0] == drawn[1]
