"""Forty architectures with small random weights: what a network is, and the inputs of a batch for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BATCH = 6


@dataclass(frozen=True)
class Architecture:
    """A network and a batch for it.

    Attributes:
        build: Makes the network.
        inputs: Makes the keyword arguments of a batch; all tensors hold samples along ``batch_axis``.
        padding: Changes what lies in the padding, where there is any.
        batch_axis: Axis of the samples in the inputs.
        root: Submodule that is called with the batch, where it is not the whole network.
        slow: Whether it takes long.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    padding: Callable[[dict[str, Any], torch.Generator], dict[str, Any]] | None = None
    batch_axis: int = 0
    root: str = ""
    slow: bool = False


def images(size: int = 64, name: str = "x", channels: int = 3) -> Callable[[torch.Generator], dict[str, Any]]:
    def make(generator: torch.Generator) -> dict[str, Any]:
        return {name: torch.randn(BATCH, channels, size, size, generator=generator, dtype=torch.float64)}

    return make


def lengths(longest: int, generator: torch.Generator) -> Tensor:
    return torch.randint(longest // 2, longest + 1, (BATCH,), generator=generator)


def words(longest: int = 12, *, decoder: int = 0, vocabulary: int = 50) -> Callable[[torch.Generator], dict[str, Any]]:
    def make(generator: torch.Generator) -> dict[str, Any]:
        made = {
            "input_ids": torch.randint(3, vocabulary, (BATCH, longest), generator=generator),
            "attention_mask": (torch.arange(longest) < lengths(longest, generator)[:, None]).long(),
        }
        if decoder:
            made["decoder_input_ids"] = torch.randint(3, vocabulary, (BATCH, decoder), generator=generator)
            made["decoder_attention_mask"] = (torch.arange(decoder) < lengths(decoder, generator)[:, None]).long()
        return made

    return make


def other_words(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    changed = dict(batch)
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in batch:
            other = torch.randint(3, 50, batch[ids].shape, generator=generator)
            changed[ids] = torch.where(batch[mask].bool(), batch[ids], other)
    return changed


def torchvision_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = importlib.import_module("torchvision.models")
        return models.get_model(name, weights=None, **options)

    return build


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, pretrained=False, **options)

    return build


def transformer(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return build


def _convmixer() -> nn.Module:
    return pytest.importorskip("timm.models.convmixer").ConvMixer(dim=24, depth=6, num_classes=7)


class Tagger(nn.Module):
    """A recurrent network over sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.rnn = nn.LSTM(12, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(words))[0])


class SequenceFirst(nn.Module):
    """The default layout of torch's own transformer, (T, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 50)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(words)))


class Dilated(nn.Module):
    """A temporal convolutional network: one resolution from end to end."""

    def __init__(self) -> None:
        super().__init__()
        steps = [nn.Sequential(nn.Conv1d(16, 16, 3, padding=2**i, dilation=2**i), nn.ReLU()) for i in range(5)]
        self.stem, self.blocks, self.head = nn.Conv1d(4, 16, 1), nn.ModuleList(steps), nn.Linear(16, 5)

    def forward(self, signal: Tensor) -> Tensor:
        x = self.stem(signal)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(-1))


class UNet(nn.Module):
    """Encoder and decoder with skip connections; the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.block(3, 8, 2), self.block(8, 16, 2)
        self.middle = self.block(16, 16, 1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), self.block(16, 8, 1)
        self.head = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 1))

    @staticmethod
    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        deep = self.middle(self.down2(first))
        return self.head(self.out(torch.cat([self.up(deep), first], 1)))


def _sequence_first(generator: torch.Generator) -> dict[str, Any]:
    return {"words": torch.randint(50, (12, BATCH), generator=generator)}


def _signal(generator: torch.Generator) -> dict[str, Any]:
    return {"signal": torch.randn(BATCH, 4, 40, generator=generator, dtype=torch.float64)}


def _video(generator: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(BATCH, 3, 8, 32, 32, generator=generator, dtype=torch.float64)}


def _speech(generator: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 1200, generator=generator, dtype=torch.float64)}


def _whisper(generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_features": torch.randn(BATCH, 8, 40, generator=generator, dtype=torch.float64),
        "decoder_input_ids": torch.randint(3, 50, (BATCH, 6), generator=generator),
    }


def _clip(generator: torch.Generator) -> dict[str, Any]:
    return {**words()(generator), **images(32, "pixel_values")(generator)}


TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQUENCE = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
SEQUENCE |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50}
SPEECH = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}

ARCHITECTURES: dict[str, Architecture] = {
    # torchvision
    "resnet18": Architecture(torchvision_model("resnet18", num_classes=7), images()),
    "vgg11_bn": Architecture(torchvision_model("vgg11_bn", num_classes=7), images(32), slow=True),
    "mobilenet_v3_small": Architecture(torchvision_model("mobilenet_v3_small", num_classes=7), images(), slow=True),
    "efficientnet_b0": Architecture(torchvision_model("efficientnet_b0", num_classes=7), images(), slow=True),
    "shufflenet_v2_x0_5": Architecture(torchvision_model("shufflenet_v2_x0_5", num_classes=7), images(), slow=True),
    "squeezenet1_1": Architecture(torchvision_model("squeezenet1_1", num_classes=7), images()),
    "regnet_y_400mf": Architecture(torchvision_model("regnet_y_400mf", num_classes=7), images(), slow=True),
    "swin_t": Architecture(torchvision_model("swin_t", num_classes=7), images(), slow=True),
    "lraspp_mobilenet_v3_large": Architecture(
        torchvision_model("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=7),
        images(64, "input"),
        slow=True,
    ),
    "fcn_resnet50": Architecture(
        torchvision_model("fcn_resnet50", weights_backbone=None, num_classes=7, aux_loss=True),
        images(64),
        slow=True,
    ),
    "r3d_18": Architecture(torchvision_model("r3d_18", num_classes=7), _video, slow=True),
    "retinanet backbone": Architecture(
        torchvision_model("retinanet_resnet50_fpn", weights_backbone=None, num_classes=7),
        images(64),
        root="backbone",
        slow=True,
    ),
    # timm
    "timm resnet10t": Architecture(timm_model("resnet10t", num_classes=7), images()),
    "timm convnext_atto": Architecture(timm_model("convnext_atto", num_classes=7), images(), slow=True),
    "timm vit": Architecture(
        timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7), images(32)
    ),
    "timm swin": Architecture(
        timm_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, num_classes=7), images(), slow=True
    ),
    "timm mixer": Architecture(timm_model("mixer_s32_224", img_size=64, num_classes=7), images(), slow=True),
    "timm convmixer": Architecture(_convmixer, images()),
    "timm mobilevit_xxs": Architecture(timm_model("mobilevit_xxs", num_classes=7), images(), slow=True),
    "timm pvt_v2_b0": Architecture(timm_model("pvt_v2_b0", num_classes=7), images(), slow=True),
    "timm edgenext_xx_small": Architecture(timm_model("edgenext_xx_small", num_classes=7), images(), slow=True),
    "timm poolformer_s12": Architecture(timm_model("poolformer_s12", num_classes=7), images(), slow=True),
    "timm repvgg_a0": Architecture(timm_model("repvgg_a0", num_classes=7), images(), slow=True),
    "timm features": Architecture(timm_model("resnet10t", features_only=True), images(), slow=True),
    # transformers
    "BERT": Architecture(
        transformer("BertForSequenceClassification", "BertConfig", vocab_size=50, **TINY, **QUIET),
        words(),
        other_words,
    ),
    "DistilBERT": Architecture(
        transformer(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=50,
            dim=16,
            n_layers=4,
            n_heads=2,
            hidden_dim=32,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        ),
        words(),
        other_words,
        slow=True,
    ),
    "GPT-2": Architecture(
        transformer(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=50,
            n_embd=16,
            n_layer=4,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        words(),
        other_words,
    ),
    "Llama": Architecture(
        transformer("LlamaForCausalLM", "LlamaConfig", vocab_size=50, num_key_value_heads=2, **TINY),
        words(),
        other_words,
        slow=True,
    ),
    "T5": Architecture(
        transformer(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
        ),
        words(decoder=8),
        other_words,
    ),
    "BART": Architecture(
        transformer("BartModel", "BartConfig", dropout=0.0, **SEQUENCE), words(decoder=8), other_words, slow=True
    ),
    "Whisper": Architecture(
        transformer(
            "WhisperModel",
            "WhisperConfig",
            num_mel_bins=8,
            max_source_positions=20,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **SEQUENCE,
        ),
        _whisper,
    ),
    "Wav2Vec2": Architecture(
        transformer(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            feat_proj_dropout=0.0,
            activation_dropout=0.0,
            layerdrop=0.0,
            **TINY,
            **SPEECH,
        ),
        _speech,
    ),
    "CLIP": Architecture(
        transformer(
            "CLIPModel",
            "CLIPConfig",
            projection_dim=8,
            text_config={"vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2, **TINY},
            vision_config={"image_size": 32, "patch_size": 8, **TINY},
        ),
        _clip,
        other_words,
    ),
    "HF ViT": Architecture(
        transformer("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, **TINY, **QUIET),
        images(32, "pixel_values"),
    ),
    "SegFormer": Architecture(
        transformer(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 16, 24],
            num_attention_heads=[1, 2, 2, 2],
            decoder_hidden_size=16,
            num_labels=7,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
            **QUIET,
        ),
        images(64, "pixel_values"),
        slow=True,
    ),
    "DINOv2": Architecture(
        transformer(
            "Dinov2Model",
            "Dinov2Config",
            image_size=32,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
        ),
        images(32, "pixel_values"),
        slow=True,
    ),
    # written by hand
    "recurrent tagger": Architecture(
        Tagger, lambda generator: {"words": torch.randint(50, (BATCH, 12), generator=generator)}
    ),
    "sequence first": Architecture(SequenceFirst, _sequence_first, batch_axis=1),
    "dilated convolutions": Architecture(Dilated, _signal),
    "U-Net": Architecture(UNet, images(32)),
}
