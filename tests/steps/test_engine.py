"""What a call of the engine solves, remembers and costs: schedules, running costs, counts of work and of memory."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_otrt.steps import coupling as engine_module
from lightning_otrt.steps.coupling import EARLY_SOLVES
from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.global_engine import GlobalTransportEngine
from lightning_otrt.steps.rounds import run_rounds
from lightning_otrt.transport.cost import Plan
from lightning_otrt.transport.diagnostics import diagnose
from lightning_otrt.transport.geomloss_loop import annealing
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.plans import exact_plan
from lightning_otrt.transport.sinkhorn import sinkhorn_plan
from lightning_otrt.transport.tensor_checks import check_finite

COSTS = ("correlation", "euclidean", "sqeuclidean")
#: What waits for the device: reads of values, and shapes that depend on them.
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "equal"}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}


def make(cost: str = "correlation", pairs: int = 1, **options: Any) -> TransportEngine:
    names = [(f"s{index}", f"t{index}") for index in range(pairs)]
    settings = {"plan": "sinkhorn", "epsilon": 0.01, "memory": 0.0, "solve_every": 10, "seed": 0} | options
    return TransportEngine(names, [1 / pairs] * pairs, get_cost(cost), **settings)


def draw(rows: int = 12, columns: int = 9, observations: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y, x = (torch.randn(size, observations, generator=generator) + 0.5 for size in (rows, columns))
    return y.requires_grad_(), x


def call(engine: TransportEngine, *pairs: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    return engine.term([list(pairs)], pairs[0][0].shape[1], **options)[0]


def same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["calls"] == expected["calls"]
    for own, other in zip(found["pairs"], expected["pairs"], strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


class Operations(TorchDispatchMode):
    """Counts operations, and products of two matrices apart from those with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.products = 0
        self.to_host = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        self.counts[name] += 1
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        self.products += name in PRODUCTS and min(tensors[-1].shape[-2:]) > 3
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
            self.to_host += result.device.type == "cpu" and any(tensor.device.type != "cpu" for tensor in tensors)
        return result

    def waits(self) -> int:
        return sum(self.counts[name] for name in WAITS) + self.to_host


def operations(function: Callable[[], object]) -> Operations:
    with Operations() as found:
        function()
    return found


def peak_floats(function: Callable[[], object]) -> float:
    """Most float32 numbers that a function holds beyond those there were, by the profiler's record of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    sizes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(sizes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > 0
    return most / 4


# --- what a call costs -----------------------------------------------------------------------------------------------


def ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the paths of an accelerator, which is never asked for a value."""
    for module in ("transport.correlation", "transport.tensors", "steps.pair_state"):
        monkeypatch.setattr(f"lightning_otrt.{module}.all_nonzero", lambda values: False)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the paths of an accelerator."""
    ask_nothing(monkeypatch)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("solve_every", [1, 10])
def test_nothing_waits_for_the_device(cost: str, memory: float, solve_every: int) -> None:
    engine = make(cost, pairs=2, memory=memory, solve_every=solve_every)
    pairs = draw(), draw(7, 11, seed=1)
    call(engine, *pairs)  # the first call checks its values, and waits
    for _ in range(2 * solve_every):
        found = operations(lambda: call(engine, *pairs).backward())
        assert found.waits() == 0, found.counts


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("dead", [0, 2])
def test_a_cpu_and_a_device_take_paths_to_the_same_numbers(
    cost: str, memory: float, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for asked in (True, False):
        if not asked:
            ask_nothing(monkeypatch)
        engine = make(cost, memory=memory, solve_every=1)
        for step in range(4):
            y, x = draw(seed=step)
            with torch.no_grad():
                y[:dead], x[: dead + 1] = 3.0, -1.0
                if step == 2:
                    x[-1, 0] = torch.nan
            loss = call(engine, (y, x))
            loss.backward()
        found.append((loss.detach(), y.grad, engine.pairs[0].plan.matrix))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_the_first_call_is_known_to_wait() -> None:
    """So that the test above would notice."""
    assert operations(lambda: call(make(), draw())).waits() > 0


@pytest.mark.parametrize(("cost", "memory", "between", "solving"), [
    ("correlation", 0.0, 1, 2),
    ("sqeuclidean", 0.0, 1, 2),
    ("euclidean", 0.0, 2, 2),
    ("correlation", 0.9, 2, 2),
    ("sqeuclidean", 0.9, 2, 2),
    ("euclidean", 0.9, 3, 3),
])  # fmt: skip
def test_number_of_matrix_products(cost: str, memory: float, between: int, solving: int) -> None:
    engine, pair = make(cost, memory=memory), draw()
    call(engine, pair)
    solves = operations(lambda: call(engine, pair).backward())
    engine.calls = 11
    reuses = operations(lambda: call(engine, pair).backward())
    assert reuses.products == between
    # The correlation takes the rank-one terms of its means, of width 3, for no product here.
    assert solves.products == solving


@pytest.mark.parametrize(("start", "limit"), [("cold", 350), ("warm", 100)])
def test_operations_of_an_iteration(start: str, limit: int) -> None:
    cost = torch.rand(2, 24, 20)
    potential = None if start == "cold" else torch.zeros(2, 20)
    counts = [
        sum(operations(lambda n=n: sinkhorn_plan(cost, 0.01, potential=potential, iterations=n)).counts.values())
        for n in (4, 9)
    ]
    assert (counts[1] - counts[0]) / 5 <= 25
    assert counts[0] <= limit


@pytest.mark.parametrize(("cost", "limit"), [("correlation", 60), ("sqeuclidean", 60), ("euclidean", 70)])
def test_operations_of_a_call_between_solves(cost: str, limit: int) -> None:
    engine, pair = make(cost), draw()
    call(engine, pair)
    engine.calls = 11
    # Reductions and copies of older versions are made of more of them.
    slack = 0 if Version(torch.__version__) >= Version("2.9") else 5
    assert sum(operations(lambda: call(engine, pair).backward()).counts.values()) <= limit + slack


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_peak_memory(cost: str, memory: float) -> None:
    # Few observations, so that what is allowed for vectors and neurons cannot hide a matrix.
    rows, columns, observations = 768, 640, 4
    engine, pair = make(cost, memory=memory), draw(rows, columns, observations)
    call(engine, pair).backward()
    matrix, rest = rows * columns, 12 * (rows + columns) * observations
    assert rest < 0.2 * matrix
    solving = peak_floats(lambda: call(engine, pair).backward())
    assert solving <= 3 * matrix + rest
    engine.calls = 11
    assert peak_floats(lambda: call(engine, pair).backward()) <= 1 * matrix + rest


def test_no_graph_over_a_cost_matrix_is_kept() -> None:
    engine, (y, x) = make(), draw(64, 48, 16)
    loss = call(engine, (y, x))
    saved = [tensor.numel() for tensor in loss.grad_fn.saved_tensors]
    assert max(saved) == y.numel() < 64 * 48


# --- the lean value ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("layout", ["rows", "columns", "mixed"])
@pytest.mark.parametrize("kind", ["plain", "dead", "all dead", "constant", "large means", "batch", "near-dead"])
def test_value_alone_is_that_of_rounds(cost: str, layout: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    batch = (3,) if kind == "batch" else ()
    y, x = (torch.randn(*batch, size, 30, generator=generator, dtype=torch.float64) for size in (6, 5))
    plan = torch.rand(*batch, 6, 5, generator=generator, dtype=torch.float64)
    if kind == "dead":
        y[..., 1, :] = x[..., :2, :] = 0
    elif kind == "all dead":
        y, x = y * 0, x * 0
    elif kind == "constant":
        y[..., 1, :], x[..., 2, :] = 0.7, -0.4
    elif kind == "large means":
        y, x = y + 1000, x - 1000
    elif kind == "near-dead":
        y[..., 1, :] *= 1e-5
    if layout != "rows":
        y = y.mT.contiguous().mT
    if layout == "columns":
        x = x.mT.contiguous().mT
    rule = get_cost(cost)
    arguments = y, x, Plan.of(plan), rule.energy(x)
    results = [*run_rounds([rule.shared_value(*arguments)], lambda sums: sums), rule.value(*arguments)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
    if rule.needs_matrix:
        matrix = rule.matrix(rule.sums(y, x), rule.energy(x))
        again = rule.value_of_matrix(y, x, Plan.of(plan), matrix, rule.energy(x))
        torch.testing.assert_close(again, results[0], rtol=1e-9, atol=1e-11)


def test_gradient_has_the_layout_of_the_neurons() -> None:
    """Row operations on two memory layouts are ten times slower."""
    for cost in COSTS:
        y, x = draw()
        turned = y.detach().mT.contiguous().mT.requires_grad_()
        call(make(cost), (turned, x)).backward()
        call(make(cost), (y, x)).backward()
        torch.testing.assert_close(turned.grad, y.grad, rtol=1e-4, atol=1e-8)


# --- when it solves ------------------------------------------------------------------------------------------------


def solved_calls(engine: TransportEngine, count: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    solved: list[int] = []

    def counted(cost: Tensor, *args: Any, **kwargs: Any) -> Any:
        solved.append(engine.calls)
        return sinkhorn_plan(cost, *args, **kwargs)

    monkeypatch.setattr(engine_module, "sinkhorn_plan", counted)
    for number in range(count):
        call(engine, draw(seed=number), **options)
    return solved


def test_solve_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert solved_calls(make(), 41, monkeypatch) == [*EARLY_SOLVES, 10, 20, 30, 40]
    assert solved_calls(make(solve_every=1), 5, monkeypatch) == [0, 1, 2, 3, 4]
    assert solved_calls(make(solve_every=3), 10, monkeypatch) == [0, 1, 2, 3, 4, 6, 8, 9]


def test_reevaluation_keeps_plans_statistics_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(memory=0.9, solve_every=1)
    call(engine, draw())
    before = copy.deepcopy(engine.state_dict())
    assert solved_calls(engine, 3, monkeypatch, reevaluation=True) == []
    same_state(engine.state_dict(), before)


def test_static_plan_is_solved_until_enough_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    # 40 samples a call: the plan is that of the first 280.
    assert solved_calls(make(plan="static"), 12, monkeypatch) == list(range(7))


def test_plan_between_solves_is_that_of_the_last_one() -> None:
    engine = make()
    for number in range(9):
        call(engine, draw(seed=number))
    plan = engine.pairs[0].plan.matrix.clone()
    loss = call(engine, pair := draw(seed=9))
    assert torch.equal(engine.pairs[0].plan.matrix, plan)
    rule = get_cost("correlation")
    matrix = rule.matrix(rule.sums(pair[0].detach(), pair[1]), torch.empty(0))
    torch.testing.assert_close(loss, (plan * matrix).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cloud", ["permuted", "independent"])
@pytest.mark.parametrize("cost", COSTS)
def test_warm_start(cloud: str, cost: str) -> None:
    """From the potential of a student one step before: two iterations, or half as many as from nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 256, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    y = x[torch.randperm(128, generator=generator)] + 0.3 * noise if cloud == "permuted" else noise
    rule = get_cost(cost)
    moved = y + 0.05 * torch.randn(y.shape, generator=generator)
    before, after = (rule.matrix(rule.sums(side, x), rule.energy(x))[None] for side in (y, moved))
    potential = sinkhorn_plan(before, 0.01, iterations=40).potential

    def needed(start: Tensor | None) -> int:
        errors = (sinkhorn_plan(after, 0.01, potential=start, iterations=n).marginal_error.item() for n in range(1, 99))
        return next(n for n, error in enumerate(errors, 1) if error <= 1e-2)

    cold = needed(None) + len(annealing(0.01))
    assert needed(potential) <= (2 if cloud == "permuted" else cold / 2)


def test_training_solve_converges_over_calls() -> None:
    """Clusters, where masses flow far: the iterations of one call are not enough, those of several are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 64, generator=generator)
    y = (torch.randn(96, 64, generator=generator) + 3 * x[torch.arange(96) % 64]).requires_grad_()
    engine, errors = make(solve_every=1, epsilon=0.05), []
    for _ in range(40):
        call(engine, (y, x))
        errors.append(diagnose(engine.pairs[0].plan.matrix).teacher_error.item())
    assert errors[0] > 0.1 > 5 * errors[-1]


@pytest.mark.parametrize("cost", COSTS)
def test_training_plan_is_accurate(cost: str) -> None:
    """A single cold call against the exact value and the converged plan's gradient."""
    y, x = draw(96, 96, 512, seed=4)
    engine = make(cost)
    value = call(engine, (y, x))
    value.backward()
    state, rule = engine.pairs[0], get_cost(cost)
    matrix = rule.matrix(rule.sums(y.detach(), x), rule.energy(x))
    converged = sinkhorn_plan(matrix[None], 0.01).matrix[0]
    _, gradient = rule.value(y.detach(), x, Plan.of(converged), rule.energy(x))
    exact = (exact_plan(matrix[None])[0] * matrix).sum()
    # Of the entropic plan itself the value is up to ε log N of the mean off.
    assert value.item() == pytest.approx(exact.item(), rel=0.02)
    assert torch.cosine_similarity(y.grad.flatten(), gradient.flatten(), 0) >= 0.985
    torch.testing.assert_close(state.plan.matrix.sum(1), state.plan.student_mass, rtol=1e-5, atol=0)
    torch.testing.assert_close(state.plan.matrix.sum(0), state.plan.teacher_mass, rtol=1e-4, atol=1e-8)
    assert (state.plan.teacher_mass - 1 / 96).abs().sum() <= 3e-2


# --- batching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
def test_pairs_of_one_shape_are_solved_at_once(cost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def counted(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(matrix.shape))
        return sinkhorn_plan(matrix, *args, **kwargs)

    monkeypatch.setattr(engine_module, "sinkhorn_plan", counted)
    pairs = [draw(seed=1), draw(7, 9, seed=2), draw(seed=3), draw(150, 150, seed=4), draw(150, 150, seed=5)]
    engine, singles = make(cost, pairs=5), [make(cost) for _ in pairs]
    for calls in range(1, 4):
        total = call(engine, *pairs)
        # Above 128 × 128 a batch does not pay on a CPU.
        assert sorted(shapes) == [(1, 7, 9), (1, 150, 150), (1, 150, 150), (2, 12, 9)]
        values = torch.stack([call(single, pair) for single, pair in zip(singles, pairs, strict=True)])
        torch.testing.assert_close(total, values.mean(), rtol=1e-5, atol=1e-7)
        for state, single in zip(engine.pairs, singles, strict=True):
            torch.testing.assert_close(state.plan.matrix, single.pairs[0].plan.matrix, rtol=1e-3, atol=1e-7)
        assert engine.calls == calls
        shapes.clear()


# --- running cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
def test_running_cost_is_the_weighted_cost_of_all_batches(cost: str) -> None:
    engine, rule, decay = make(cost, memory=0.8), get_cost(cost), 0.8
    batches = [draw(seed=number) for number in range(5)]
    for pair in batches:
        call(engine, pair)
    # Observations weighted by their age: scaled by the root of the weight around the weighted mean.
    weights = torch.cat([torch.full((40,), decay ** (4 - number), dtype=torch.float64) for number in range(5)])
    y, x = (torch.cat([pair[side].detach().double() for pair in batches], 1) for side in (0, 1))
    if cost == "correlation":
        y, x = (side - (side * weights).sum(1, keepdim=True) / weights.sum() for side in (y, x))
        moments = (y * weights) @ x.mT
        norms = [(side.square() * weights).sum(1).sqrt() for side in (y, x)]
        expected = 1 - moments / norms[0][:, None] / norms[1][None]
    else:
        squares = (weights * (y[:, None] - x[None]).square()).sum(-1) / weights.sum()
        expected = squares.sqrt() if cost == "euclidean" else squares
    state = engine.pairs[0]
    found = rule.matrix(state.sums, torch.ones(2)).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_memory_is_chosen_by_the_number_of_samples() -> None:
    for samples, expected in ((8, 0.98), (11, 0.98), (12, 0.0), (40, 0.0)):
        engine = make(memory="auto")
        # Four positions of each: they are observations, but not independent ones.
        engine.term([[draw(observations=4 * samples)]], samples)
        assert engine.pairs[0].memory == expected
        assert (engine.pairs[0].sums is None) == (expected == 0)


def test_plan_of_a_running_cost_is_better_than_that_of_a_small_batch() -> None:
    """Teacher neurons in another order, seen through 4 samples a call: more calls find the order, one cannot."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(24, generator=generator)
    found = {}
    for memory in (0.0, 0.98):
        engine = make(memory=memory, solve_every=1)
        for _ in range(40):
            x = torch.randn(24, 4, generator=generator)
            call(engine, (x[order].clone().requires_grad_(), x + 1.5 * torch.randn(x.shape, generator=generator)))
        found[memory] = engine.pairs[0].plan.matrix[torch.arange(24), order].sum().item()
    assert found[0.98] > 0.9 > 0.5 > found[0.0]


# --- values that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_batch_leaves_no_trace(cost: str, memory: float, side: int, bad: float) -> None:
    engine = make(cost, memory=memory, solve_every=1)
    call(engine, draw(seed=0))
    before = copy.deepcopy(engine.state_dict())["pairs"]
    pair = draw(seed=1)
    pair[side].data[2, 3] = bad
    assert not call(engine, pair).isfinite()
    after = engine.state_dict()["pairs"]
    # A teacher that is finite does tell its scale; a running cost does not know of the batch, and may be solved again.
    for key in ("sums", *(["energy"] if side else []), *([] if memory else ["plan", "potential"])):
        torch.testing.assert_close(after[0][key], before[0][key], rtol=0, atol=0)
    assert engine.bad_calls == 1
    assert call(engine, draw(seed=2)).isfinite()
    assert engine.bad_calls == 1


def test_first_call_names_the_layer() -> None:
    y, x = draw()
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="Teacher layer 't0' has 1 NaN"):
        call(make(), (y, x))


def test_large_values_whose_sum_overflows_are_not_taken_for_infinite() -> None:
    check_finite(torch.full((4, 4), 3e38), "x")
    with pytest.raises(ValueError, match="2 NaN or infinite"):
        check_finite(torch.tensor([1.0, math.inf, math.nan]), "x")


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("factor", "words"), [(1e30, r"e\+30, whose squares overflow"), (1e-30, r"e-30, .* vanish in")]
)
def test_values_whose_squares_leave_the_range_are_refused_by_name(cost: str, factor: float, words: str) -> None:
    y, x = draw()
    with torch.no_grad():
        y *= factor
    with pytest.raises(ValueError, match=rf"Student layer 's0' has values as large as .*{words}"):
        call(make(cost), (y, x))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("scale", [1e-20, 1e-22, 1e-23])
def test_values_whose_squares_nearly_vanish_are_refused(cost: str, scale: float) -> None:
    y, x = draw()
    with pytest.raises(ValueError, match="vanish in"):
        call(make(cost), ((y.detach() * scale).requires_grad_(), x * scale))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("side", [0, 1])
def test_a_later_batch_whose_squares_overflow_is_counted_and_keeps_the_plan(cost: str, side: int) -> None:
    engine = make(cost, solve_every=1)
    call(engine, draw())
    plan = engine.pairs[0].plan.matrix.clone()
    pair = draw(seed=1)
    with torch.no_grad():
        pair[side][1, 2] = 1e25
    assert not call(engine, pair).isfinite()
    assert torch.equal(engine.pairs[0].plan.matrix, plan)
    assert int(engine.bad_calls) == 1


def test_a_plan_that_is_not_finite_is_not_kept() -> None:
    """The mean of such a cost is finite, but one over it is not."""
    rule = get_cost(lambda y, x: torch.cdist(y, x) * 1e-39)
    names, settings = [("s", "t")], ("sinkhorn", 0.01, 0.0, 1, 0)
    engine = TransportEngine(names, [1.0], rule, *settings)
    for seed in range(2):
        call(engine, draw(seed=seed))
        assert engine.pairs[0].plan.matrix.isfinite().all()
        assert engine.pairs[0].potential.isfinite().all()


def test_a_static_plan_starts_cold_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the potential of an earlier, smaller sample it can take longer to converge than it is given."""
    starts = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        starts.append(kwargs["potential"])
        return sinkhorn_plan(*args, **kwargs)

    monkeypatch.setattr(engine_module, "sinkhorn_plan", watched)
    engine = make(plan="static")
    for seed in range(3):
        call(engine, draw(seed=seed))
    assert starts == [None, None, None]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("cost", "factor"), [("sqeuclidean", 100), ("sqeuclidean", 5), ("correlation", 100)])
def test_a_huge_neuron_that_blurs_all_others_is_told(cost: str, factor: float, side: int) -> None:
    """Epsilon is relative to the mean cost, which one neuron can carry alone; correlations know no sizes."""
    pair = draw()
    with torch.no_grad():
        pair[side][0] *= factor
    expected = pytest.warns(UserWarning, match="a single one of its") if factor == 100 else contextlib.nullcontext()
    with contextlib.nullcontext() if cost == "correlation" else expected:
        call(make(cost), pair)


@pytest.mark.parametrize("side", [0, 1])
def test_neurons_overshadowed_by_a_huge_one_are_told(side: int) -> None:
    pair = draw()
    with torch.no_grad():
        pair[side][0] *= 1e6
    with pytest.warns(UserWarning, match=r"layer '[st]0': \d+ of its \d+ neurons vary by less than"):
        call(make(), pair)


@pytest.mark.parametrize("cost", COSTS)
def test_running_cost_over_batches_below_and_above_the_limit_of_float64(
    cost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [draw(observations=count, seed=count) for count in (20, 40, 30, 50, 10)]
    expected = make(cost, memory=0.9, solve_every=1)
    found = make(cost, memory=0.9, solve_every=1)
    for pair in sides:
        call(expected, pair)
    monkeypatch.setattr("lightning_otrt.transport.tensors.FLOAT64_OBSERVATIONS", 35)
    for pair in sides:
        call(found, pair)
    torch.testing.assert_close(
        [part.double() for part in found.pairs[0].sums],
        [part.double() for part in expected.pairs[0].sums],
        rtol=1e-4,
        atol=1e-3,
    )
    torch.testing.assert_close(found.pairs[0].plan.matrix, expected.pairs[0].plan.matrix, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("cost", COSTS)
def test_a_pair_that_begins_with_a_batch_that_is_not_finite_recovers(cost: str) -> None:
    """Its first batch was skipped, so that the check of the first call did not see the second."""
    engine = make(cost, memory=0.98, solve_every=1, strict=False)
    if cost == "correlation":
        with pytest.warns(UserWarning, match="2 observations"):
            call(engine, draw(observations=2))
    else:
        engine.calls = 1
    y, x = draw(seed=1)
    x[0, 0] = math.nan
    call(engine, (y, x))
    for seed in (2, 3):
        call(engine, draw(seed=seed))
    state = engine.pairs[0]
    assert all(part.isfinite().all() for part in (*state.sums, *state.reference))
    assert diagnose(state.plan.matrix).entropy < 0.9


@pytest.mark.parametrize("bad", [math.nan, 1e25])
def test_static_plan_counts_finite_samples_and_then_rests(bad: float) -> None:
    engine = make(plan="static")
    call(engine, draw(observations=100))
    for seed in range(5):
        y, x = draw(observations=100, seed=seed)
        x[0, 0] = bad
        call(engine, (y, x))
    assert engine.pairs[0].samples == 100
    for seed in (6, 7):
        call(engine, draw(observations=100, seed=seed))
    assert engine.pairs[0].samples == 300
    final = engine.pairs[0].plan.matrix.clone()
    after = operations(lambda: call(engine, draw(observations=100, seed=8)).backward())
    assert after.products == 1
    assert torch.equal(engine.pairs[0].plan.matrix, final)


def test_an_interrupted_call_leaves_no_matrix_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [draw(), draw(seed=1)]
    expected, engine = make("euclidean", pairs=2, solve_every=2), make("euclidean", pairs=2, solve_every=2)
    call(expected, *pairs), call(engine, *pairs)
    with monkeypatch.context() as patch:
        patch.setattr(engine.cost, "value_of_matrix", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(engine, *pairs)
    call(expected, *pairs)
    other = [draw(seed=2), draw(seed=3)]
    engine.calls = expected.calls = 3
    torch.testing.assert_close(call(engine, *other), call(expected, *other))


@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("cost", COSTS)
def test_a_run_goes_on_in_another_precision(cost: str, memory: float) -> None:
    engine = make(cost, memory=memory, solve_every=2)
    for seed in range(3):
        call(engine, draw(seed=seed))
    for seed in range(3, 6):
        y, x = (side.detach().double() for side in draw(seed=seed))
        loss = call(engine, (y.requires_grad_(), x))
        loss.backward()
        assert loss.dtype == y.grad.dtype == torch.float64
    assert engine.pairs[0].plan.matrix.dtype == torch.float64


def _rounded_product(bits: int) -> Any:
    """A product of matrices whose factors keep so many bits of their mantissas, as TF32 (10) and bfloat16 (7) do."""

    def rounded(side: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(side)
        return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name().split("::")[1].split(".")[0]
            if name in ("mm", "bmm"):
                args = [rounded(side) for side in args]
            elif name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
                args = [args[0], *(rounded(side) for side in args[1:])]
            return func(*args, **(kwargs or {}))

    return Mode()


@pytest.mark.parametrize(("cost", "limit"), [("correlation", 1e-3), ("sqeuclidean", 1e-3), ("euclidean", 1e-2)])
def test_products_in_tf32_change_little(cost: str, limit: float) -> None:
    """With ``torch.set_float32_matmul_precision("high")``; a distance of matched neurons is the root of the error."""
    for kind in ("permuted", "independent"):
        y, x = draw(64, 64, 512)
        if kind == "permuted":
            y = x[torch.randperm(64, generator=torch.Generator().manual_seed(0))].clone().requires_grad_()
        values, gradients = [], []
        for mode in (contextlib.nullcontext(), _rounded_product(10)):
            engine = make(cost)
            with mode:
                value = call(engine, (y, x))
            values.append(value.item())
            gradients.append(torch.autograd.grad(value, y)[0].flatten())
        assert abs(values[1] - values[0]) <= limit
        if kind == "independent":
            assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_static_plan_has_converged_when_it_rests() -> None:
    """No later solve would improve it, and eight updates are far from the masses of groups of unlike sizes."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(4, 256, generator=generator)
    y = groups[torch.repeat_interleave(torch.tensor([40, 10, 10, 4]))]
    x = groups[torch.repeat_interleave(torch.tensor([16, 16, 16, 16]))]
    y, x = (side + 0.1 * torch.randn(side.shape, generator=generator) for side in (y, x))
    engine = make(plan="static")
    call(engine, (y.requires_grad_(), x))
    assert diagnose(engine.pairs[0].plan.matrix).teacher_error < 0.02


# --- global batch, with one process that says what all say --------------------------------------------------------


class OneRank:
    size, rank = 1, 0

    def sum(self, message: Any) -> Any:
        return copy.deepcopy(message)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def have_same(self, tensors: list[Tensor]) -> bool:
        return True


def resumed_globally(saved: TransportEngine, memory: float | str) -> GlobalTransportEngine:
    settings = {"plan": "sinkhorn", "epsilon": 0.01, "memory": memory, "solve_every": 3, "seed": 0}
    engine = GlobalTransportEngine([("s0", "t0")], [1.0], saved.cost, **settings, ranks=OneRank())
    engine.load_state_dict(saved.state_dict(), torch.device("cpu"))
    return engine


def test_a_bad_batch_after_a_resume_does_not_spoil_the_reference_of_all() -> None:
    saved = make()
    for seed in range(4):
        call(saved, draw(seed=seed))
    engine = resumed_globally(saved, 0.0)
    bad = draw(seed=4)
    bad[1][0, 0] = math.nan
    call(engine, bad)
    assert all(call(engine, draw(seed=seed)).isfinite() for seed in range(5, 12))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("due", [True, False])
def test_a_bad_batch_after_a_resume_does_not_spoil_the_running_sums_of_all(cost: str, due: bool) -> None:
    saved = make(cost)
    for seed in range(3 if due else 4):
        call(saved, draw(seed=seed))
    engine = resumed_globally(saved, 0.98)
    bad = draw(seed=4)
    bad[1][0, 0] = math.nan
    call(engine, bad)
    before = engine.pairs[0].plan.matrix.clone()
    for seed in range(5, 12):
        call(engine, draw(seed=seed))
    assert all(part.isfinite().all() for part in engine.pairs[0].sums)
    assert not torch.equal(engine.pairs[0].plan.matrix, before)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("memory", [0.0, 0.98])
def test_a_global_run_goes_on_in_another_precision(cost: str, memory: float) -> None:
    saved = resumed_globally(make(cost), memory)
    for seed in range(3):
        call(saved, tuple(side.detach().double() for side in draw(seed=seed)))
    engine = resumed_globally(saved, memory)
    for seed in range(3, 10):
        assert call(engine, draw(seed=seed)).isfinite()


@pytest.mark.parametrize(("observations", "chosen"), [(8, 0.98), (40, 0.0)])
def test_auto_chooses_anew_for_all_after_a_resume_with_another_memory(observations: int, chosen: float) -> None:
    saved = make(memory=0.9)
    call(saved, draw(observations=observations))
    engine = resumed_globally(saved, "auto")
    call(engine, draw(observations=observations, seed=1))
    assert engine.pairs[0].memory == chosen


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("cost", COSTS)
def test_resume_goes_on_as_if_it_had_not_stopped(cost: str, memory: float) -> None:
    straight = make(cost, memory=memory, solve_every=3)
    stopped = make(cost, memory=memory, solve_every=3)
    for number in range(5):
        call(straight, draw(seed=number)), call(stopped, draw(seed=number))
    saved = stopped.state_dict()
    before = copy.deepcopy(saved)
    resumed = make(cost, memory=memory, solve_every=3)
    resumed.load_state_dict(saved, torch.device("cpu"))
    for number in range(5, 10):
        expected, found = call(straight, draw(seed=number)), call(resumed, draw(seed=number))
        assert torch.equal(found, expected)
    same_state(saved, before)


@pytest.mark.parametrize(("saved", "given", "used"), [
    (0.9, 0.5, 0.5),
    (0.9, 0.0, 0.0),
    (0.0, 0.9, 0.9),
    (0.9, "auto", 0.0),  # what "auto" chooses here
    ("auto", "auto", 0.0),
])  # fmt: skip
def test_a_resumed_run_takes_the_memory_that_it_is_given(saved: Any, given: Any, used: float) -> None:
    before, after = make(memory=saved), make(memory=given)
    call(before, draw())
    after.load_state_dict(before.state_dict(), torch.device("cpu"))
    call(after, draw(seed=1)).backward()
    assert after.pairs[0].memory == used
    assert (after.pairs[0].sums is not None) == bool(used)


def test_state_is_not_changed_by_later_calls() -> None:
    engine = make(memory=0.9, solve_every=1)
    call(engine, draw())
    state = engine.state_dict()
    before = copy.deepcopy(state)
    call(engine, draw(seed=1))
    same_state(state, before)


@pytest.mark.parametrize("option", [{"cost": "euclidean"}, {"plan": "identity"}, {"plan": "static"}])
def test_state_of_another_cost_or_plan_is_refused(option: dict[str, Any]) -> None:
    """Else a control would go on with the plan of the run before, and sums of one cost would be taken for another's."""
    saved = make(**option)
    call(saved, draw(12, 12))
    [(name, value)] = option.items()
    name = f"{name}='{value}'"
    with pytest.raises(ValueError, match=name):
        make().load_state_dict(saved.state_dict(), torch.device("cpu"))


def test_state_of_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layer pairs"):
        make().load_state_dict(make(pairs=2).state_dict(), torch.device("cpu"))


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plan_solve_is_captured_in_a_cuda_graph() -> None:  # pragma: no cover - needs a GPU
    cost, start = torch.rand(2, 64, 48, device="cuda"), torch.zeros(2, 48, device="cuda")
    sinkhorn_plan(cost, 0.01, potential=start, iterations=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sinkhorn_plan(cost, 0.01, potential=start, iterations=8)
    cost.copy_(torch.rand_like(cost))
    graph.replay()
    torch.testing.assert_close(result.matrix, sinkhorn_plan(cost, 0.01, potential=start, iterations=8).matrix)


def test_shapes_of_the_solve_depend_on_no_value() -> None:
    """Fake tensors hold no values: what runs on them can be captured in a graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        result = sinkhorn_plan(torch.rand(2, 24, 20), 0.01, iterations=8)
        warm = sinkhorn_plan(torch.rand(2, 24, 20), 0.01, potential=result.potential, iterations=8)
    assert result.matrix.shape == warm.matrix.shape == (2, 24, 20)
