"""Generated layers, shapes and neurons: the right answer or an error that says what is wrong; and nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import Net, hooks, make_teacher, seeded
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import LayerPair, RepresentationTransfer, neurons, transport_distance

#: Examples of the quick run and of the slow one, the same each time.
QUICK, MANY = 25, 500


def fuzzed(count: int, **strategies: Any) -> Callable[[Any], Any]:
    """The test on generated arguments; a quick one runs by default, and a long one when asked for."""
    unhurried = settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    return lambda test: unhurried(given(**strategies)(test))


def both(**strategies: Any) -> Callable[[Any], Any]:
    """Parametrize a test that takes ``check``, a function that raises for a bad example."""

    def wrap(check: Any) -> Any:
        def test(count: int) -> None:
            fuzzed(count, **strategies)(check)()

        test.__doc__ = check.__doc__
        return pytest.mark.parametrize("count", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])(test)

    return wrap


def check_error(error: Exception, word: str = "") -> None:
    """An error says more than its own kind."""
    assert len(str(error).split()) >= 5, error
    assert word in str(error)


# Layers

NAMES = ["block1", "block2", "block1.0", "block2.1", "head", "dropout", "", "nothing", "block"]
PATTERNS = [
    "block?",
    "*",
    "block*.0",
    "re:block[12]",
    "re:(",
    "re:",
    "[",
    "block1:input",
    "head:input",
    "nothing:input",
]
WORDS = ["auto", "blocks", "penultimate", "matched"]

names = st.sampled_from(NAMES + PATTERNS + WORDS) | st.text("block12.*?[]re:head", max_size=8)
shares = st.sampled_from([1.0, 0.5, 3, 0, -1.0, float("nan"), float("inf"), "1"])
axes = st.sampled_from([None, 1, -1, 0, 7, (1, 1), (1, -1), [1, 1], "1"])


def pair(student: str, teacher: str, weight: Any, axis: Any) -> Any:
    return lambda: LayerPair(student, teacher, weight=weight, neuron_axis=axis)


atoms = names | st.integers(-12, 12) | st.builds(pair, names, names, shares, axes) | st.none() | st.just(1.5)
mappings = st.dictionaries(names | st.integers(-3, 3), names | st.integers(-3, 3) | st.none(), max_size=3)
tuples = st.tuples(names, names) | st.tuples(names, names, names)
specs = atoms | mappings | st.lists(atoms | mappings | tuples, max_size=4)


def build(spec: Any) -> Any:
    """Layer pairs are only built inside the test, since they check what they are given."""
    if isinstance(spec, list):
        return [build(part) for part in spec]
    return spec() if callable(spec) else spec


# The image enters the first block: nothing before "block1:input" is trained.
@pytest.mark.filterwarnings("ignore:.* get no gradient. nothing before them is trained:UserWarning")
@both(spec=specs, cost=st.sampled_from(["correlation", "euclidean"]))
def test_layers(spec: Any, cost: str) -> None:
    """A term and its gradient, or an error; and networks as they were."""
    student, teacher = seeded(0, Net, norm=False), make_teacher()
    inputs = seeded(3, torch.randn, 8, 1, 8, 8)
    try:
        transfer = RepresentationTransfer(teacher, build(spec), cost=cost, plan="exact")
        with transfer.attached(student):
            student(inputs)
            loss = transfer.loss()
    except (TypeError, ValueError, RuntimeError) as error:
        check_error(error)
        loss = None
    assert not hooks(student, teacher)
    if loss is None:
        return
    assert transfer.pairs
    layers = dict(student.named_modules())
    assert all(pair.student.removesuffix(":input") in layers for pair in transfer.pairs)
    assert sum(pair.weight for pair in transfer.pairs) == pytest.approx(1)
    assert loss.isfinite()
    assert loss >= 0
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters())


# Shapes

dimensions = st.lists(st.integers(0, 7), min_size=0, max_size=5)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64])


@both(
    shape=dimensions,
    axis=st.none() | st.integers(-6, 6),
    grid=st.none() | st.integers(0, 5),
    dtype=dtypes,
    prefix=st.integers(-1, 3),
)
def test_shapes(shape: list[int], axis: int | None, grid: int | None, dtype: torch.dtype, prefix: int) -> None:
    """Neurons by observations, whose means are those of the output where the pooling weighs all positions alike."""
    output = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    try:
        found = neurons(output, neuron_axis=axis, grid=grid, prefix_tokens=prefix)
    except (TypeError, ValueError) as error:
        check_error(error)
        return
    axis = 1 if axis is None else axis % output.dim()
    assert found.shape[0] == shape[axis]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.isfinite().all()
    assert found.shape[1] % max(shape[0], 1) == 0
    positions = [size for place, size in enumerate(shape) if place not in (0, axis)]
    if grid is None and not prefix:
        expected = output.to(found.dtype).movedim(axis, 0).flatten(1)
        torch.testing.assert_close(found, expected)
    if not prefix and len(positions) == 2 and grid is not None:
        maps = output.to(found.dtype).movedim(axis, 1)
        pooled = F.adaptive_avg_pool2d(maps, [min(grid, size) for size in positions])
        torch.testing.assert_close(found, pooled.movedim(1, 0).flatten(1), rtol=1e-4, atol=1e-5)


# Neurons

sizes = st.integers(1, 9)


@both(
    rows=sizes,
    columns=sizes,
    observations=st.integers(1, 12),
    batch=st.none() | st.integers(1, 3),
    cost=st.sampled_from(["correlation", "euclidean", "sqeuclidean"]),
    plan=st.sampled_from(["sinkhorn", "exact", "identity", "uniform", "random"]),
    epsilon=st.floats(0.005, 0.5),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    dead=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_neurons(rows, columns, observations, batch, cost, plan, epsilon, scale, offset, dead, seed) -> None:
    """A plan with its masses, a value that is ⟨P, M⟩ and none too low, a finite gradient, and no matter which order."""
    generator = torch.Generator().manual_seed(seed)
    lead = [] if batch is None else [batch]
    student = torch.randn(*lead, rows, observations, generator=generator, dtype=torch.float64) * scale + offset
    teacher = torch.randn(*lead, columns, observations, generator=generator, dtype=torch.float64) * scale + offset
    student[..., :dead, :] = offset
    student.requires_grad_()
    options = {"cost": cost, "plan": plan, "epsilon": epsilon}
    try:
        found = transport_distance(student, teacher, **options)
    except ValueError as error:
        check_error(error)
        assert (plan == "identity" and rows != columns) or (cost == "correlation" and observations < 3)
        return
    found.value.sum().backward()
    assert student.grad.isfinite().all()
    assert (found.plan >= 0).all()
    torch.testing.assert_close(found.value.detach(), (found.plan * found.cost).sum((-1, -2)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.plan.sum(-1), torch.full_like(found.plan.sum(-1), 1 / rows))
    assert (found.value >= -1e-9).all()
    if plan in ("sinkhorn", "exact"):
        least = transport_distance(student, teacher, cost=cost, plan="exact").value
        # Column masses of an entropic plan are off by its marginal error.
        slack = found.marginal_error * found.cost.amax((-1, -2)) + 1e-7
        assert (found.value >= least - slack).all()
    if plan == "exact":
        order = torch.randperm(rows, generator=generator)
        again = transport_distance(student[..., order, :], teacher, **options)
        torch.testing.assert_close(again.value, found.value, rtol=1e-6, atol=1e-9)


@both(
    rows=sizes,
    columns=sizes,
    observations=st.integers(3, 12),
    batch=st.none() | st.integers(1, 3),
    cost=st.sampled_from(["correlation", "covariance"]),
    plan=st.sampled_from(["orthogonal", "random_orthogonal"]),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    dead=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_rotations(rows, columns, observations, batch, cost, plan, scale, offset, dead, seed) -> None:
    """A value between 0 and 2, a finite gradient that lowers it, none for dead neurons, and no matter which order."""
    generator = torch.Generator().manual_seed(seed)
    lead = [] if batch is None else [batch]
    student = torch.randn(*lead, rows, observations, generator=generator, dtype=torch.float64) * scale + offset
    teacher = torch.randn(*lead, columns, observations, generator=generator, dtype=torch.float64) * scale + offset
    student[..., :dead, :] = offset
    student.requires_grad_()
    found = transport_distance(student, teacher, cost=cost, plan=plan)
    found.value.sum().backward()
    assert student.grad.isfinite().all()
    assert not student.grad[..., :dead, :].any()
    assert ((found.value >= -1e-9) & (found.value <= 2 + 1e-9)).all()
    assert (found.singular_values.sum(-1) <= 1 + 1e-9).all()
    if plan == "orthogonal":
        order, other = (torch.randperm(size, generator=generator) for size in (rows, columns))
        again = transport_distance(student[..., order, :], teacher[..., other, :], cost=cost, plan=plan)
        torch.testing.assert_close(again.value, found.value, rtol=1e-5, atol=1e-7)


@both(widths=st.tuples(sizes, sizes), observations=st.integers(3, 40), seed=st.integers(0, 99))
def test_batches_are_loops(widths: tuple[int, int], observations: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, width, observations, generator=generator) for width in widths)
    together = transport_distance(student, teacher, plan="exact")
    alone = [transport_distance(y, x, plan="exact").value for y, x in zip(student, teacher, strict=True)]
    torch.testing.assert_close(together.value, torch.stack(alone), rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """Gives its input the shape that is asked for."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.shape = shape
        self.inner = nn.Linear(4, max(int(torch.tensor(shape).prod()), 1))
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(x).reshape(len(x), *self.shape))


@both(
    shapes=st.tuples(st.lists(st.integers(1, 5), max_size=4), st.lists(st.integers(1, 5), max_size=4)),
    axis=st.none() | st.integers(-4, 5),
    batch=st.integers(0, 6),
)
def test_outputs_of_any_two_shapes(shapes: tuple[list[int], list[int]], axis: int | None, batch: int) -> None:
    """Two layers whose outputs do not fit are an error that names them."""
    student, teacher = (seeded(index, Odd, shape) for index, shape in enumerate(shapes))
    try:
        transfer = RepresentationTransfer(teacher, [LayerPair("layer", "layer", neuron_axis=axis)], plan="exact")
        with transfer.attached(student):
            student(seeded(3, torch.randn, batch, 4))
            loss = transfer.loss()
    except (TypeError, ValueError, RuntimeError) as error:
        check_error(error, "layer")
        loss = None
    assert not hooks(student, teacher)
    if loss is not None:
        assert loss.isfinite()
        assert 0 <= loss <= 2 * transfer.weight
