"""Which layers of a network are compared."""

from __future__ import annotations

import pytest
import torch
from helpers import Task
from torch import nn

from lightning_otrt.layers.comparable import choose_layers, comparable_layers
from lightning_otrt.reading.tracer import trace


def small_resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [2, 2, 1, 1], num_classes=3)


class TestComparableLayers:
    def names(self, net, *shape):
        return comparable_layers(trace(net, (torch.randn(2, *shape),)))

    def test_resnet(self):
        assert self.names(small_resnet(), 3, 64, 64) == (
            *("maxpool", "layer1.0", "layer1", "layer2.0", "layer2"),
            *("layer3", "layer4", "avgpool"),
        )

    def test_mobilenet_has_its_blocks_and_not_what_is_in_them(self):
        from torchvision.models import mobilenet_v3_small

        blocks = [f"features.{block}" for block in range(12)]
        assert self.names(mobilenet_v3_small(), 3, 64, 64) == (*blocks, "features", "avgpool", "classifier.1")

    def test_plain_stack(self):
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.ReLU()]
        assert self.names(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)), 1, 8, 8) == ("2", "6")

    def test_inside_a_lightning_module(self):
        assert self.names(Task(), 1, 8, 8) == ("net.block1", "net.block2")

    def test_a_second_container_of_the_same_modules_is_no_layer_of_its_own(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                blocks = (nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True) for _ in range(3))
                self.blocks = nn.ModuleList(blocks)
                self.encoder, self.fc = nn.Sequential(*self.blocks), nn.Linear(8, 3)

            def forward(self, x):
                return self.fc(self.encoder(x).mean(1))

        assert self.names(Twice(), 5, 8) == ("blocks.0", "blocks.1", "blocks.2")

    def test_blocks_that_add_to_their_input_in_place(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

            def forward(self, x):
                x += self.two(self.one(x.relu()).relu())
                return x

        blocks = (Block() for _ in range(3))
        net = nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.Flatten(), nn.Linear(4 * 36, 2))
        assert {"1", "2", "3"} <= set(self.names(net, 3, 8, 8))

    def test_at_most(self):
        seen = trace(small_resnet(), (torch.randn(2, 3, 64, 64),))
        assert comparable_layers(seen, at_most=6) == ("maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
        deep = nn.Sequential(*[nn.Linear(4, 4) for _ in range(60)])
        assert len(self.names(deep, 4)) > 40


class TestChooseLayers:
    def test_words_names_and_indices_in_the_order_of_the_network(self, student):
        assert list(choose_layers(["penultimate", -1, "layer2", "layer2:input"], student, "student")) == [
            *("net.layer2:input", "net.layer2", "net.fc:input", "net.fc"),
        ]
        assert list(choose_layers("all", student, "student")) == [
            *("net.layer1", "net.layer2", "net.layer3.0", "net.layer3.1", "net.layer3", "net.layer4", "net.fc"),
        ]
        assert list(choose_layers("auto", student, "student")) == [f"net.layer{i}" for i in (1, 2, 3, 4)]

    @pytest.mark.parametrize(
        ("choice", "error", "words"),
        [
            ({"layer1": "layer1"}, TypeError, "two lists, not pairs"),
            ([("layer1", "layer2")], TypeError, "two lists, not pairs"),
            (True, TypeError, "but got True"),
            ("matched", ValueError, "here they are all compared"),
            ([], ValueError, "No layer of the teacher can be compared.*teacher_layers="),
        ],
    )
    def test_errors(self, choice, error, words, teacher):
        with pytest.raises(error, match=words):
            choose_layers(choice, teacher, "teacher")
