"""Which layers lead to what enters another one, whatever code stands between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt.layers.model_output import output_layers
from lightning_otrt.reading.traced.flow import Flow
from lightning_otrt.reading.tracer import trace


def into_a_part(x: Tensor) -> Tensor:
    whole = x.new_zeros(2, 12)
    whole[:, 4:] = x
    return whole


def into_a_view_of_a_view(x: Tensor) -> Tensor:
    whole = x.new_zeros(4, 2, 8)
    whole[1:][0].copy_(x)
    return whole


@pytest.mark.parametrize(
    "code",
    [
        lambda x: x.view(2, 2, 4).permute(0, 2, 1).contiguous(),
        lambda x: x.chunk(2, 1)[1].sigmoid(),
        lambda x: torch.cat([torch.zeros(2, 3), x], 1),
        lambda x: torch.stack((x, x)).max(0).values,
        lambda x: torch.zeros(2, 8).add_(x),
        lambda x: torch.einsum("bi,bj->bij", torch.ones(2, 3), x),
        lambda x: torch.add(x, 1, out=torch.empty(2, 8)),
        into_a_part,
        into_a_view_of_a_view,
    ],
)
def test_code(code: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad(), Flow() as flow:
        first, second = torch.ones(2, 8), torch.ones(2, 8)
        flow.enter([first], {"first"})
        flow.enter([second], {"second"})
        assert flow.sources([code(first)]) == {"first"}
        assert flow.sources([torch.ones(2)]) == set()
        assert flow.sources([code(first).sum() * code(second).sum()]) == {"first", "second"}


class Heads(nn.Module):
    """Layers with weights, layers without, and code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.neck, self.boxes, self.classes = (
            nn.Conv2d(i, o, 1) for i, o in ((3, 5), (5, 5), (5, 4), (5, 2))
        )
        self.act, self.attention = nn.ReLU(inplace=True), nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.act(self.stem(x) * 2)
        tokens = fine.flatten(2).mT
        coarse = self.neck(fine + self.attention(tokens, tokens, tokens)[0].mT.unflatten(2, fine.shape[2:]))
        return [
            self.boxes(fine + coarse).view(len(x), -1, 1, *x.shape[2:]),
            self.classes(coarse).permute(0, 2, 3, 1).split(1, -1)[0],
        ]


def test_layers() -> None:
    found = trace(Heads(), (torch.randn(2, 3, 6, 6),))
    reached = {layer.name: set(layer.reached_by) for layer in found.layers}
    assert reached["stem"] == set()
    assert reached["act"] == {"stem"}
    assert reached["attention"] == {"stem", "act"}
    # The input of the attention is added to what it returned.
    assert reached["neck"] == {"attention", "stem", "act"}
    assert reached["boxes"] == {"neck", "stem", "act"}
    assert reached["classes"] == {"neck"}
    assert output_layers(found) - {""} == {"boxes", "classes"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_a_transformer_is_taken() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    padding = torch.tensor([[False, False, False], [False, False, True]])
    kinds = []
    net.layers[1].register_forward_pre_hook(lambda module, args: kinds.append(args[0].is_nested))
    with torch.no_grad(), Flow():
        net(torch.randn(2, 3, 8), src_key_padding_mask=padding)
    assert kinds == [True]


@torch.library.custom_op("lightning_otrt_tests::index", mutates_args=())
def index_of_other_code(x: Tensor) -> Tensor:
    return x.clone()


@pytest.mark.parametrize(
    ("code", "moves"),
    [
        (lambda x: x[torch.arange(4)], True),
        (lambda x: x[:, torch.arange(3)], False),
        (lambda x: x[x[:, 0] > 0], False),
        (lambda x: x.flip(-2), True),
        (lambda x: x.flip(1), False),
        (lambda x: x.roll(1), True),
        (lambda x: x.roll(1, 1), False),
        (lambda x: torch.cat([x, x], 1), False),
        (lambda x: torch.cat([x[2:], x[:2]]), True),
        (lambda x: torch.stack([x, x], -1), False),
        (lambda x: torch.stack([x, x, x, x], -3), True),
        (lambda x: torch.stack([x, x], -2), False),
        (lambda x: x.gather(0, torch.zeros(4, 3, dtype=torch.long)), True),
        (lambda x: torch.nested.nested_tensor([x[:2], x], layout=torch.jagged), False),
        (index_of_other_code, False),
    ],
)
def test_rows_that_are_moved(code: Callable[[Tensor], Tensor], moves: bool) -> None:
    x = torch.ones(4, 3)
    with torch.no_grad(), Flow() as flow:
        code(x)
    assert (4 in flow.moved_rows) is moves
