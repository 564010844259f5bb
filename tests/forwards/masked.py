"""Networks with padding, the layer to look at, and what its padding is by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SAMPLES, LONGEST = 6, 9
#: Short and long samples in one batch, one of them without padding.
LENGTHS = torch.tensor([3, 9, 5, 4, 7, 6])
VALID = torch.arange(LONGEST) < LENGTHS[:, None]
#: Of another sequence with as many tokens, such as that of a decoder.
OTHER = torch.arange(LONGEST) < torch.tensor([[8], [4], [9], [6], [3], [5]])
WORDS = torch.randint(3, 50, (SAMPLES, LONGEST), generator=torch.Generator().manual_seed(0))
MORE_WORDS = torch.randint(3, 50, (SAMPLES, LONGEST), generator=torch.Generator().manual_seed(1))
FRAMES = torch.randn(SAMPLES, LONGEST, 5, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Situation:
    """A student and a teacher of other width, and a batch.

    Attributes:
        build: From a width to the network.
        args: Positional arguments of both.
        layer: The layer of both.
        valid: The tokens of the layer that are no padding, ``(B, T)``; None: padding is read.
        kwargs: Keyword arguments.
        batch_axis: Axis of the samples in the output of the layer.
        neuron_axis: Axis of the neurons.
        warning: What the transfer warns of.
        options: Of the layer pair.
    """

    build: Callable[[int], nn.Module]
    args: tuple[Any, ...]
    layer: str
    valid: Tensor | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    batch_axis: int = 0
    neuron_axis: int = 2
    warning: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def hugging_face(name: str, config: str, options: Callable[[int], dict[str, Any]]) -> Callable[[int], nn.Module]:
    def build(width: int) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, name)(getattr(transformers, config)(**options(width)))

    return build


def _tiny(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return {**sizes, "vocab_size": 50}


def _sequence(width: int) -> dict[str, Any]:
    found = {"d_model": width, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    return {**found, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 50}


def _t5(width: int) -> dict[str, Any]:
    return {"vocab_size": 50, "d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}


def _gpt2(width: int) -> dict[str, Any]:
    return {"vocab_size": 50, "n_embd": width, "n_layer": 2, "n_head": 2}


def _whisper(width: int) -> dict[str, Any]:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return {**_sequence(width), **tokens, "num_mel_bins": 5, "max_source_positions": 9}


def _wav2vec2(width: int) -> dict[str, Any]:
    front = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return {**_tiny(width), **front, **positions, "mask_time_prob": 0.0, "feat_extract_norm": "layer"}


def _clip(width: int) -> dict[str, Any]:
    sizes = {key: value for key, value in _tiny(width).items() if key != "vocab_size"}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": LONGEST, "eos_token_id": 2}
    # 3 x 3 patches: as many as there are words.
    return {"projection_dim": 8, "text_config": text, "vision_config": {**sizes, "image_size": 24, "patch_size": 8}}


BERT = hugging_face("BertModel", "BertConfig", _tiny)
BART = hugging_face("BartModel", "BartConfig", _sequence)
T5 = hugging_face("T5Model", "T5Config", _t5)
WAV2VEC2 = hugging_face("Wav2Vec2ForCTC", "Wav2Vec2Config", _wav2vec2)
#: Samples of a signal, of which 10 with a stride of 5 and then 3 with a stride of 2 make a frame.
SAMPLES_OF_SIGNAL = 100
SIGNAL = torch.randn(SAMPLES, SAMPLES_OF_SIGNAL, generator=torch.Generator().manual_seed(3))
SIGNAL_LENGTHS = torch.tensor([100, 40, 70, 55, 90, 63])
SIGNAL_VALID = torch.arange(SAMPLES_OF_SIGNAL) < SIGNAL_LENGTHS[:, None]
FRAMES_OF_SIGNAL = torch.arange(9) < (((SIGNAL_LENGTHS - 10) // 5 + 1 - 3) // 2 + 1)[:, None]


class Translator(nn.Module):
    """An encoder and a decoder of torch, whose decoder gets two masks."""

    def __init__(self, width: int, *, batch_first: bool = True) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": batch_first}
        self.embed = nn.Embedding(50, width)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 16, **options)  # type: ignore[arg-type]
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, 2, 16, **options), 2)  # type: ignore[arg-type]

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor, target_padding: Tensor | None) -> Tensor:
        memory = self.encoder(self.embed(source), src_key_padding_mask=source_padding)
        return self.decoder(
            self.embed(target),
            memory,
            tgt_key_padding_mask=target_padding,
            memory_key_padding_mask=source_padding,
        )


class Fairseq(nn.Module):
    """Layers of (T, B, C) that get the mask of the encoder, as in fairseq."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.self_attn = nn.MultiheadAttention(width, 2)
            self.linear = nn.Linear(width, width)

        def forward(self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
            x = x + self.self_attn(x, x, x, key_padding_mask=encoder_padding_mask, attn_mask=attn_mask)[0]
            return x + self.linear(x)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(5, width)
        self.layers = nn.ModuleList([self.Layer(width) for _ in range(2)])

    def forward(self, source: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        x = self.project(source).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, padding_mask)
        return x


class Scores(nn.Module):
    """A mask that is added to scores; the layers do not get it by a name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(words)
        rows = attention_mask.reshape(len(words), 1, -1)
        rows = rows if rows.is_floating_point() else (1.0 - rows) * -1e9
        return self.mix(torch.softmax(x @ x.mT + rows, -1) @ x)


class Named(nn.Module):
    """Its mask has a name of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)

    def forward(self, words: Tensor, ignored: Tensor) -> Tensor:
        return self.mix(self.embed(words).masked_fill(ignored[..., None] != 0, 0.0))


class Temporal(nn.Module):
    """Channels before positions."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv1d(5, width, 3, stride, 1), nn.Conv1d(width, width, 1)

    def forward(self, frames: Tensor, padding_mask: Tensor) -> Tensor:
        return self.mix(self.conv(frames.mT).relu())


class TwoTowers(nn.Module):
    """Queries with a mask, and documents of the same length without one."""

    class Tower(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)

        def forward(self, words: Tensor) -> Tensor:
            return self.mix(self.embed(words))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.document = self.Tower(width), self.Tower(width)

    def forward(self, query: Tensor, document: Tensor, attention_mask: Tensor) -> Tensor:
        return self.query(query) * self.document(document)


class ClassToken(nn.Module):
    """A token in front that the mask does not count."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.cls_token = nn.Embedding(50, width), nn.Parameter(torch.ones(1, 1, width))
        self.layer = nn.Linear(width, width)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(words)
        return self.layer(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))


class Sequence(nn.Module):
    """torch's own encoder with its defaults: (T, B, C), and the mask (B, T)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, words: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.encoder(self.embed(words), src_key_padding_mask=src_key_padding_mask)


def _whisper_features() -> Tensor:
    return torch.randn(SAMPLES, 5, 18, generator=torch.Generator().manual_seed(4))


def _padded_first() -> Tensor:
    return VALID.flip(1)


ADDED = torch.where(VALID, 0.0, -torch.inf)
HALVED = torch.arange(LONGEST) < ((2 * LENGTHS - 1) // 2 + 1)[:, None]

SITUATIONS: dict[str, Situation] = {
    "BERT, by position": Situation(BERT, (WORDS, VALID.long()), "encoder.layer.1", VALID),
    "BERT, one mapping": Situation(BERT, (), "encoder.layer.0", VALID, {"input_ids": WORDS, "attention_mask": VALID}),
    "T5, encoder": Situation(T5, (WORDS, VALID, MORE_WORDS, OTHER), "encoder.block.1", VALID, options={"select": 0}),
    "T5, decoder": Situation(T5, (WORDS, VALID, MORE_WORDS, OTHER), "decoder.block.1", OTHER, options={"select": 0}),
    "T5, decoder without mask": Situation(
        T5, (WORDS, VALID, MORE_WORDS), "decoder.block.1", None, options={"select": 0}
    ),
    "BART, decoder": Situation(BART, (WORDS, VALID.long(), MORE_WORDS, OTHER.long()), "decoder.layers.0", OTHER),
    "BART, decoder without mask": Situation(BART, (WORDS, VALID.long(), MORE_WORDS), "decoder.layers.0", None),
    "BART, embedding of the decoder": Situation(
        BART, (WORDS, VALID.long(), MORE_WORDS, OTHER.long()), "decoder.layernorm_embedding", OTHER
    ),
    "GPT-2, padded in front": Situation(
        hugging_face("GPT2LMHeadModel", "GPT2Config", _gpt2),
        (),
        "transformer.h.1",
        _padded_first(),
        {"input_ids": WORDS, "attention_mask": _padded_first().long()},
    ),
    "CLIP, text": Situation(
        hugging_face("CLIPModel", "CLIPConfig", _clip),
        (WORDS, torch.randn(SAMPLES, 3, 24, 24), VALID.long()),
        "text_model.encoder.layers.1",
        VALID,
    ),
    "Wav2Vec2, transformer": Situation(
        WAV2VEC2, (SIGNAL, SIGNAL_VALID.long()), "wav2vec2.encoder.layers.1", FRAMES_OF_SIGNAL
    ),
    "Wav2Vec2, projection": Situation(
        WAV2VEC2, (SIGNAL, SIGNAL_VALID.long()), "wav2vec2.feature_projection.projection", FRAMES_OF_SIGNAL
    ),
    "Whisper, frames of half the rate": Situation(
        hugging_face("WhisperModel", "WhisperConfig", _whisper),
        (_whisper_features(), torch.arange(18) < 2 * LENGTHS[:, None] - 1),
        "encoder.layers.1",
        HALVED,
        {"decoder_input_ids": WORDS},
    ),
    "torch decoder": Situation(Translator, (WORDS, MORE_WORDS, ~VALID, ~OTHER), "decoder.layers.1", OTHER),
    "torch decoder, feed-forward part": Situation(
        Translator, (WORDS, MORE_WORDS, ~VALID, ~OTHER), "decoder.layers.1.linear2", OTHER
    ),
    "torch decoder, cross-attention": Situation(
        Translator,
        (WORDS, MORE_WORDS, ~VALID, ~OTHER),
        "decoder.layers.1.multihead_attn",
        OTHER,
        options={"select": 0},
    ),
    "torch decoder without mask": Situation(Translator, (WORDS, MORE_WORDS, ~VALID, None), "decoder.layers.1", None),
    "torch encoder, (T, B, C)": Situation(Sequence, (WORDS.T, ~VALID), "encoder.layers.0", VALID, batch_axis=1),
    "fairseq": Situation(Fairseq, (FRAMES, ~VALID), "layers.1", VALID, batch_axis=1),
    "added to scores": Situation(Scores, (WORDS, ADDED), "mix", VALID),
    "(B, 1, 1, T)": Situation(Scores, (WORDS, VALID.long()[:, None, None]), "mix", VALID),
    "one token in front": Situation(ClassToken, (WORDS, VALID), "layer", VALID),
    "(B, C, T)": Situation(Temporal, (FRAMES, ~VALID), "mix", VALID, neuron_axis=1),
    "a stride of 2": Situation(
        lambda width: Temporal(width, 2), (FRAMES, ~VALID), "mix", None, neuron_axis=1, warning="has another length"
    ),
    "tower with the mask": Situation(TwoTowers, (WORDS, MORE_WORDS, VALID), "query.mix", VALID),
    "tower without the mask": Situation(TwoTowers, (WORDS, MORE_WORDS, VALID), "document.mix", None),
    "named, true at padding": Situation(Named, (WORDS, (~VALID).long()), "mix", VALID, options={"mask": "~ignored"}),
    "named for both, of ids": Situation(
        Named, (WORDS * VALID, (~VALID).long()), "mix", VALID, options={"mask": ("words", "~ignored")}
    ),
    "no mask": Situation(BERT, (WORDS, VALID.long()), "encoder.layer.1", None, options={"mask": None}),
}
