"""Nested tensors as inputs of the whole network: the term of the samples without padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

SAMPLES = [torch.randn(length, 5, generator=torch.Generator().manual_seed(length)) for length in (3, 9, 5, 4, 7, 6)]
VALID = torch.arange(9) < torch.tensor([len(sample) for sample in SAMPLES])[:, None]

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, width)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(self.first(x).relu())


class Block(nn.Module):
    """A container around it that gives a vector of each sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(width), nn.Linear(width, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, attention_mask))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize(("build", "layer"), [(Encoder, "first"), (Encoder, "second"), (Block, "encoder")])
def test_value(layout: torch.layout, build: type[nn.Module], layer: str) -> None:
    torch.manual_seed(0)
    student, teacher = build(8), build(12)
    padded = nn.utils.rnn.pad_sequence(SAMPLES, batch_first=True)
    nested = torch.nested.nested_tensor(SAMPLES, layout=layout)
    values = []
    for batch in ((padded, VALID), (nested,)):
        transfer = RepresentationTransfer(teacher, [LayerPair(layer, layer)], weight=1.0, plan="uniform")
        with transfer.attached(student):
            student(*batch)
            loss = transfer.loss()
            loss.backward()
        values.append((float(loss.detach()), student.get_submodule("encoder" if build is Block else "").first))
        values[-1] = values[-1][0], values[-1][1].weight.grad.clone()
        student.zero_grad()
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-4)
    torch.testing.assert_close(values[0][1], values[1][1], rtol=1e-3, atol=1e-6)
