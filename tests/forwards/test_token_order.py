"""As many tokens as patches are a grid where a change of one patch shows that they lie row by row, and only there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_otrt import LayerPair, RepresentationTransfer, compare_representations, transport_distance

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
_ROWS, _COLUMNS = 8, 8


class Tokens(nn.Module):
    """Patches in some order, and layers that keep it."""

    def __init__(self, order: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.embed, self.order = nn.Conv2d(3, width, 4, 4), order
        self.mix = nn.TransformerEncoderLayer(width, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.order(self.embed(images).flatten(2).mT)
        logits: Tensor = self.head(self.mix(tokens).mean(1))
        return logits


def by_rows(tokens: Tensor) -> Tensor:
    return tokens


def by_columns(tokens: Tensor) -> Tensor:
    return tokens.unflatten(1, (_ROWS, _COLUMNS)).transpose(1, 2).flatten(1, 2)


def by_windows(tokens: Tensor) -> Tensor:
    return tokens.unflatten(1, (_ROWS // 2, 2, _COLUMNS // 2, 2)).transpose(2, 3).flatten(1, 4)


def backwards(tokens: Tensor) -> Tensor:
    return tokens.flip(1)


def by_score(tokens: Tensor) -> Tensor:
    return tokens.gather(1, tokens[..., :1].argsort(1).expand_as(tokens))


def behind(tokens: Tensor) -> Tensor:
    """A token of zeros behind the patches, in place of one in front."""
    return torch.cat([tokens, torch.zeros_like(tokens[:, :1])], 1)


def constant(tokens: Tensor) -> Tensor:
    """Learned tokens, as many as there are patches."""
    return torch.linspace(-1, 1, tokens[0].numel()).view_as(tokens[:1]).expand_as(tokens) + tokens.mean(1, True) * 0


def value_of(student: nn.Module, teacher: nn.Module, name: str, images: Tensor = IMAGES) -> float:
    transfer = RepresentationTransfer(
        teacher, [LayerPair(name, name)], weight=1.0, plan="exact", cost="sqeuclidean", memory=0.0
    )
    with transfer.attached(student):
        student(images)
        return transfer.loss().item()


def pooled(net: nn.Module, module: nn.Module, grid: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """The neurons of a layer by hand: averages of its tokens as they lie in the tensor."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _args, output: kept.append(output.detach()))
    net(IMAGES)
    handle.remove()
    average = functional.adaptive_avg_pool1d if len(grid) == 1 else functional.adaptive_avg_pool2d
    return average(kept[0].mT.unflatten(2, grid), sizes).flatten(2).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("order", [by_columns, by_windows, backwards, by_score, behind, constant])
def test_another_order_is_read_as_a_sequence_with_a_warning(order: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    student, teacher = Tokens(order).eval(), Tokens(order).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = value_of(student, teacher, "mix")
    messages = [str(warning.message) for warning in caught]
    assert len([message for message in messages if "not show that they lie row by row" in message]) == 2, messages
    ys, xs = (pooled(net, net.mix, (65 if order is behind else 64,), (16,)) for net in (student, teacher))
    expected = transport_distance(ys, xs, plan="exact", cost="sqeuclidean").value
    assert value == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("layer", ["mix", "mix.self_attn:input", "mix.linear1"])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_row_by_row_is_a_grid_without_a_word(layer: str, samples: int) -> None:
    torch.manual_seed(0)
    student, teacher = Tokens(by_rows), Tokens(by_rows)
    value_of(student, teacher, layer, IMAGES[:samples])


def test_its_grid_is_that_of_the_map() -> None:
    torch.manual_seed(0)
    student, teacher = Tokens(by_rows).eval(), Tokens(by_rows).eval()
    ys, xs = (pooled(net, net.mix, (8, 8), (4, 4)) for net in (student, teacher))
    expected = transport_distance(ys, xs, plan="exact", cost="sqeuclidean").value
    assert value_of(student, teacher, "mix") == pytest.approx(float(expected), rel=1e-4)


def test_comparisons_read_it_likewise() -> None:
    torch.manual_seed(0)
    nets = [Tokens(by_windows).eval() for _ in range(2)]
    options: dict[str, Any] = {"cost": "sqeuclidean", "plan": "exact", "progress": False}
    with pytest.warns(UserWarning, match="not show that they lie row by row") as caught:
        result = compare_representations(*nets, [IMAGES], layers=["mix"], **options)
    assert len([warning for warning in caught if "row by row" in str(warning.message)]) == 2
    ys, xs = (pooled(net, net.mix, (64,), (16,)) for net in nets)
    expected = transport_distance(ys, xs, plan="exact", cost="sqeuclidean").value
    assert float(result.distances[0, 0]) == pytest.approx(float(expected), rel=1e-3)


def hiera(timm: Any) -> nn.Module:
    return timm.models.hiera.Hiera((64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1), num_classes=3)


def pyramid(timm: Any) -> nn.Module:
    """A hierarchy whose convolutions inside of attention and feed-forward give maps of all sizes."""
    return timm.create_model("pvt_v2_b0", num_classes=3)


def distilled(timm: Any) -> nn.Module:
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2, num_classes=3)


def hybrid(timm: Any) -> nn.Module:
    return timm.create_model("vit_small_r26_s32_224", img_size=64, depth=2, num_classes=3)


@pytest.mark.parametrize(
    "make", [hiera, distilled, *(pytest.param(net, marks=pytest.mark.slow) for net in (pyramid, hybrid))]
)
def test_real_models(make: Callable[[Any], nn.Module]) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    student, teacher = make(timm).eval(), make(timm).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transfer = RepresentationTransfer(teacher, "blocks")
        with transfer.attached(student):
            student(torch.randn(2, 3, 64, 64))
            transfer.loss()
    told = [warning for warning in caught if "not show that they lie row by row" in str(warning.message)]
    assert bool(told) == (make is hiera), [str(warning.message) for warning in told]
