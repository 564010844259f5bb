"""Orthogonal couplings in the engine: statistics, solves, values and gradients over the calls of a run."""

from __future__ import annotations

import copy
import io
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import OneRank, assert_same_state, call, draw, make
from operations import operations
from packaging.version import Version
from torch import Tensor

from lightning_otrt.steps.coupling import EARLY_SOLVES
from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.global_engine import GlobalTransportEngine
from lightning_otrt.steps.pair_distance import PairDistance
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.transport import orthogonal
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.orthogonal import random_projection
from lightning_otrt.transport.polar import polar_factor

KINDS = ("orthogonal", "covariance", "random_orthogonal")
WIDTHS = ((12, 9), (9, 9), (7, 9))


def standardised(neurons: Tensor, term: str) -> Tensor:
    """Centred, and of unit norm neuron by neuron; with covariances as a whole."""
    centred = neurons - neurons.mean(1, keepdim=True)
    if term == "covariance":
        return centred / centred.norm()
    return centred / centred.norm(dim=1, keepdim=True) / len(centred) ** 0.5


def omega(y: Tensor, x: Tensor, matrix: Tensor, term: str) -> Tensor:
    return 1 - (standardised(y, term) * standardised(matrix @ x, term)).sum()


def test_a_distance_has_a_plan_or_a_rotation() -> None:
    pairs = [draw(6, 9, seed=0, dtype=torch.float64)]
    _, [turned] = make(KINDS[0]).term([pairs], 80)
    assert turned.rotation is turned.matrix
    with pytest.raises(AttributeError, match="no transport plan: use `rotation`"):
        print(turned.plan)
    moved = PairDistance("layer", torch.tensor(0.5), torch.eye(4) / 4, memory=0.0, observations=64)
    assert moved.plan is moved.matrix
    with pytest.raises(AttributeError, match="no rotation: use `plan`"):
        print(moved.rotation)
    none_yet = replace(turned, matrix=None, alignment=None, is_skipped=True)
    assert none_yet.plan is none_yet.rotation is None


@pytest.mark.parametrize("term", KINDS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_term_and_gradient_are_those_of_autograd(term: str, widths: tuple[int, int]) -> None:
    """In calls that solve and in calls that do not, as the mean over two views."""
    engine = make(term, memory=0.9, solve_every=100)
    for number in range(7):
        views = [[draw(*widths, seed=2 * number + view, dtype=torch.float64)] for view in range(2)]
        inputs = [pairs[0][0] for pairs in views]
        found, [distance] = engine.term(views, 80)
        expected = torch.stack([omega(*pairs[0], distance.rotation, term) for pairs in views]).mean()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        gradients = torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("term", KINDS)
def test_matrix_is_solved_from_the_decayed_sums_of_all_calls(term: str) -> None:
    engine, decay = make(term, memory=0.8, solve_every=1), 0.8
    batches = [[side.detach() for side in draw(seed=number, dtype=torch.float64)] for number in range(5)]
    for pair in batches:
        call(engine, (pair[0].clone().requires_grad_(), pair[1]))
    weights = torch.cat([torch.full((40,), decay ** (4 - number), dtype=torch.float64) for number in range(5)])
    y, x = (torch.cat(sides, 1) for sides in zip(*batches, strict=True))
    y, x = (side - (side * weights).sum(1, keepdim=True) / weights.sum() for side in (y, x))
    own, scale = ((side.square() * weights).sum(1).sqrt() for side in (y, x))
    own, scale = (own, scale) if term != "covariance" else (torch.ones_like(own), torch.ones_like(scale))
    cross = (y * weights / own[:, None]) @ (x / scale[:, None]).mT
    q = random_projection(12, 9, seed=0).double() if term == "random_orthogonal" else polar_factor(cross)
    found = engine.states[0].plan.matrix
    # The running products are those of a correlation: it does not matter that they keep fewer digits.
    torch.testing.assert_close(found, q / scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "term"), [("rotated", "covariance"), ("permuted", "orthogonal")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_cost_nothing(kind: str, term: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 60, generator=generator, dtype=torch.float64)
    if kind == "rotated":
        y = 3 * torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0] @ x
    else:
        order = torch.randperm(16, generator=generator)
        y = torch.linspace(0.1, 4, 16, dtype=torch.float64)[:, None] * x[order] - 2
    y, x = y.to(dtype).requires_grad_(), x.to(dtype)
    value = call(make(term), (y, x))
    assert value.abs() <= 1e-6
    value.backward()
    assert y.grad.norm() * y.norm() <= (1e-3 if dtype == torch.float32 else 1e-9)


def solved_calls(engine: TransportEngine, count: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    solved: list[int] = []

    def counted(matrix: Tensor) -> Tensor:
        solved.append(engine.calls)
        return polar_factor(matrix)

    monkeypatch.setattr(orthogonal, "polar_factor", counted)
    for number in range(count):
        call(engine, draw(seed=number), **options)
    return solved


def test_solves_are_those_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert solved_calls(make("orthogonal"), 21, monkeypatch) == [*EARLY_SOLVES, 10, 20]
    engine = make("orthogonal", memory=0.9, solve_every=1)
    call(engine, draw())
    before = copy.deepcopy(engine.state_dict())
    assert solved_calls(engine, 3, monkeypatch, reevaluation=True) == []
    assert_same_state(engine.state_dict(), before)


@pytest.mark.parametrize(("memory", "between", "solving"), [(0.0, 1, 2), (0.9, 2, 2)])
def test_one_product_between_solves(memory: float, between: int, solving: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, pair = make("orthogonal", memory=memory), draw()
    call(engine, pair)
    # The products of the decomposition are no products of neurons.
    monkeypatch.setattr(orthogonal, "polar_factor", torch.ones_like)
    assert operations(lambda: call(engine, pair).backward()).products == solving
    engine.calls = 11
    found = operations(lambda: call(engine, pair).backward())
    assert found.products == between
    slack = 0 if Version(torch.__version__) >= Version("2.9") else 2
    assert sum(found.counts.values()) <= (66 if memory == 0 else 116) + slack


@pytest.mark.parametrize("term", KINDS)
def test_resume_through_a_file(term: str) -> None:
    straight, stopped = (make(term, memory=0.9, solve_every=3) for _ in range(2))
    for number in range(5):
        call(straight, draw(seed=number)), call(stopped, draw(seed=number))
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = make(term, memory=0.9, solve_every=3, seed=0)
    resumed.load_state_dict(torch.load(file, weights_only=True), torch.device("cpu"))
    for number in range(5, 10):
        assert torch.equal(call(straight, draw(seed=number)), call(resumed, draw(seed=number)))
    assert_same_state(resumed.state_dict(), straight.state_dict())


def test_a_first_batch_that_is_not_finite_gives_no_target_and_no_gradient() -> None:
    engine = make("orthogonal", memory=0.9, solve_every=1)
    engine.calls = 1  # the first call would raise
    y, x = draw()
    x[0, 0] = math.nan
    assert not call(engine, (y, x)).isfinite()
    assert not engine.states[0].plan.matrix.any()
    y, x = draw(seed=1)
    value, state = call(engine, (y, x)), engine.states[0]
    assert 0 < value < 1
    assert all(part.isfinite().all() for part in (*state.plan, *state.sums))
    assert int(engine.bad_calls) == 1


@pytest.mark.parametrize("term", ["orthogonal", "covariance"])  # a random projection of another width is another one
@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_dead_neurons_have_no_gradient_and_change_nothing(term: str, memory: float) -> None:
    with_dead, without = make(term, memory=memory), make(term, memory=memory)
    for number in range(4):
        y, x = draw(seed=number, dtype=torch.float64)
        dead_y = torch.cat([y.detach(), torch.full((2, 40), 3.0)]).requires_grad_()
        dead_x = torch.cat([x, torch.zeros(3, 40)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, expected = call(with_dead, (dead_y, dead_x)), call(without, (y, x))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        found.backward(), expected.backward()
        torch.testing.assert_close(dead_y.grad[:12], y.grad, rtol=1e-5, atol=1e-9)
        assert not dead_y.grad[12:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_of_neurons(dtype: torch.dtype) -> None:
    y, x = (side.detach().to(dtype) for side in draw())
    y.requires_grad_()
    value = call(make("orthogonal"), (y, x))
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert y.grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        again = call(make("orthogonal"), (y, x))
    assert torch.equal(value, again)


def test_fewer_samples_than_neurons() -> None:
    """The running correlation has more ranks than a batch, and memory="auto" keeps one."""
    engine = make("orthogonal", memory="auto", solve_every=1)
    for number in range(6):
        y, x = draw(16, 16, observations=4, seed=number)
        call(engine, (y, x))
        rank = int(torch.linalg.matrix_rank(engine.states[0].plan.matrix))
        assert rank == min(3 + 4 * number, 16)
    assert engine.states[0].memory == 0.98


def test_directions() -> None:
    """Over how many directions the agreement spreads: all of an equal copy, one of a student of one direction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(200, 8, generator=generator, dtype=torch.float64))[0].mT
    x = torch.linalg.qr((x - x.mean(1, keepdim=True)).mT)[0].mT
    for y, expected in ((x, 8.0), (x[:1].repeat(8, 1), 1.0)):
        engine = make("orthogonal")
        call(engine, (y.clone().requires_grad_(), x))
        _, [distance] = engine.term([[(y.clone().requires_grad_(), x)]], 200)
        assert distance.alignment.directions.item() == pytest.approx(expected, rel=1e-6)
        spectrum = torch.linalg.svdvals(distance.alignment.correlations)
        assert spectrum.sum().item() == pytest.approx(1 if expected == 8 else 8**-0.5, rel=1e-6)


def test_processes_that_solve_otherwise_take_the_matrix_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unlike devices, say: all parts of the alignment come from process 0."""

    class Unlike(OneRank):
        def have_same(self, tensors: list[Tensor]) -> bool:
            return False

        def broadcast(self, message: Any) -> Any:
            plans, potentials = copy.deepcopy(message)
            return [type(plan)(*(2 * part for part in plan)) for plan in plans], potentials

    settings = TermSettings(get_cost("correlation"), "orthogonal")
    engine = GlobalTransportEngine([("a", "b")], [1.0], settings, ranks=Unlike())
    alone = make("orthogonal")
    with pytest.warns(UserWarning, match="differ in some bits"):
        call(engine, draw())
    call(alone, draw())
    for found, expected in zip(engine.states[0].plan, alone.states[0].plan, strict=True):
        torch.testing.assert_close(found, 2 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("term", KINDS)
def test_advice_does_not_lead_to_the_next_error(term: str) -> None:
    """A rotation takes no other cost, so the advice for too few observations names another plan, too."""
    with pytest.raises(ValueError, match="2 observations.*plan='sinkhorn' with cost='euclidean'"):
        call(make(term), draw(observations=2))
    y, x = draw()
    with pytest.warns(UserWarning, match="is constant over the first batch.*plan='sinkhorn' with cost='euclidean'"):
        call(make(term), (y, torch.full_like(x, 2.0)))
