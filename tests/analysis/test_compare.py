"""All layers against all layers: which are compared, that the numbers are right, and which belong together."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import types

import lightning.pytorch as pl
import matplotlib as mpl
import pytest
import torch
from helpers import LAYERS, assert_same, hooks, loader, make_task, make_teacher, weights
from torch import nn

from lightning_otrt import RepresentationTransfer, transport_distance
from lightning_otrt.analysis.batches import batch_inputs
from lightning_otrt.analysis.compare import compare_representations
from lightning_otrt.reading.neurons import neurons

mpl.use("Agg")


def compare(student, teacher, data=None, **options):
    return compare_representations(student, teacher, loader() if data is None else data, progress=False, **options)


def small_resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [2, 2, 1, 1], num_classes=3)


class Sequence(nn.Module):
    """Gives a sequence (B, T, C) of tokens that form no square."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.embed(x[:, 0, :6]).mean(1))


class TestCompare:
    def test_is_that_of_all_activations_at_once(self):
        student, teacher = make_task().net, make_teacher()
        result = compare(student, teacher, layers=["block1", "block2"])
        x = torch.cat([batch[0] for batch in loader()])
        student.eval(), teacher.eval()
        for (i, row), (j, column) in itertools.product(
            enumerate(result.student_layers), enumerate(result.teacher_layers)
        ):
            grid = 4
            y_map, x_map = activations(student, row, x), activations(teacher, column, x)
            pooled = [neurons(side, neuron_axis=1, grid=grid) for side in (y_map, x_map)]
            expected = transport_distance(*pooled)
            torch.testing.assert_close(result.distances[i, j], expected.value, atol=2e-4, rtol=1e-3)
            assert result.transport(row, column).plan.shape == expected.plan.shape
        assert result.samples == 64

    def test_batches_do_not_matter(self):
        student, teacher = make_task().net, make_teacher()
        results = [compare(student, teacher, loader(60, size)).distances for size in (60, 7)]
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)

    def test_a_network_with_itself_is_paired_layer_by_layer(self):
        net = small_resnet()
        result = compare(net, net, [torch.randn(32, 3, 32, 32)], plan="exact")
        assert result.student_layers == result.teacher_layers
        assert result.distances.diagonal().abs().max() < 1e-5
        assert result.as_layers() == result.closest == {name: name for name in result.student_layers}

    def test_a_permuted_copy_is_at_no_distance(self):
        student = make_task().net.eval()
        teacher = copy.deepcopy(student)
        order = torch.randperm(4)
        for part in (teacher.block1[0], teacher.block1[1]):
            for tensor in [*part.parameters(), *part.buffers()]:
                if tensor.dim():
                    tensor.data = tensor.data[order]
        teacher.block2[0].weight.data = teacher.block2[0].weight.data[:, order]
        result = compare(student, teacher, layers="blocks", plan="exact")
        assert result.distances.diagonal().abs().max() < 1e-5
        assert result.transport("block1", "block1").off_identity > 0

    def test_nothing_changes(self):
        task, teacher = make_task(dropout=0.5), make_teacher()
        teacher.block1.eval()
        flags = [module.training for module in (*task.modules(), *teacher.modules())]
        before = weights(task), weights(teacher), torch.get_rng_state()
        result = compare(task, teacher, loader(shuffle=True))
        assert_same(weights(task), before[0])
        assert_same(weights(teacher), before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
        assert [module.training for module in (*task.modules(), *teacher.modules())] == flags
        assert hooks(task, teacher) == []
        assert result.student_layers == ("net.block1", "net.block2")

    def test_an_error_leaves_nothing_behind(self):
        net = make_task().net
        state = weights(net)

        def batches():
            yield torch.randn(4, 1, 8, 8)
            raise KeyError("data")

        with pytest.raises(KeyError, match="data"):
            compare(net, make_teacher(), batches())
        assert hooks(net) == []
        assert net.training
        assert_same(weights(net), state)

    def test_a_map_and_a_sequence_are_not_comparable(self):
        result = compare(make_task().net, Sequence())
        assert result.teacher_layers == ("embed",)
        assert result.distances.isnan().all()
        assert result.pairing == ()
        assert result.closest == {}
        with pytest.raises(ValueError, match="'block1' and the teacher layer 'embed' cannot be compared"):
            result.transport("block1", "embed")
        with pytest.raises(KeyError, match="none of the student layers"):
            result.transport("nothing", "embed")

    def test_choices_of_layers(self):
        student, teacher = make_task().net, make_teacher()
        every = compare(student, teacher, layers="all", max_batches=1)
        assert "block1.0" in every.student_layers
        assert len(every.student_layers) > 6
        chosen = compare(student, teacher, layers=["block?", "penultimate"], teacher_layers="block2", max_batches=1)
        assert chosen.student_layers == ("block1", "block2", "dropout:input")
        assert chosen.teacher_layers == ("block2",)
        assert chosen.samples == 8

    def test_options_of_the_distance(self):
        net, teacher = make_task().net, make_teacher()
        uniform = compare(net, teacher, cost="euclidean", plan="uniform")
        assert (compare(net, teacher, cost="euclidean").distances < uniform.distances).all()
        assert compare(net, teacher, grid=1).transport("block1", "block1").cost.shape == (4, 6)

    def test_adapters_of_inputs(self):
        net, teacher = make_task().net, make_teacher()
        batches = [{"image": batch[0]} for batch in loader()]
        plain = compare(net, teacher).distances
        adapted = compare(net, teacher, batches, inputs=lambda batch: batch["image"]).distances
        assert torch.equal(plain, adapted)
        doubled = compare(net, teacher, teacher_inputs=lambda x: (2 * x,)).distances
        assert not torch.equal(plain, doubled)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"layers": "blok1"}, ValueError, "Did you mean 'block1'"),
            ({"layers": [("block1", "block2")]}, TypeError, "two lists, not pairs"),
            ({"layers": {"block1": "block2"}}, TypeError, "two lists, not pairs"),
            ({"layers": None}, TypeError, "but got None"),
            ({"layers": []}, ValueError, r"No layer of the student.* such as layers="),
            ({"teacher_layers": []}, ValueError, r"No layer of the teacher.* such as teacher_layers="),
            ({"layers": "matched"}, ValueError, "here they are all compared"),
            ({"cost": lambda y, x: y @ x.T}, TypeError, "to be a name"),
            ({"plan": "greedy"}, ValueError, "plan"),
            ({"epsilon": 0}, ValueError, "epsilon"),
            ({"max_batches": 0}, ValueError, "`max_batches` to be a positive integer or None, but got 0"),
            ({"max_batches": -1}, ValueError, "`max_batches` to be a positive integer or None, but got -1"),
            ({"grid": 0}, ValueError, "`grid` to be a positive integer or None, but got 0"),
        ],
    )
    def test_errors(self, options, error, message):
        net, teacher = make_task().net, make_teacher()
        with pytest.raises(error, match=message):
            compare(net, teacher, **options)
        assert hooks(net, teacher) == []

    @pytest.mark.parametrize(
        ("student", "message"),
        [
            ("resnet18", "`student` to be a torch.nn.Module, but got str"),
            (pl.LightningModule(), "The student LightningModule has no `forward`"),
        ],
    )
    def test_students_that_do_not_run(self, student, message):
        with pytest.raises(TypeError, match=message):
            compare(student, make_teacher())

    def test_no_batch(self):
        with pytest.raises(ValueError, match="at least one batch"):
            compare(make_task().net, make_teacher(), [])

    def test_values_that_are_not_finite_name_the_layer(self):
        x = torch.randn(8, 1, 8, 8)
        x[0, 0, 0, 0] = math.nan
        with pytest.raises(ValueError, match="Student layer 'block1'"):
            compare(make_task().net, make_teacher(), [x])

    def test_a_plan_that_is_not_found_is_nan_and_told(self, monkeypatch):
        from lightning_otrt.analysis.metric import NeuronTransportDistance

        compute = NeuronTransportDistance._solve

        def fail(self, matrix):
            if matrix.shape == (4, 6):
                raise RuntimeError("did not converge")
            return compute(self, matrix)

        monkeypatch.setattr(NeuronTransportDistance, "_solve", fail)
        with pytest.warns(UserWarning, match="1 of 4 distances are NaN.*'block1' -> 'block1': did not converge"):
            result = compare(make_task().net, make_teacher())
        assert result.distances.isnan().sum() == 1

    def test_plans_of_the_pairing(self):
        result = compare(make_task().net, make_teacher())
        assert list(result.plans) == [("block1", "block1"), ("block2", "block2")]
        assert result.plans["block2", "block2"].shape == (8, 12)

    def test_plot(self):
        from matplotlib import pyplot

        result = compare(make_task().net, make_teacher())
        figure, axes = result.plot()
        assert axes.get_xlabel() == "teacher layer"
        assert [label.get_text() for label in axes.get_yticklabels()] == ["block1", "block2"]
        pyplot.close(figure)

    def test_dataframe(self, monkeypatch):
        result = compare(make_task().net, make_teacher())

        class Frame:
            def __init__(self, values, index, columns):
                self.values, self.index, self.columns = values, index, columns

            def rename_axis(self, **names):
                self.names = names
                return self

        monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=Frame))
        frame = result.to_dataframe()
        assert frame.values.shape == (2, 2)
        assert list(frame.index) == ["block1", "block2"]
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
            result.to_dataframe()

    def test_real_pandas(self):
        pytest.importorskip("pandas")
        result = compare(make_task().net, make_teacher())
        assert result.to_dataframe().loc["block1", "block2"] == pytest.approx(float(result.distances[0, 1]))

    def test_is_frozen_and_short_to_print(self):
        result = compare(make_task().net, make_teacher())
        with pytest.raises(AttributeError):
            result.samples = 0
        assert "Metric" not in repr(result)

    def test_progress_bar(self, capsys):
        compare_representations(make_task().net, make_teacher(), loader(), progress=True, max_batches=2)
        assert "0/2" in capsys.readouterr().err

    def test_result_goes_into_a_transfer(self):
        task, teacher = make_task(), make_teacher()
        result = compare(task, teacher)
        assert result.as_layers() == LAYERS
        transfer = RepresentationTransfer(teacher, result.as_layers())
        with transfer.attached(task):
            task(torch.randn(8, 1, 8, 8))
            assert transfer.loss().isfinite()

    def test_memory_does_not_grow_with_the_data(self):
        sizes = []
        for batches in (1, 6):
            data = (torch.randn(16, 1, 8, 8) for _ in range(batches))
            result = compare(make_task().net, make_teacher(), data)
            sizes.append(sum(metric.sums.numel() for metric in result.statistics.values()))
        assert sizes[0] == sizes[1]


def activations(net, name, x):
    found = []
    hook = net.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output.clone()))
    with hook, torch.no_grad():
        net(x)
    return found[0]


class TestBatchInputs:
    def test_forms(self):
        x = torch.zeros(2, 3)
        for batch in (x, (x, 1), [x], {"x": x}):
            args, kwargs = batch_inputs(batch)
            assert [*args, *kwargs.values()][0] is x
        assert batch_inputs(1, lambda batch: (x, x)) == ((x, x), {})
        assert batch_inputs(1, lambda batch: {"a": x}) == ((), {"a": x})

    @pytest.mark.parametrize("batch", [3, ("text",), ()])
    def test_errors(self, batch):
        with pytest.raises(TypeError, match="Pass `inputs=`"):
            batch_inputs(batch)


def test_two_torchvision_models():
    models = pytest.importorskip("torchvision.models")
    student, teacher = models.mobilenet_v3_small(num_classes=3), models.resnet18(num_classes=3)
    data = [(torch.randn(8, 3, 64, 64), 0)]
    result = compare(student, teacher, data, teacher_layers="blocks")
    assert result.distances.shape == (15, 5)
    assert result.distances.isfinite().all()
