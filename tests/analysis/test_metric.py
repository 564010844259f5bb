"""The checks of torchmetrics' own tester, and what this metric adds to them: additive, exact, of constant memory."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import ot
import pytest
import torch
from helpers import make_trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torchmetrics import Metric, MetricCollection, MetricTracker
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from lightning_otrt import transport_distance
from lightning_otrt.analysis.metric import NeuronTransportDistance
from lightning_otrt.transport.euclidean import SquaredEuclideanCost

N, M = 6, 9
COSTS = ("correlation", "euclidean", "sqeuclidean")
PLANS = ("sinkhorn", "exact", "uniform", "random")
#: Uneven batches, one of them with too few observations for a correlation of its own, one empty.
SIZES = (32, 5, 2, 0, 64, 17)


def neurons(observations: int, seed: int = 0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(M, observations, generator=generator, dtype=torch.float64)
    student = teacher[:N].flip(0) + 0.5 * torch.randn(N, observations, generator=generator, dtype=torch.float64)
    return (student + offset).float(), (teacher + offset).float()


def batches(sizes: tuple[int, ...] = SIZES, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    student, teacher = neurons(sum(sizes), **kwargs)
    return list(zip(student.split(sizes, 1), teacher.split(sizes, 1), strict=True))


def double(**kwargs: Any) -> NeuronTransportDistance:
    """A metric whose value is not rounded to float32."""
    metric = NeuronTransportDistance(N, M, **kwargs)
    metric.set_dtype(torch.float64)
    return metric


def cost_matrix(student: Tensor, teacher: Tensor, cost: str) -> np.ndarray:
    """The definitions of the costs, by numpy and POT."""
    y, x = student.double().numpy(), teacher.double().numpy()
    if cost == "correlation":
        return 1 - np.corrcoef(y, x)[: len(y), len(y) :]
    squared = ot.dist(y, x, metric="sqeuclidean") / (y.shape[1] * np.mean(x**2))
    return np.sqrt(squared) if cost == "euclidean" else squared


def exact_distance(student: Tensor, teacher: Tensor, cost: str) -> float:
    return float(ot.emd2([], [], cost_matrix(student, teacher, cost)))


@pytest.mark.parametrize("cost", COSTS)
def test_torchmetrics_class_checks(cost: str) -> None:
    """What MetricTester checks of a class, in its order."""
    metric = double(cost=cost, plan="exact")
    for flag in ("is_differentiable", "higher_is_better", "full_state_update", "plot_lower_bound"):
        with pytest.raises(RuntimeError, match="Can't change const"):
            setattr(metric, flag, not getattr(metric, flag))
    assert metric.is_differentiable is False
    assert metric.higher_is_better is False
    assert metric.full_state_update is False
    assert metric.plot_lower_bound == 0.0

    clone = metric.clone()
    assert clone is not metric
    assert type(clone) is type(metric)
    metric = pickle.loads(pickle.dumps(metric))
    twin = copy.deepcopy(metric)

    data = batches((32, 5, 64, 17))
    for index, (student, teacher) in enumerate(data):
        value = metric(student, teacher)
        if index == 0:
            twin.update(student, teacher)
            torch.testing.assert_close(value, twin.compute())
        assert value.item() == pytest.approx(exact_distance(student, teacher, cost), abs=1e-8)
    assert isinstance(hash(metric), int)
    assert metric.state_dict() == {}

    value = metric.compute()
    assert isinstance(value, Tensor)
    assert value.shape == ()
    assert value.requires_grad == metric.is_differentiable
    whole = exact_distance(*neurons(32 + 5 + 64 + 17), cost)
    assert value.item() == pytest.approx(whole, abs=1e-8)


def test_forward_gives_what_updates_give() -> None:
    """The check of torchmetrics for ``full_state_update=False``: a reduced forward leaves the state of an update."""
    reduced = double(plan="exact")
    whole = type("Whole", (NeuronTransportDistance,), {"full_state_update": True})(N, M, plan="exact")
    whole.set_dtype(torch.float64)
    for student, teacher in batches((32, 5, 64)):
        assert reduced(student, teacher) == whole(student, teacher)
        assert torch.equal(reduced.sums, whole.sums)
    assert reduced.update_count == whole.update_count == 3
    assert reduced.compute() == whole.compute()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cost", COSTS)
def test_half_precision(cost: str, dtype: torch.dtype) -> None:
    """Metric and inputs in half precision, which MetricTester runs through forward and compute."""
    student, teacher = (tensor.to(dtype) for tensor in neurons(80))
    metric = NeuronTransportDistance(N, M, cost=cost, plan="exact")
    metric.set_dtype(dtype)
    value = metric(student, teacher)
    assert value.dtype == metric.compute().dtype == dtype
    assert value.item() == pytest.approx(exact_distance(student, teacher, cost), rel=1e-2)


def test_differentiability_flag() -> None:
    """The metric has no gradient, as its flag says; its functional twin has that of the plan held fixed."""
    student, teacher = (tensor.double().requires_grad_() for tensor in neurons(20))
    assert NeuronTransportDistance(N, M)(student, teacher).requires_grad is NeuronTransportDistance.is_differentiable
    value = transport_distance(student, teacher.detach(), plan="exact").value
    assert value.requires_grad
    assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_compute_is_cached_until_the_next_update() -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(*neurons(40))
    first = metric.compute()
    assert metric.compute() is first
    metric.update(*neurons(40, seed=1))
    assert metric.compute() is not first
    assert metric.update_called
    assert metric.metric_state.keys() == {"sums"}


def test_tracker_finds_the_least_distance() -> None:
    tracker = MetricTracker(NeuronTransportDistance(N, M, plan="exact"), maximize=False)
    for seed in range(3):
        tracker.increment()
        tracker.update(*neurons(40, seed=seed))
    values = tracker.compute_all()
    assert tracker.best_metric() == pytest.approx(float(values.min()))
    assert NeuronTransportDistance.higher_is_better is False


def test_inside_a_lightning_module() -> None:
    """Logged as an object, so that Lightning computes and resets it."""

    class Task(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.distance = NeuronTransportDistance(N, M, plan="exact")
            self.left: list[int] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.distance.update(*neurons(40, seed=batch_idx))
            self.log("distance", self.distance, on_step=False, on_epoch=True)

        def on_validation_epoch_start(self) -> None:
            self.left.append(self.distance.update_count)

    task = Task()
    trainer = make_trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=2, num_sanity_val_steps=0)
    trainer.fit(task)
    expected = NeuronTransportDistance(N, M, plan="exact")
    for seed in range(2):
        expected.update(*neurons(40, seed=seed))
    assert trainer.callback_metrics["distance"] == pytest.approx(float(expected.compute()))
    assert task.left == [0, 0]
    assert not [name for name in task.state_dict() if "distance" in name]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:This property will be removed in 2.0.0")
def test_scriptable() -> None:
    torch.jit.script(NeuronTransportDistance(N, M))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("cost", COSTS)
def test_batches_equal_all_observations_at_once(cost: str, plan: str) -> None:
    metric = double(cost=cost, plan=plan, seed=3)
    for student, teacher in batches():
        metric.update(student, teacher)
    student, teacher = neurons(sum(SIZES))
    expected = transport_distance(student.double(), teacher.double(), cost=cost, plan=plan, seed=3)
    result = metric.transport()
    torch.testing.assert_close(metric.compute(), expected.value, rtol=0, atol=1e-10)
    for name in ("plan", "cost", "marginal_error", "student_marginal_error", "entropy"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=1e-8)
    np.testing.assert_allclose(result.cost.numpy(), cost_matrix(student, teacher, cost), atol=1e-8)


def test_identity_plan_of_equal_widths() -> None:
    metric = NeuronTransportDistance(N, N, plan="identity")
    student, _ = neurons(50)
    metric.update(student, student)
    assert metric.compute().item() == pytest.approx(0, abs=1e-7)
    assert metric.transport().off_identity == 0


@pytest.mark.parametrize("cost", COSTS)
def test_independent_of_batching_and_order(cost: str) -> None:
    student, teacher = neurons(120)
    order = torch.randperm(120)
    one, many = double(cost=cost, plan="exact"), double(cost=cost, plan="exact")
    one.update(student, teacher)
    for index in order.split(7):
        many.update(student[:, index], teacher[:, index])
    torch.testing.assert_close(one.compute(), many.compute(), rtol=0, atol=1e-12)


def test_one_update_larger_than_a_chunk() -> None:
    student, teacher = neurons(40_000)
    metric = double(plan="exact")
    metric.update(student, teacher)
    assert metric.compute().item() == pytest.approx(exact_distance(student, teacher, "correlation"), abs=1e-10)


@pytest.mark.parametrize(("ratio", "tolerance"), [(1e2, 1e-9), (1e3, 1e-7), (1e4, 1e-5)])
def test_means_large_against_deviations(ratio: float, tolerance: float) -> None:
    student, teacher = neurons(20_000, offset=ratio)
    metric = NeuronTransportDistance(N, M)
    for index in torch.arange(20_000).split(50):
        metric.update(student[:, index], teacher[:, index])
    error = np.abs(metric.transport().cost.numpy() - cost_matrix(student, teacher, "correlation")).max()
    assert error < tolerance


def test_dead_neurons() -> None:
    student, teacher = neurons(60)
    student[0] = 0
    teacher[:2] = 0
    metric = double(plan="exact")
    for part in range(0, 60, 20):
        metric.update(student[:, part : part + 20], teacher[:, part : part + 20])
    cost = metric.transport().cost
    assert cost[0].tolist() == [0, 0] + [1] * (M - 2)
    assert cost[1:, 0].tolist() == [1] * (N - 1)
    torch.testing.assert_close(cost, transport_distance(student.double(), teacher.double(), plan="exact").cost)


def test_constant_layers_are_at_distance_zero() -> None:
    metric = NeuronTransportDistance(N, M)
    student, teacher = (torch.randn(width, 1).expand(width, 7) for width in (N, M))
    for _ in range(500):
        metric.update(student, teacher)
    assert metric.compute() == 0


def test_memory_does_not_grow_with_the_data() -> None:
    metric = NeuronTransportDistance(64, 32)
    before = metric.sums.shape
    student, teacher = torch.randn(64, 10_000), torch.randn(32, 10_000)
    for _ in range(100):
        metric.update(student, teacher)
    assert metric.sums.shape == before
    assert metric.sums.numel() == 64 * 32 + 2 * (64 + 32) + 3
    assert metric.sums[0] == 1_000_000
    state = len(pickle.dumps(metric))
    assert state < 8 * 3 * metric.sums.numel() + 10_000
    metric.update(student, teacher)
    assert len(pickle.dumps(metric)) == state, "the bytes of everything that it holds"
    tensors = [value for value in vars(metric).values() if isinstance(value, Tensor | list) and len(value) > 10]
    assert len(tensors) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cost", COSTS)
def test_inputs_of_other_precision(cost: str, dtype: torch.dtype) -> None:
    metric = double(cost=cost, plan="exact")
    student, teacher = (tensor.to(dtype) for tensor in neurons(80))
    for index in torch.arange(80).split(33):
        metric.update(student[:, index], teacher[:, index])
    assert metric.compute().item() == pytest.approx(exact_distance(student, teacher, cost), abs=1e-8)


def test_under_autocast_and_inference_mode() -> None:
    student, teacher = neurons(80)
    plain, inside = double(), double()
    plain.update(student, teacher)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside.update(student, teacher)
        value = inside.compute()
    torch.testing.assert_close(value, plain.compute(), rtol=0, atol=0)
    inside.reset()
    inside.update(student, teacher)
    torch.testing.assert_close(inside.compute(), plain.compute(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "convert",
    [
        lambda metric: metric.half(),
        lambda metric: metric.float(),
        lambda metric: metric.set_dtype(torch.float16),
        lambda metric: metric.to(torch.bfloat16),
        lambda metric: torch.nn.ModuleDict({"metric": metric}).to(torch.float16),
        lambda metric: torch.nn.ModuleDict({"metric": metric}).half(),
    ],
)
def test_statistics_stay_in_float64(convert: Callable[[NeuronTransportDistance], object]) -> None:
    first, second = batches((40, 40))
    metric = NeuronTransportDistance(N, M, plan="exact")
    metric.update(*first)
    metric.transport()
    convert(metric)
    assert metric.sums.dtype == torch.float64
    assert metric.transport().plan.dtype == torch.float64
    metric.update(*second)
    value = metric.compute()
    assert value.dtype == metric.dtype
    torch.testing.assert_close(
        metric.transport().value.item(), exact_distance(*neurons(80), "correlation"), rtol=0, atol=1e-8
    )
    metric.reset()
    assert metric.sums.dtype == torch.float64


def test_moves_with_its_plan() -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(*neurons(40))
    metric.transport()
    metric.to("meta")
    assert metric.sums.device.type == "meta"
    assert metric.transport().plan.device.type == metric.compute().device.type == "meta"
    metric.reset()
    assert metric.sums.device.type == "meta"


def test_plans_in_float32_have_the_value_of_those_in_float64() -> None:
    student, teacher = neurons(400)
    values = []
    for metric in (double(), NeuronTransportDistance(N, M)):
        metric.update(student, teacher)
        values.append(metric.compute().double())
        assert metric.transport().plan.dtype == torch.float64
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0)


def test_value_is_float32_by_default() -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(*neurons(40))
    assert metric.compute().dtype == torch.float32


def test_inputs_are_neither_kept_nor_changed() -> None:
    student, teacher = (tensor.requires_grad_() for tensor in neurons(40))
    copies = student.detach().clone(), teacher.detach().clone()
    metric = NeuronTransportDistance(N, M)
    value = metric(student, teacher)
    assert not value.requires_grad
    assert not metric.sums.requires_grad
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])


def test_reset() -> None:
    metric, fresh = NeuronTransportDistance(N, M), NeuronTransportDistance(N, M)
    data = neurons(40)
    metric.update(*neurons(40, seed=1))
    metric.transport()
    metric.reset()
    assert metric.update_count == 0
    assert not metric.sums.any()
    metric.update(*data)
    fresh.update(*data)
    assert metric.compute() == fresh.compute()


def test_clone_and_pickle_hold_the_state() -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(*neurons(40))
    value = metric.compute()
    clone, loaded = metric.clone(), pickle.loads(pickle.dumps(metric))
    metric.update(*neurons(40, seed=1))
    assert clone.compute() == loaded.compute() == value
    assert torch.equal(clone.transport().plan, loaded.transport().plan)
    assert metric.compute() != value


def test_persistent_state_resumes() -> None:
    first, second = batches((40, 40))
    metric, resumed = NeuronTransportDistance(N, M), NeuronTransportDistance(N, M)
    metric.persistent(True)
    metric.update(*first)
    resumed.load_state_dict(metric.state_dict())
    metric.update(*second)
    resumed.update(*second)
    assert metric.compute() == resumed.compute()


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this version of torchmetrics cannot merge states")
def test_merge_state() -> None:
    first, second = batches((40, 30))
    left, right, both = double(), double(), double()
    left.update(*first)
    right.update(*second)
    left.merge_state(right)
    for batch in (first, second):
        both.update(*batch)
    torch.testing.assert_close(left.compute(), both.compute(), rtol=0, atol=1e-12)


def test_forward_returns_the_batch_and_transport_the_whole() -> None:
    first, second = batches((40, 40))
    metric, alone = double(), double()
    metric.update(*first)
    alone.update(*second)
    assert metric(*second) == alone.compute()
    whole = double()
    whole.update(*neurons(80))
    torch.testing.assert_close(metric.transport().plan, whole.transport().plan, rtol=0, atol=1e-10)


def test_metric_collection_shares_statistics() -> None:
    collection = MetricCollection(
        {
            "sinkhorn": NeuronTransportDistance(N, M),
            "exact": NeuronTransportDistance(N, M, plan="exact"),
            "euclidean": NeuronTransportDistance(N, M, cost="euclidean"),
            "squared": NeuronTransportDistance(N, M, cost="sqeuclidean"),
        },
        prefix="val_",
    )
    for student, teacher in batches((40, 3, 80)):
        collection.update(student=student, teacher=teacher)
    assert sorted(map(sorted, collection.compute_groups.values())) == [["euclidean", "squared"], ["exact", "sinkhorn"]]
    values = collection.compute()
    student, teacher = neurons(123)
    for name, kwargs in (
        ("sinkhorn", {}),
        ("exact", {"plan": "exact"}),
        ("euclidean", {"cost": "euclidean"}),
        ("squared", {"cost": "sqeuclidean"}),
    ):
        expected = transport_distance(student.double(), teacher.double(), **kwargs).value
        # The metric solves its plans in float32.
        torch.testing.assert_close(values[f"val_{name}"], expected.float(), rtol=1e-5, atol=0)
    collection.reset()
    assert all(not metric.sums.any() for metric in collection.values())


def test_compute_before_update_warns_and_is_nan() -> None:
    metric = NeuronTransportDistance(N, M)
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute().isnan()
    with (
        pytest.warns(UserWarning, match="was called before the ``update`` method"),
        pytest.raises(ValueError, match=r"There is no transport plan: .* needs at least 3 observations"),
    ):
        NeuronTransportDistance(N, M).transport()


def test_too_few_observations_warn_and_are_counted() -> None:
    metric = double(plan="exact")
    student, teacher = neurons(10)
    with pytest.warns(UserWarning, match="has seen 2 observations, too few for cost='correlation', which needs 3"):
        assert metric(student[:, :2], teacher[:, :2]).isnan()
    metric.update(student[:, 2:], teacher[:, 2:])
    assert metric.compute().item() == pytest.approx(exact_distance(student, teacher, "correlation"), abs=1e-8)
    single = NeuronTransportDistance(N, M, cost="euclidean")
    single.update(student[:, :1], teacher[:, :1])
    assert single.compute() > 0


def test_empty_batches_count_nothing() -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(torch.zeros(N, 0), torch.zeros(M, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute().isnan()


def test_plot() -> None:
    metric = NeuronTransportDistance(N, M)
    values = [metric(student, teacher) for student, teacher in batches((40, 40))]
    with matplotlib.rc_context({"backend": "agg"}):
        import matplotlib.pyplot as plt

        for value in (None, values[0], values):
            figure, axes = metric.plot(value)
            assert axes.figure is figure
        _, given = plt.subplots()
        assert metric.plot(ax=given)[1] is given
        plt.close("all")


def test_repr_is_the_constructor_call() -> None:
    metric = NeuronTransportDistance(N, M, cost="euclidean", plan="random", epsilon=0.1, seed=7)
    assert repr(eval(repr(metric))) == repr(metric)
    assert repr(metric) == ("NeuronTransportDistance(6, 9, cost='euclidean', plan='random', epsilon=0.1, seed=7)")


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"num_student_neurons": 0}, ValueError, "`num_student_neurons` to be a positive integer, but got 0"),
        ({"num_teacher_neurons": 2.0}, ValueError, "`num_teacher_neurons` to be a positive integer, but got 2.0"),
        ({"num_teacher_neurons": True}, ValueError, "`num_teacher_neurons` to be a positive integer, but got True"),
        ({"cost": "cosine"}, ValueError, "argument `cost` to be one of"),
        ({"cost": torch.cdist}, TypeError, "adds up sums over observations.*transport_distance"),
        ({"cost": SquaredEuclideanCost()}, TypeError, "argument `cost` to be a name"),
        ({"plan": "static"}, ValueError, "argument `plan` to be one of"),
        ({"plan": "identity"}, ValueError, "needs equal widths, but the metric has 6 student and 9 teacher neurons"),
        ({"epsilon": 0.0}, ValueError, "argument `epsilon`"),
        ({"seed": 0.5}, TypeError, "argument `seed` to be an integer, but got 0.5"),
        ({"unknown": 1}, ValueError, "Unexpected keyword arguments: `unknown`"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        NeuronTransportDistance(**{"num_student_neurons": N, "num_teacher_neurons": M} | kwargs)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "match"),
    [
        (torch.zeros(40, N), torch.zeros(M, 40), ValueError, r"`num_student_neurons`, but got \(40, 6\).*Transpose it"),
        (torch.zeros(N, 40), torch.zeros(M + 1, 40), ValueError, "with 9 neurons, as set by `num_teacher_neurons`"),
        (torch.zeros(2, N, 40), torch.zeros(2, M, 40), ValueError, r"but got \(2, 6, 40\)"),
        (torch.zeros(N, 40), torch.zeros(M, 39), ValueError, "the same number of observations"),
        (torch.zeros(N, 40).int(), torch.zeros(M, 40), TypeError, "`student` to be a floating-point tensor, but got"),
        (torch.zeros(N, 40), [[0.0]], TypeError, "`teacher` to be a floating-point tensor, but got list"),
        (torch.full((N, 40), torch.nan), torch.zeros(M, 40), ValueError, "`student` has 240 NaN or infinite values"),
        (torch.zeros(N, 40), torch.full((M, 40), torch.inf), ValueError, "`teacher` has 360 NaN or infinite values"),
    ],
)
def test_bad_inputs_leave_the_state(student: Any, teacher: Any, error: type[Exception], match: str) -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(*neurons(40))
    before = metric.sums.clone()
    with pytest.raises(error, match=match):
        metric.update(student, teacher)
    assert torch.equal(metric.sums, before)


def _worker(rank: int, folder: str) -> None:
    """Two processes: uneven numbers of uneven batches, then one process without any."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for cost in COSTS:
            for share in ([0, 1, 0, 0, 0, 1], [0] * len(SIZES)):
                metric = double(cost=cost, plan="exact")
                for (student, teacher), owner in zip(batches(offset=100.0), share, strict=True):
                    if owner == rank:
                        metric.update(student, teacher)
                local = metric.sums.clone()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
                    value = metric.compute().item()
                assert abs(value - exact_distance(*neurons(sum(SIZES), offset=100.0), cost)) < 1e-8
                assert torch.equal(metric.sums, local), "the state is that of this process again"
                if rank == 0:
                    # A collective here would wait for the other process for ever.
                    assert abs(metric.transport().value.item() - value) < 1e-12

        both = double(plan="exact")
        both.update(*batches((40, 30))[rank])
        with both.sync_context():
            assert both.sums[0] == 70, "the statistics of both"
            with pytest.raises(TorchMetricsUserError, match="already been synced"):
                both.sync()
        assert both.sums[0] == (40, 30)[rank]
        collection = MetricCollection(
            {"exact": double(plan="exact"), "random": double(plan="random"), "euclidean": double(cost="euclidean")}
        )
        for student, teacher in batches((20, 20, 20, 10))[rank::2]:
            collection.update(student, teacher)
        found = collection.compute()
        assert abs(found["exact"].item() - exact_distance(*neurons(70), "correlation")) < 1e-8

        stepwise = double(plan="exact", dist_sync_on_step=True)
        student, teacher = batches((40, 30))[rank]
        assert abs(stepwise(student, teacher).item() - exact_distance(*neurons(70), "correlation")) < 1e-8
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(folder,), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    student, teacher = (tensor.cuda() for tensor in neurons(80))
    metric = double(plan="exact")
    with pytest.raises(RuntimeError, match="different devices in metric calculation"):
        metric.update(student, teacher)
    metric = double(plan="exact").to("cuda")
    with torch.autocast("cuda", torch.float16):
        metric.update(student, teacher)
    assert metric.compute().device.type == metric.transport().plan.device.type == "cuda"
    assert metric.compute().item() == pytest.approx(exact_distance(student.cpu(), teacher.cpu(), "correlation"))
    metric.cpu()
    assert metric.transport().plan.device.type == "cpu"
