"""What is said of networks without blocks: what they have, why these are none, and what to write, which then works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import LayerPair, RepresentationTransfer

BATCH = 6
ADJACENCY = torch.eye(30).roll(1, 0) + torch.eye(30)


class GraphConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.lin(x)


class Nodes(nn.Module):
    """A graph convolutional network that classifies the nodes of one graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = GraphConv(8, width), GraphConv(width, width), GraphConv(width, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x, adjacency)), adjacency))
        return self.conv3(x, adjacency)


class Graphs(nn.Module):
    """One that classifies graphs of five nodes each, all nodes in one tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.lin = GraphConv(8, width), GraphConv(width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x, adjacency)), adjacency))
        return self.lin(x.unflatten(0, (-1, 5)).mean(1))


class Contrastive(nn.Module):
    """SimCLR whose forward takes both views."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.projector(self.encoder(first)), self.projector(self.encoder(second))


class Siamese(nn.Module):
    """One head for both views."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch, self.head = convolutions(width), nn.Linear(2 * width, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(torch.cat([self.branch(first), self.branch(second)], 1))


class Universal(nn.Module):
    """A transformer of one layer, in a loop of its root."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 3)
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)

    def loop(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.loop(self.embed(x)).mean(1))


class InModule(Universal):
    """The same with the loop in a module of its own."""

    class Loop(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.layer(x)
            return x

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.depths = self.Loop(self.layer)
        del self.layer

    def loop(self, x: Tensor) -> Tensor:
        return self.depths(x)


class Unclear(nn.Module):
    """Tensors whose neurons may lie along either axis, before a head."""

    class Mixed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, width))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).mT.contiguous()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixed, self.head = self.Mixed(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(x).mean(2))


class Unlike(nn.Module):
    """Layers of tokens of three types."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).relu().mean(1))


def convolutions(width: int) -> nn.Sequential:
    maps = nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, width, 3), nn.ReLU()
    return nn.Sequential(*maps, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def simclr(width: int) -> nn.Module:
    return Contrastive(convolutions(width), width)


def simclr_of_resnet(width: int) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    net.fc = nn.Identity()
    return Contrastive(net, 512)


def albert(width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.AlbertModel(transformers.AlbertConfig(vocab_size=50, embedding_size=8, **sizes))


def albert_classifier(width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.AlbertConfig(vocab_size=50, embedding_size=8, num_hidden_groups=2, **sizes)
    return transformers.AlbertForSequenceClassification(config)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


NODES, TOKENS, IMAGES = torch.randn(30, 8), torch.randn(BATCH, 10, 8), torch.randn(BATCH, 3, 16, 16)
IDS = torch.randint(50, (BATCH, 9))

#: The network, what enters it, what it has, and what to write.
CASES: dict[str, tuple[Callable[[int], nn.Module], tuple[Tensor, ...], str, dict[str, Any]]] = {
    "nodes of a graph": (
        Nodes,
        (NODES, ADJACENCY),
        "the layers have no positions or tokens (for example 'conv2', shape (30, {width})). To match such layers, name "
        "them: layers=['conv1', 'conv2'].",
        {"layers": ["conv1", "conv2"]},
    ),
    "graphs": (
        Graphs,
        (NODES, ADJACENCY),
        "To match such layers, name them: layers=['conv1', 'conv2'].",
        {"layers": ["conv1", "conv2"]},
    ),
    "rows": (mlp, (torch.randn(BATCH, 8),), "name them: layers=['0', '1'].", {"layers": ["0", "1"]}),
    "one layer for all depths": (
        albert,
        (IDS,),
        "one forward runs 'encoder.albert_layer_groups.0' (AlbertLayerGroup) 4 times, each time on the output of the "
        "run before, but a representation is the output of one call. Name the module around the loop: "
        "layers=[LayerPair('encoder', 'encoder', select='last_hidden_state')].",
        {"layers": [LayerPair("encoder", "encoder", select="last_hidden_state")]},
    ),
    "two layers for all depths": (
        albert_classifier,
        (IDS,),
        "layers=[LayerPair('albert.encoder', 'albert.encoder', select='last_hidden_state')].",
        {"layers": [LayerPair("albert.encoder", "albert.encoder", select="last_hidden_state")]},
    ),
    "a loop": (
        Universal,
        (TOKENS,),
        "one forward runs 'layer' (TransformerEncoderLayer) 3 times, each time on the output of the run before, but a "
        "representation is the output of one call. Put the loop into a module of its own, and name that in `layers`. "
        "Layers that run once and have positions or tokens: ['embed'].",
        {"layers": ["embed"]},
    ),
    "a loop in a module": (
        InModule,
        (TOKENS,),
        "Name the module around the loop: layers=[LayerPair('depths', 'depths')].",
        {"layers": [LayerPair("depths", "depths")]},
    ),
    "two views": (
        simclr,
        (IMAGES, IMAGES.flip(3)),
        "one forward runs 'encoder' (Sequential) 2 times and 'projector' (Sequential) 2 times, as for several views of "
        "a sample, but a representation is the output of one call. Call the student once for each of them, or pass "
        "student_root='encoder': each call is then a forward of its own.",
        {"student_root": "encoder"},
    ),
    "two views of a ResNet": (
        simclr_of_resnet,
        (F.interpolate(IMAGES, 32), F.interpolate(IMAGES.flip(3), 32)),
        "pass student_root='encoder'",
        {"student_root": "encoder"},
    ),
    "two views for one head": (
        Siamese,
        (IMAGES, IMAGES.flip(3)),
        "one forward runs 'branch' (Sequential) 2 times, as for several views of a sample, but a representation is the "
        "output of one call. Call the student once for each of them, or pass student_root='branch'",
        {"student_root": "branch"},
    ),
    "neurons along an unknown axis": (
        Unclear,
        (TOKENS,),
        "the types of the modules do not tell which axis of 'mixed' (shape (6, {width}, 10)) holds the neurons. "
        "Give it: LayerPair('mixed', 'mixed', neuron_axis=1) for (B, C, ...)",
        {"layers": [LayerPair("mixed", "mixed", neuron_axis=1)]},
    ),
    "tokens of unlike layers": (
        Unlike,
        (TOKENS,),
        "the layers with tokens give no maps, and they are not a stack of numbered modules of one type, such as "
        "`layers.0` and `layers.1`. To match such layers, name them: layers=['first', 'norm'].",
        {"layers": ["first", "norm"]},
    ),
}


def told(build: Callable[[int], nn.Module], inputs: tuple[Tensor, ...], options: dict[str, Any]) -> str:
    """The log, or the error."""
    torch.manual_seed(0)
    student, transfer = build(6), RepresentationTransfer(build(10), plan="uniform", **options)
    reports: list[str] = []
    transfer.report = reports.append
    try:
        with transfer.attached(student):
            student(*inputs)
            assert transfer.loss() > 0
    except ValueError as error:
        return f"error: {error}"
    return "\n".join(reports)


@pytest.mark.parametrize("name", CASES)
class TestWhatToWrite:
    def test_of_auto(self, name: str) -> None:
        build, inputs, words, _ = CASES[name]
        message = told(build, inputs, {"layers": "auto"})
        assert 'No blocks were found, so "auto" uses "penultimate". Student' in message
        assert words.format(width=6) in message

    def test_of_blocks(self, name: str) -> None:
        build, inputs, words, _ = CASES[name]
        message = told(build, inputs, {"layers": "blocks"})
        assert message.startswith('error: "blocks" finds none in the student (')
        assert words.format(width=6) in message
        assert "takes no tensor" not in message

    def test_it_works(self, name: str) -> None:
        build, inputs, _, options = CASES[name]
        assert told(build, inputs, options).startswith("Representation transfer from")


def test_a_head_that_runs_for_each_view() -> None:
    message = told(simclr, (IMAGES, IMAGES), {"layers": "penultimate"})
    assert message == (
        "error: The classification head 'projector.2' (Linear) of the student (Contrastive) ran 2 times in one "
        "forward, but a representation is the output of one call. Name a layer that runs once. Where the network "
        "takes several inputs, call it once for each of them, or pass as `student_root` a part that runs once for each."
    )


def test_each_network_has_its_own_reason() -> None:
    student, transfer = mlp(6), RepresentationTransfer(Siamese(10), "auto", teacher_inputs=lambda x: (IMAGES, IMAGES))
    reports: list[str] = []
    transfer.report = reports.append
    with transfer.attached(student):
        student(torch.randn(BATCH, 8))
        transfer.loss()
    assert "Student (Sequential): the layers have no positions or tokens" in reports[0]
    assert "Teacher (Siamese): one forward runs 'branch'" in reports[0]
    assert "or pass its part 'branch' as the teacher." in reports[0]


def test_a_batch_by_keyword_is_one() -> None:
    student, transfer = albert(6), RepresentationTransfer(albert(10), "blocks")
    with transfer.attached(student), pytest.raises(ValueError, match="finds none in the student") as caught:
        student(input_ids=IDS)
    assert "takes no tensor as its first argument" not in str(caught.value)


def test_a_shared_activation_is_no_reason() -> None:
    class SharedRelu(Unlike):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.relu(self.norm(self.relu(self.first(x)))).mean(1))

    message = told(SharedRelu, (TOKENS,), {"layers": "auto"})
    assert "are not a stack of numbered modules" in message
    assert "times" not in message
