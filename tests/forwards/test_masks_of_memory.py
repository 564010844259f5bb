"""Layers that hold the sequence which a decoder looks at: their padding is that of this sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forwards.masked import BART, LONGEST, MORE_WORDS, OTHER, SAMPLES, T5, VALID, WORDS, Situation, hugging_face
from forwards.masked_terms import check_term
from helpers import with_slow
from torch import Tensor, nn

VECTORS = torch.randn(SAMPLES, LONGEST, 8, generator=torch.Generator().manual_seed(5))


def _bert(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return {**sizes, "vocab_size": 50, "is_decoder": True, "add_cross_attention": True}


def bert_decoder(width: int) -> nn.Module:
    net = hugging_face("BertModel", "BertConfig", _bert)(width)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.net = nn.Linear(8, width), net

        def forward(self, words: Tensor, attention_mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
            found = self.net(
                words,
                attention_mask,
                encoder_hidden_states=self.project(states),
                encoder_attention_mask=states_mask,
            )
            return found[0]

    return Decoder()


def encoder_decoder(width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = _bert(width)
    encoder = transformers.BertConfig(**{**options, "is_decoder": False, "add_cross_attention": False})
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, transformers.BertConfig(**options))
    return transformers.EncoderDecoderModel(config)


class CrossAttention(nn.Module):
    """Keys and values of another sequence, which is normalised first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(8, width), nn.Linear(8, width)

    def forward(self, x: Tensor, memory: Tensor, attention_mask: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        memory = self.norm(memory)
        scores = self.query(x) @ self.key(memory).mT
        scores = scores.masked_fill(~encoder_attention_mask[:, None], -1e9)
        return x + torch.softmax(scores, -1) @ self.value(memory)


class Looks(nn.Module):
    """A network of one such layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(50, width), CrossAttention(width)

    def forward(self, words: Tensor, seen: Tensor, attention_mask: Tensor, seen_mask: Tensor) -> Tensor:
        return self.layer(self.embed(words), seen, attention_mask, seen_mask)


class Projected(nn.Module):
    """Keys of torch's own attention, projected by a layer of their own."""

    class Attend(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(width, width), nn.Linear(8, width)

        def forward(self, query: Tensor, key: Tensor, key_padding_mask: Tensor) -> Tensor:
            keys = self.key(key)
            scores = (self.query(query) @ keys.mT).masked_fill(key_padding_mask[:, None], -1e9)
            return torch.softmax(scores, -1) @ keys

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(50, width), self.Attend(width)

    def forward(self, words: Tensor, seen: Tensor, attention_mask: Tensor, seen_padding: Tensor) -> Tensor:
        return self.attend(self.embed(words), seen, seen_padding)


class Unclear(nn.Module):
    """Two sequences and one mask; no name tells whose it is."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.own, self.other = nn.Linear(width, width), nn.Linear(8, width)

        def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor) -> Tensor:
            return self.own(x) + self.other(y)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.block, self.project = nn.Embedding(50, width), self.Block(width), nn.Linear(8, 8)

    def forward(self, words: Tensor, features: Tensor, attention_mask: Tensor) -> Tensor:
        return self.block(self.embed(words), self.project(features), attention_mask)


ALL = WORDS, VALID.long(), MORE_WORDS, OTHER.long()
BERT_BATCH = WORDS, OTHER.long(), VECTORS, VALID.long()
CROSS = "net.encoder.layer.1.crossattention.self"
OF_DECODER = "decoder.bert.encoder.layer.1.crossattention.self"
SEVERAL: dict[str, Any] = {
    "input_ids": WORDS,
    "attention_mask": VALID.long(),
    "decoder_input_ids": MORE_WORDS,
    "decoder_attention_mask": OTHER.long(),
}
SITUATIONS = {
    "BERT, keys": Situation(bert_decoder, BERT_BATCH, f"{CROSS}.key", VALID),
    "BERT, values": Situation(bert_decoder, BERT_BATCH, f"{CROSS}.value", VALID),
    "BERT, queries": Situation(bert_decoder, BERT_BATCH, f"{CROSS}.query", OTHER),
    "encoder-decoder, keys": Situation(encoder_decoder, (), f"{OF_DECODER}.key", VALID, SEVERAL),
    "encoder-decoder, queries": Situation(encoder_decoder, (), f"{OF_DECODER}.query", OTHER, SEVERAL),
    "T5, keys": Situation(T5, ALL, "decoder.block.1.layer.1.EncDecAttention.k", VALID),
    "T5, values": Situation(T5, ALL, "decoder.block.0.layer.1.EncDecAttention.v", VALID),
    "T5, queries": Situation(T5, ALL, "decoder.block.1.layer.1.EncDecAttention.q", OTHER),
    "T5, keys without a mask of the decoder": Situation(
        T5, ALL[:3], "decoder.block.1.layer.1.EncDecAttention.k", VALID
    ),
    "BART, keys": Situation(BART, ALL, "decoder.layers.1.encoder_attn.k_proj", VALID),
    "BART, queries": Situation(BART, ALL, "decoder.layers.1.encoder_attn.q_proj", OTHER),
    "normalised memory": Situation(Looks, (WORDS, VECTORS, OTHER, VALID), "layer.value", VALID),
    "the norm of a memory": Situation(Looks, (WORDS, VECTORS, OTHER, VALID), "layer.norm", VALID),
    "the layer's own sequence": Situation(Looks, (WORDS, VECTORS, OTHER, VALID), "layer.query", OTHER),
    "keys by name": Situation(Projected, (WORDS, VECTORS, OTHER, ~VALID), "attend.key", VALID),
    "queries by name": Situation(Projected, (WORDS, VECTORS, OTHER, ~VALID), "attend.query", OTHER),
    "unclear": Situation(
        Unclear, (WORDS, VECTORS, OTHER), "block.other", None, warning="get another sequence than the first one of"
    ),
    "unclear, own sequence": Situation(Unclear, (WORDS, VECTORS, OTHER), "block.own", OTHER),
    "unclear, named": Situation(
        Unclear, (WORDS, VECTORS, OTHER), "block.other", OTHER, options={"mask": "attention_mask"}
    ),
}


@pytest.mark.parametrize("name", with_slow(SITUATIONS, "T5", "encoder-decoder, k"))
def test_value(name: str) -> None:
    check_term(SITUATIONS[name])
