"""Forward and backward of one transport distance by this package and by others, each tuned to the same accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import ot
import torch
from geomloss import SamplesLoss
from geomloss.ot import solve_batch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.problems import EPSILON, Problem
from lightning_otrt import transport_distance
from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.transport.diagnostics import diagnose

#: What a method returns: its value and the gradient for the student neurons.
Solve = Callable[[], tuple[Tensor, Tensor]]
#: Relative error of the value that every method is tuned to.
ACCURACY = 0.01
#: Marginal error and gradient cosine that this package is held to as well.
MARGINAL, COSINE = 3e-2, 0.985
#: How tables name this package.
OURS = "lightning_otrt"


@dataclass(frozen=True)
class Tuned:
    """A method at its fastest setting that is accurate enough.

    Attributes:
        name: The method.
        solve: Forward and backward.
        setting: What was chosen.
        error: Relative error of its value.
        accurate: Whether that is within 1 %, and for this package the other two are within their limits.
        marginal: For this package, the marginal error of its plan.
        cosine: For this package, of its gradient to that of the converged plan at the same ε.
    """

    name: str
    solve: Solve
    setting: str
    error: float
    accurate: bool
    marginal: float | None = None
    cosine: float | None = None


def ours(problem: Problem, epsilon: float = EPSILON) -> tuple[Solve, TransportEngine]:
    """A cold solve in a training step: no plan, no potentials, no statistics."""
    engine = TransportEngine([("student", "teacher")], [1.0], TermSettings(problem.rule, epsilon=epsilon))

    def solve() -> tuple[Tensor, Tensor]:
        engine.reset()
        return _with_backward(problem, lambda y: engine.term([[(y, problem.x)]], problem.shape[2])[0])

    return solve, engine


def tune_ours(problem: Problem) -> Tuned:
    """The largest ε at which value, marginal error and gradient are all accurate; rivals answer for the value alone."""
    best: Tuned | None = None
    for epsilon in (0.01, 0.0075, 0.005, 0.003):
        solve, engine = ours(problem, epsilon)
        value, gradient = solve()
        plan = engine.states[0].plan
        assert plan is not None
        marginal = diagnose(plan.matrix).teacher_error.item()
        cosine, error = problem.cosine(gradient, epsilon), problem.error(value)
        accurate = error <= ACCURACY and marginal <= MARGINAL and cosine >= COSINE
        found = Tuned(OURS, solve, f"epsilon = {epsilon}", error, accurate, marginal, cosine)
        if accurate:
            return found
        best = found if best is None or error < best.error else best
    assert best is not None
    return best


def ours_public(problem: Problem, epsilon: float = EPSILON) -> Solve:
    """``transport_distance``, which iterates until it has converged and checks its arguments."""

    def value(y: Tensor) -> Tensor:
        return transport_distance(y, problem.x, cost=problem.cost, epsilon=epsilon).value

    return lambda: _with_backward(problem, value)


def tune_samples_loss(problem: Problem, debias: bool) -> Tuned:
    """``geomloss.SamplesLoss``: the largest blur that is accurate, then the coarsest annealing that stays so."""
    name = f"SamplesLoss(debias={debias})"
    power = 1 if problem.cost == "euclidean" else 2
    mean = torch.cdist(*_points(problem, problem.y, problem.x)).pow(power).mean().item()

    def at(blur: float, scaling: float) -> tuple[str, Solve]:
        width = (blur * mean) ** (1 / power)
        loss = SamplesLoss("sinkhorn", p=power, blur=width, scaling=scaling, debias=debias, backend="tensorized")
        setting = f"blur^p = {blur:g} mean, scaling = {scaling}"
        return setting, lambda: _with_backward(
            problem, lambda y: _unit(problem) * loss(*_points(problem, y, problem.x))
        )

    blurs = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0005, 0.0002, 0.0001, 0.00005, 0.00002)
    found = next((blur for blur in blurs if problem.error(at(blur, 0.5)[1]()[0]) <= ACCURACY), blurs[-1])
    return tune(problem, name, (at(found, scaling) for scaling in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)))


def geomloss_batch(problem: Problem, iterations: int, epsilon: float = EPSILON) -> Solve:
    """``geomloss.ot.solve_batch`` on a cost by autograd, its plan detached."""

    def value(y: Tensor) -> Tensor:
        cost = _cost(problem, y)
        fixed = cost.detach()
        plan = solve_batch((fixed / fixed.mean())[None], reg=epsilon, max_iter=iterations).plan[0]
        return (plan.detach() * cost).sum()

    return lambda: _with_backward(problem, value)


def pot(problem: Problem, solver: Callable[[Tensor], Tensor]) -> Solve:
    """A plan by POT or scipy on a cost by autograd; ``solver`` gets costs with a mean of 1."""

    def value(y: Tensor) -> Tensor:
        cost = _cost(problem, y)
        fixed = cost.detach()
        return (solver(fixed / fixed.mean()) * cost).sum()

    return lambda: _with_backward(problem, value)


def ott_jax(problem: Problem, epsilon: float, iterations: int) -> Solve:
    """OTT-JAX, compiled beforehand, on arrays of its own."""
    from benchmarks import ott_jax as rival

    square = problem.x.square().mean().item() * problem.shape[2]
    unit = {"correlation": 1.0, "euclidean": square**-0.5, "sqeuclidean": 1 / square}[problem.cost]
    solve = rival.solver(problem.cost, unit, epsilon, iterations)
    y, x = (rival.to_jax(side.numpy()) for side in (problem.y, problem.x))

    def value_and_gradient() -> tuple[Tensor, Tensor]:
        return tuple(torch.from_numpy(np.array(part)) for part in solve(y, x))  # type: ignore[return-value]

    return value_and_gradient


def _pot_sinkhorn(epsilon: float, iterations: int, cost: Tensor) -> Tensor:
    a, b = (cost.new_full((size,), 1 / size) for size in cost.shape)
    return ot.sinkhorn(a, b, cost, epsilon, numItermax=iterations, stopThr=0.0, warn=False, check_marginals=False)


def _pot_batch(epsilon: float, iterations: int, cost: Tensor) -> Tensor:
    solved = ot.batch.solve_batch(
        cost[None], epsilon, max_iter=iterations, tol=0.0, method="log_sinkhorn", grad="detach"
    )
    return solved.plan[0]


def _pot_emd(cost: Tensor) -> Tensor:
    a, b = (cost.new_full((size,), 1 / size) for size in cost.shape)
    return ot.emd(a, b, cost, numItermax=10_000_000)


def _assignment(cost: Tensor) -> Tensor:
    plan = torch.zeros_like(cost)
    plan[linear_sum_assignment(cost.numpy())] = 1 / cost.shape[0]
    return plan


def tune_all(problem: Problem) -> list[Tuned]:
    """This package and every rival, each at its fastest setting that is accurate."""
    grid = [(epsilon, count) for count in (5, 10, 20, 40, 80, 160) for epsilon in (0.02, 0.01, 0.005)]
    methods: dict[str, Iterator[tuple[str, Solve]]] = {
        "transport_distance": ((f"epsilon = {e}", ours_public(problem, e)) for e in (0.01, 0.005, 0.002)),
        "solve_batch, 20 iterations": iter([("reg = 0.01 mean", geomloss_batch(problem, 20))]),
        "solve_batch, tuned": ((_named(e, count), geomloss_batch(problem, count, e)) for e, count in grid),
        "POT sinkhorn": ((_named(e, count), pot(problem, partial(_pot_sinkhorn, e, count))) for e, count in grid),
        "POT ot.batch": ((_named(e, count), pot(problem, partial(_pot_batch, e, count))) for e, count in grid),
        "POT emd": iter([("exact", pot(problem, _pot_emd))]),
    }
    if find_spec("ott"):
        methods["OTT-JAX"] = ((_named(e, count), ott_jax(problem, e, count)) for e, count in grid)
    if problem.shape[0] == problem.shape[1]:
        methods["scipy assignment"] = iter([("exact", pot(problem, _assignment))])
    found = [tune(problem, name, settings) for name, settings in methods.items()]
    return [tune_ours(problem), *(tune_samples_loss(problem, debias) for debias in (False, True)), *found]


def _named(epsilon: float, iterations: int) -> str:
    return f"reg = {epsilon} mean, {iterations} iterations"


def tune(problem: Problem, name: str, settings: Iterator[tuple[str, Solve]]) -> Tuned:
    """The first setting within 1 % of the exact value, or else the most accurate one."""
    best: Tuned | None = None
    for setting, solve in settings:
        value, _ = solve()
        error = problem.error(value)
        found = Tuned(name, solve, setting, error, error <= ACCURACY)
        if found.accurate:
            return found
        if best is None or not best.error <= error:
            best = found
    assert best is not None
    return best


def _with_backward(problem: Problem, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    y = problem.y.detach().requires_grad_()
    result = value(y)
    result.sum().backward()
    assert y.grad is not None
    return result.detach(), y.grad


def _cost(problem: Problem, y: Tensor) -> Tensor:
    points, others = _points(problem, y, problem.x)
    if problem.cost == "correlation":
        return 1 - points @ others.mT
    distance = torch.cdist(points, others)
    return distance * _unit(problem) if problem.cost == "euclidean" else distance.square() * (_unit(problem) / 2)


def _points(problem: Problem, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Points whose distances, or half squared distances, are the cost up to :func:`_unit`."""
    if problem.cost != "correlation":
        return y, x
    y, x = y - y.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    return y / y.norm(dim=-1, keepdim=True), x / x.norm(dim=-1, keepdim=True)


def _unit(problem: Problem) -> float:
    """From (half squared) distances of points to the cost, in units of the teacher's root mean square."""
    square = problem.x.square().mean().item() * problem.shape[2]
    return {"correlation": 1.0, "euclidean": square**-0.5, "sqeuclidean": 2 / square}[problem.cost]
