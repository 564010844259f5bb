"""The metric does what torchmetrics expects of one, in its collections, trackers, clones and LightningModules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import matplotlib
import pytest
import torch
from analysis.metric_problem import COSTS, M, N, batches, double, exact_distance, neurons
from helpers import make_trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torchmetrics import Metric, MetricCollection, MetricTracker, SumMetric

from lightning_otrt import transport_distance
from lightning_otrt.analysis.metric import NeuronTransportDistance


@pytest.mark.parametrize("cost", COSTS)
def test_torchmetrics_class_checks(cost: str) -> None:
    """What MetricTester of torchmetrics checks of a class."""
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
        torch.testing.assert_close(reduced(student, teacher), whole(student, teacher), rtol=0, atol=1e-12)
        torch.testing.assert_close(reduced.sums, whole.sums, rtol=1e-12, atol=1e-12)
    assert reduced.update_count == whole.update_count == 3
    torch.testing.assert_close(reduced.compute(), whole.compute(), rtol=0, atol=1e-12)


def test_differentiability_flag() -> None:
    """The metric has no gradient, as its flag says; the function has that of the plan held fixed."""
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


def test_forward_returns_the_batch_and_transport_the_whole() -> None:
    first, second = batches((40, 40))
    metric, alone = double(), double()
    metric.update(*first)
    alone.update(*second)
    torch.testing.assert_close(metric(*second), alone.compute(), rtol=0, atol=1e-12)
    whole = double()
    whole.update(*neurons(80))
    torch.testing.assert_close(metric.transport().plan, whole.transport().plan, rtol=0, atol=1e-10)


def test_reset() -> None:
    metric, fresh = double(), double()
    data = neurons(40)
    metric.update(*neurons(40, seed=1))
    metric.transport()
    metric.reset()
    assert metric.update_count == 0
    assert not metric.sums.any()
    metric.update(*data)
    fresh.update(*data)
    torch.testing.assert_close(metric.compute(), fresh.compute(), rtol=0, atol=1e-12)


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
    metric, resumed = double(), double()
    metric.persistent(True)
    metric.update(*first)
    resumed.load_state_dict(metric.state_dict())
    metric.update(*second)
    resumed.update(*second)
    torch.testing.assert_close(metric.compute(), resumed.compute(), rtol=0, atol=1e-12)


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


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this version of torchmetrics cannot merge states")
def test_merged_states_count_after_a_value_was_computed() -> None:
    first, second = batches((40, 30))
    left, right, both = double(), double(), double()
    left.update(*first)
    left.compute()
    right.update(*second)
    left.merge_state(right.metric_state)
    fresh = double()
    fresh.merge_state(left)
    torch.testing.assert_close(fresh.compute(), left.compute())
    for batch in (first, second):
        both.update(*batch)
    torch.testing.assert_close(left.compute(), both.compute(), rtol=0, atol=1e-12)


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this version of torchmetrics cannot merge states")
@pytest.mark.parametrize(
    "other",
    [
        NeuronTransportDistance(M, N),  # sums of as many numbers
        NeuronTransportDistance(N, M, cost="euclidean"),
        NeuronTransportDistance(N, M, plan="orthogonal"),
        NeuronTransportDistance(N + 1, M),
        SumMetric(),
    ],
)
def test_states_of_other_sums_are_not_merged(other: Metric) -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(*batches((40,))[0])
    before = metric.sums.clone()
    with pytest.raises(ValueError, match="of the same widths and cost as"):
        metric.merge_state(other)
    if isinstance(other, NeuronTransportDistance) and other.sums.shape != metric.sums.shape:
        with pytest.raises(ValueError, match="with sums of shape"):
            metric.merge_state(other.metric_state)
    for state in ({}, {"x": 1}, None, {"sums": 1.0}):
        with pytest.raises(ValueError, match="Expected"):
            metric.merge_state(state)
    assert torch.equal(metric.sums, before)


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


def test_plot() -> None:
    metric = NeuronTransportDistance(N, M)
    values = [metric(student, teacher) for student, teacher in batches((40, 40))]
    with matplotlib.rc_context({"backend": "agg"}):
        import matplotlib.pyplot as plt

        for value in (None, values[0], values):
            figure, axes = metric.plot(value)
            assert axes.figure is figure
        assert axes.get_ylabel() == "NeuronTransportDistance"
        assert axes.get_lines()[0].get_ydata().tolist() == pytest.approx([value.item() for value in values])
        _, given = plt.subplots()
        assert metric.plot(ax=given)[1] is given
        plt.close("all")


def test_repr_is_the_constructor_call() -> None:
    metric = NeuronTransportDistance(N, M, cost="euclidean", plan="random", epsilon=0.1, seed=7)
    assert repr(eval(repr(metric))) == repr(metric)
    assert repr(metric) == ("NeuronTransportDistance(6, 9, cost='euclidean', plan='random', epsilon=0.1, seed=7)")
