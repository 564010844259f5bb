"""All layers against all layers: which are compared, that the numbers are right, and that nothing else changes."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict

import lightning.pytorch as pl
import matplotlib as mpl
import numpy as np
import ot
import pytest
import torch
from helpers import LAYERS, assert_same, hooks, loader, make_task, make_teacher, weights
from torch import nn
from torch.nn import functional as F

from lightning_otrt import RepresentationTransfer
from lightning_otrt.analysis.compare import compare_representations

mpl.use("Agg")


def compare(student, teacher, data=None, **options):
    return compare_representations(student, teacher, loader() if data is None else data, progress=False, **options)


def small_resnet():
    from narrow import NarrowResNet
    from torchvision.models.resnet import BasicBlock

    return NarrowResNet(BasicBlock, [2, 2, 1, 1], num_classes=3)


class Sequence(nn.Module):
    """Gives a sequence (B, T, C) of tokens that form no square."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.embed(x[:, 0, :6]).mean(1))


@pytest.mark.parametrize("batch_size", [64, 10])
def test_is_that_of_all_activations_at_once(batch_size):
    """By torch's pooling, numpy's correlation and POT's exact plan, whatever the batches are."""
    student, teacher = make_task().net.double(), make_teacher().double()
    data = [(x.double(), y) for x, y in loader(batch_size=batch_size)]
    result = compare(student, teacher, data, layers=["block1", "block2"], plan="exact")
    x = torch.cat([batch[0] for batch in data])
    student.eval(), teacher.eval()
    for i, row in enumerate(result.student_layers):
        for j, column in enumerate(result.teacher_layers):
            expected = exact_distance(activations(student, row, x), activations(teacher, column, x))
            assert float(result.transport(row, column).value) == pytest.approx(expected, abs=1e-9)
            assert float(result.distances[i, j]) == pytest.approx(expected, abs=1e-6)
            others = torch.cat([activations(teacher, column, batch[0]).roll(1, 0) for batch in data])
            by_chance = exact_distance(activations(student, row, x), others)
            assert float(result.chance[i, j]) == pytest.approx(by_chance, abs=1e-6)
    assert result.samples == 64


def test_a_network_with_itself_is_paired_layer_by_layer():
    net = small_resnet()
    result = compare(net, net, [torch.randn(32, 3, 32, 32)], plan="exact")
    assert result.student_layers == result.teacher_layers
    assert result.distances.diagonal().abs().max() < 1e-5
    assert result.as_layers() == result.closest == {name: name for name in result.student_layers}


def test_single_samples_are_compared_with_the_one_before():
    student, teacher = make_task().net.double().eval(), make_teacher().double().eval()
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    result = compare(student, teacher, x.split(1), layers=["block1"], plan="exact")
    expected = exact_distance(activations(student, "block1", x)[1:], activations(teacher, "block1", x)[:-1])
    assert float(result.chance) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="at least 2 samples, but got 1: the distance by chance"):
        compare(student, teacher, [x[:1]])


@pytest.mark.parametrize("name", ["resnet", "vit", "convnet"])
def test_no_layer_is_closest_to_all(name):
    """By the distances alone one layer of an untrained teacher is: the widest, or the one of fewest observations."""
    student, teacher, data = untrained(name)
    result = compare(student, teacher, data)
    votes = Counter(result.closest.values())
    assert max(votes.values()) <= 0.75 * len(result.closest), votes


@pytest.mark.parametrize("name", ["resnet", "vit", "convnet", "bert"])
def test_each_layer_is_closest_to_itself(name):
    student, _, data = untrained(name)
    result = compare(student, student, data)
    assert result.closest == dict(result.pairing) == {name: name for name in result.student_layers}
    assert result.relative.diagonal().max() < 0.01


@pytest.mark.parametrize("name", ["resnet", "vit", "convnet"])
def test_each_layer_is_closest_to_its_noisy_copy(name):
    student, _, data = untrained(name)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    result = compare(student, teacher, data)
    assert result.closest == {name: name for name in result.student_layers}


@pytest.mark.slow
def test_a_teacher_of_other_images_is_at_chance():
    student, teacher, data = untrained("resnet")
    assert compare(student, teacher, data).relative.min() < 0.5
    unrelated = compare(student, teacher, data, teacher_inputs=lambda x: x.roll(3, 0))
    assert unrelated.relative.nanmean() == pytest.approx(1, abs=0.03)


def test_a_permuted_copy_is_at_no_distance():
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


def test_nothing_changes():
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


def test_an_error_leaves_nothing_behind():
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


def test_a_map_and_a_sequence_are_not_comparable():
    result = compare(make_task().net, Sequence())
    assert result.teacher_layers == ("embed",)
    assert result.distances.isnan().all()
    assert result.statistics == {}


def test_choices_of_layers():
    student, teacher = make_task().net, make_teacher()
    every = compare(student, teacher, layers="all", max_batches=1)
    assert "block1.0" in every.student_layers
    assert len(every.student_layers) > 6
    chosen = compare(student, teacher, layers=["block?", "penultimate"], teacher_layers="block2", max_batches=1)
    assert chosen.student_layers == ("block1", "block2", "dropout:input")
    assert chosen.teacher_layers == ("block2",)
    assert chosen.samples == 8


def test_options_of_the_distance():
    net, teacher = make_task().net, make_teacher()
    uniform = compare(net, teacher, cost="euclidean", plan="uniform")
    assert (compare(net, teacher, cost="euclidean").distances < uniform.distances).all()
    assert compare(net, teacher, grid=1).transport("block1", "block1").cost.shape == (4, 6)


def test_adapters_of_inputs():
    net, teacher = make_task().net, make_teacher()
    batches = [{"image": batch[0]} for batch in loader()]
    plain = compare(net, teacher).distances
    adapted = compare(net, teacher, batches, inputs=lambda batch: batch["image"]).distances
    torch.testing.assert_close(adapted, plain, rtol=1e-5, atol=0)
    negated = compare(net, teacher, teacher_inputs=lambda x: (-x,)).distances
    assert (negated - plain).abs().max() > 0.01


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
def test_errors(options, error, message):
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
def test_students_that_do_not_run(student, message):
    with pytest.raises(TypeError, match=message):
        compare(student, make_teacher())


def test_no_batch():
    with pytest.raises(ValueError, match="at least one batch"):
        compare(make_task().net, make_teacher(), [])


def test_values_that_are_not_finite_name_the_layer():
    x = torch.randn(8, 1, 8, 8)
    x[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="Student layer 'block1'"):
        compare(make_task().net, make_teacher(), [x])


def test_a_plan_that_is_not_found_is_nan_and_told(monkeypatch):
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


@pytest.mark.parametrize("side", [0, 1])
def test_it_warns_of_dead_neurons(side):
    """One huge neuron makes the others count as dead, in every cost that is a correlation."""
    pair = [make_teacher(), make_teacher()]
    with torch.no_grad():
        pair[side].block2[0].weight[0] *= 1e6
    expected = pytest.warns(UserWarning, match=r"layer 'block2': \d+ of its \d+ neurons vary by less than")
    with expected:
        compare(*pair, layers="block2")
    compare(*pair, layers="block2", cost="euclidean")


class Changed(nn.Module):
    """A network behind a change of its inputs."""

    def __init__(self, network, change):
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x):
        return self.network(self.change(x))


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda x: x[x.mean((1, 2, 3)).argsort()], "student layers 'network.block1', 'network.block2' hold"),
        (lambda x: x.flip(0), "hold the samples in another order"),
        (lambda x: x + torch.randn_like(x), "draws random numbers although it runs in evaluation mode"),
    ],
)
def test_it_warns_of_other_samples_as_training_does(change, warning):
    names = ["block1", "block2"]
    student = Changed(make_teacher(), change)
    layers = [f"network.{name}" for name in names]
    with pytest.warns(UserWarning, match=warning):
        compare(student, make_teacher(), layers=layers, teacher_layers=names)
    transfer = RepresentationTransfer(make_teacher(), dict(zip(layers, names, strict=True)))
    with transfer.attached(student):
        with pytest.warns(UserWarning, match=warning):
            student(next(iter(loader()))[0])
        transfer.loss()


def test_a_table_of_positions_holds_no_samples():
    """Also where there are as many samples as tokens."""

    class Learned(Sequence):
        def __init__(self):
            super().__init__()
            self.positions = nn.Embedding(6, 5)

        def forward(self, x):
            return self.head((self.embed(x[:, 0, :6]) + self.positions(torch.arange(6)[None])).mean(1))

    data = [(x[:6], y[:6]) for x, y in loader()]
    assert compare(Learned(), Learned(), data, layers=["embed", "positions"]).samples == 6 * len(data)


def test_it_warns_of_samples_along_another_axis():
    class Recurrent(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.rnn, self.out = nn.GRU(4, 5, batch_first=batch_first), nn.Linear(5, 3)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    data = [torch.randn(6, 6, 4) for _ in range(2)]
    with pytest.warns(UserWarning, match="samples along axis"):
        compare(Recurrent(True), Recurrent(False), data, layers=["rnn"])
    options = {"layers": ["rnn"], "teacher_inputs": lambda x: x.transpose(0, 1)}
    assert compare(Recurrent(True), Recurrent(False), data, **options).samples == 12


@pytest.mark.parametrize("options", [{}, {"cost": "covariance"}])
def test_rotations(options):
    """A rotated layer is closest to the one that it was made of, as it is not for plans."""
    teacher = make_teacher()
    result = compare(teacher, teacher, plan="orthogonal", **options)
    assert result.as_layers() == {name: name for name in result.teacher_layers}
    assert result.distances.diagonal().abs().max() < 1e-6
    assert result.transport("block1", "block1").singular_values.sum().item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="cannot be combined with"):
        compare(teacher, teacher, plan="orthogonal", cost="euclidean")


def test_progress_bar(capsys):
    compare_representations(make_task().net, make_teacher(), loader(), progress=True, max_batches=2)
    assert "0/2" in capsys.readouterr().err


def test_result_goes_into_a_transfer():
    task, teacher = make_task(), make_teacher()
    result = compare(task, teacher)
    assert result.as_layers() == LAYERS
    transfer = RepresentationTransfer(teacher, result.as_layers())
    with transfer.attached(task):
        task(torch.randn(8, 1, 8, 8))
        assert transfer.loss().isfinite()


def test_memory_does_not_grow_with_the_data():
    sizes = []
    for batches in (1, 6):
        data = (torch.randn(16, 1, 8, 8) for _ in range(batches))
        result = compare(make_task().net, make_teacher(), data)
        sizes.append(sum(metric.sums.numel() for metric in result.statistics.values()))
    assert sizes[0] == sizes[1]


def untrained(name):
    """A student, a teacher of the same family, and batches of smooth images or of tokens."""
    torch.manual_seed(0)
    if name == "bert":
        from transformers import BertConfig, BertModel

        sizes = {"vocab_size": 50, "num_attention_heads": 2, "max_position_embeddings": 16}
        config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, **sizes)
        return BertModel(config), None, [{"input_ids": part} for part in torch.randint(50, (48, 12)).split(24)]
    images = F.interpolate(torch.randn(64, 3, 8, 8), 32, mode="bilinear").split(32)
    if name == "vit":
        import timm

        options = {"img_size": 32, "patch_size": 8, "num_classes": 3, "depth": 4, "num_heads": 2}
        nets = [timm.create_model("vit_tiny_patch16_224", embed_dim=width, **options) for width in (32, 48)]
    elif name == "resnet":
        nets = [small_resnet(), small_resnet()]
    else:
        nets = [
            nn.Sequential(*(conv_block(i, width) for i in range(4)), Mean(), nn.Linear(8 * width, 3))
            for width in (2, 3)
        ]
    return *nets, images


def conv_block(depth, width):
    return nn.Sequential(nn.Conv2d(width << depth - 1 if depth else 3, width << depth, 3, 2, 1), nn.ReLU())


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def activations(net, name, x):
    found = []
    hook = net.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output.clone()))
    with hook, torch.no_grad():
        net(x)
    return found[0]


def exact_distance(student, teacher):
    """Distance of two maps ``(B, C, H, W)``, pooled to 4 × 4 positions."""
    y, x = (F.adaptive_avg_pool2d(side, 4).transpose(0, 1).flatten(1).numpy() for side in (student, teacher))
    return ot.emd2([], [], 1 - np.corrcoef(y, x)[: len(y), len(y) :])


@pytest.mark.slow
def test_two_torchvision_models():
    models = pytest.importorskip("torchvision.models")
    student, teacher = models.mobilenet_v3_small(num_classes=3), models.resnet18(num_classes=3)
    data = [(torch.randn(8, 3, 64, 64), 0)]
    result = compare(student, teacher, data, teacher_layers="blocks")
    assert result.distances.shape == (15, 5)
    assert result.distances.isfinite().all()


class Doubling(nn.Module):
    """Writes to what it gets."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.layer(x.mul_(2))


@pytest.mark.parametrize("writes", [(True, False), (False, True), (True, True)])
def test_networks_that_write_to_their_inputs(writes):
    """The other network and the user's data stay as they are."""
    plain, doubling = nn.Sequential(OrderedDict(layer=nn.Conv2d(3, 4, 3))), Doubling()
    doubling.layer.load_state_dict(plain.layer.state_dict())
    images = torch.randn(16, 3, 8, 8)
    before = images.clone()
    twice = copy.deepcopy(plain)
    with torch.no_grad():
        twice.layer.weight.mul_(2)
    sides = [doubling if each else plain for each in writes]
    result = compare(*sides, [images], layers=["layer"], cost="euclidean")
    expected = compare(*(twice if each else plain for each in writes), [images], layers=["layer"], cost="euclidean")
    torch.testing.assert_close(result.distances, expected.distances, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, before)
