"""Networks whose forward is a graph of torch.fx, torch.export or TorchScript."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_otrt import RepresentationTransfer
from lightning_otrt.notices import TransferWarning

IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10).eval()


def extractor(net: nn.Module) -> nn.Module:
    return create_feature_extractor(net, {"layer4": "maps", "fc": "logits"})


def exported(net: nn.Module) -> nn.Module:
    return torch.export.export(net, (IMAGES,)).module()


def pairs(teacher: nn.Module, layers: Any = "auto", student: nn.Module | None = None) -> list[tuple[str, str]]:
    student = student or resnet()
    transfer = RepresentationTransfer(teacher, layers)
    with transfer.attached(student):
        student(IMAGES)
        transfer.loss()
    return [(pair.student, pair.teacher) for pair in transfer.pairs]


@pytest.mark.parametrize("graph", [torch.fx.symbolic_trace, extractor])
@pytest.mark.parametrize("layers", ["auto", "blocks"])
def test_blocks_of_a_graph(graph: Callable[[nn.Module], nn.Module], layers: str) -> None:
    with pytest.warns(TransferWarning, match=r"The teacher \(ResNet\) is a graph of torch.fx.* place of 'layer4.1'"):
        found = pairs(graph(resnet()), layers)
    assert found[-1] == ("layer4", "layer4.1.bn2")


def test_a_graph_inside_of_a_network() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = extractor(resnet()), nn.Linear(512, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x)["maps"].mean((2, 3)))

    with pytest.warns(TransferWarning, match=r"The teacher \(Wrapped\) .* in place of 'body.layer4.1'"):
        pairs(Wrapped())


def test_a_student_that_is_a_graph() -> None:
    with pytest.warns(TransferWarning, match=r"The student \(ResNet\) .* in place of 'layer4.1'"):
        pairs(resnet(), student=torch.fx.symbolic_trace(resnet()))


@pytest.mark.parametrize("layers", [["layer4.1.bn2"], "penultimate"])
def test_named_layers_of_a_graph(layers: Any) -> None:
    assert len(pairs(torch.fx.symbolic_trace(resnet()), layers)) == 1  # warnings are errors


@pytest.mark.slow
def test_a_graph_without_blocks_of_its_own() -> None:
    """What the next module gets is whole: no warning. The stack around the last layer gives the same tensor."""
    plain = torchvision.models.vgg11(num_classes=10, init_weights=False)
    found, expected = pairs(torch.fx.symbolic_trace(plain)), pairs(plain)
    assert found[:-1] == expected[:-1]
    assert (found[-1][1], expected[-1][1]) == ("features.20", "features")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("graph", [exported, torch.jit.script, lambda net: torch.jit.trace(net, IMAGES)])
@pytest.mark.parametrize("layers", ["auto", "blocks", "penultimate"])
def test_graphs_that_run_no_module(graph: Callable[[nn.Module], nn.Module], layers: str) -> None:
    with pytest.raises(ValueError, match=r"graph of torch.export or TorchScript, .* made from as the teacher"):
        pairs(graph(resnet()), layers)
