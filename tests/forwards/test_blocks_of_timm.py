"""``"auto"`` on networks of timm and transformers whose numbered modules are not all blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt.layers.automatic import block_groups, block_names
from lightning_otrt.reading.traced.token_grid import find_token_grid
from lightning_otrt.reading.tracer import trace

timm = pytest.importorskip("timm")
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def _built(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = getattr(timm.models, name)(num_classes=3, **options)
    return net.eval()


def _names(net: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[str]:
    return block_names(trace(net, args, kwargs))


def test_class_attention_is_no_block() -> None:
    """It changes the class token alone, so that its output says little more than what it gets."""
    cait = _built("Cait", img_size=64, patch_size=16, embed_dim=16, depth=4, num_heads=2)
    assert _names(cait, IMAGES) == [f"blocks.{number}" for number in range(4)]
    xcit = _built("Xcit", img_size=64, patch_size=16, embed_dim=16, depth=4, num_heads=2)
    assert _names(xcit, IMAGES) == [f"blocks.{number}" for number in range(4)]


def test_maps_stand_for_a_network_that_ends_with_class_attention() -> None:
    volo = _built("VOLO", img_size=64, layers=[1, 1, 1, 1], embed_dims=[16] * 4, num_heads=[2] * 4, stem_hidden_dim=8)
    found = _names(volo, IMAGES)
    assert any(name.startswith("network.") for name in found)
    assert not any(name.startswith("post_network.") for name in found)


def test_embeddings_of_stages_are_no_blocks() -> None:
    sizes = {"depths": (2, 2, 2, 2), "embed_dims": (8, 16, 16, 16), "num_heads": (1, 2, 2, 2), "wss": (4, 4, 4, 2)}
    twins = _built("Twins", img_size=64, **sizes)
    assert {name.split(".")[0] for name in _names(twins, IMAGES)} == {"blocks"}


def test_a_class_token_that_enters_late_does_not_end_a_stage() -> None:
    convit = _built("ConVit", img_size=64, embed_dim=16, depth=6, num_heads=2, local_up_to_layer=4)
    groups = block_groups(trace(convit, (IMAGES,)))
    assert groups == [[f"blocks.{number}" for number in (0, 2, 3, 5)]]


def _canine() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CanineConfig(**sizes, num_hash_buckets=64, local_transformer_stride=8)
    ids = torch.randint(1, 50, (2, 64))
    return transformers.CanineForSequenceClassification(config), {"input_ids": ids}


def _wav2vec2_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Wav2Vec2BertConfig(**sizes, add_adapter=True, num_adapter_layers=1, output_hidden_size=16)
    return transformers.Wav2Vec2BertModel(config), {"input_features": torch.randn(2, 20, 160)}


@pytest.mark.parametrize(("build", "layers"), [(_canine, "encoder.layer."), (_wav2vec2_bert, "encoder.layers.")])
def test_a_convolution_over_tokens_is_no_pyramid(
    build: Callable[[], tuple[nn.Module, dict[str, Tensor]]], layers: str
) -> None:
    torch.manual_seed(0)
    net, inputs = build()
    found = _names(net.eval(), **inputs)
    assert found
    assert all(layers in name for name in found)


def test_heads_of_an_attention_are_no_rows_of_patches() -> None:
    """In MViT, heads x tokens of the stage before were taken for the map of the last stage, with one row."""
    net = timm.create_model("mvitv2_tiny", num_classes=3, img_size=64).eval()
    found = trace(net, (IMAGES,))
    for stage, side in enumerate((16, 8, 4, 2)):
        layer = found.layer(f"stages.{stage}")
        assert layer.output is not None
        assert find_token_grid(found, layer, layer.output).size == (side, side)


class Named(nn.Module):
    """Its type has a word of embeddings in its name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PositionAwareLayer(nn.TransformerEncoderLayer): ...


class WordEmbedding(Named): ...


def test_blocks_inside_of_a_network_for_embeddings_are_blocks() -> None:
    layers = [PositionAwareLayer(8, 2, 8, 0.0, batch_first=True) for _ in range(3)]
    assert _names(WordEmbedding(nn.Sequential(*layers, nn.Linear(8, 3))), torch.randn(2, 5, 8)) == [
        f"net.{number}" for number in range(3)
    ]


def test_steps_that_grow_behind_a_transformer_are_a_pyramid() -> None:
    down = [nn.Sequential(nn.Conv1d(3 if not step else 8, 8, 4, 2, 1), nn.ReLU()) for step in range(3)]
    up = [nn.Sequential(nn.ConvTranspose1d(8, 8, 4, 2, 1), nn.ReLU()) for _ in range(3)]

    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
            self.mid = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True) for _ in "ab")
            self.out = nn.Conv1d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.down:
                x = layer(x)
            x = x.mT
            for layer in self.mid:
                x = layer(x)
            x = x.mT
            for layer in self.up:
                x = layer(x)
            return self.out(x)

    assert {name.split(".")[0] for name in _names(Series(), torch.randn(2, 3, 64))} == {"down", "up"}
