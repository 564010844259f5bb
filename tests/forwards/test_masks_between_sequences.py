"""Masks that say which token sees which, and masks of a sequence that the layer's own sequence only looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forwards.masked import LONGEST, OTHER, SAMPLES, VALID, WORDS, Situation, hugging_face
from forwards.masked_terms import by_hand, check_term, networks, run, term
from torch import Tensor, nn

VECTORS = torch.randn(SAMPLES, LONGEST, 8, generator=torch.Generator().manual_seed(5))
CAUSAL = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()
#: Which token sees which: those before it that are no padding.
SEEN = CAUSAL & VALID[:, None]
#: Two texts in each sample, which do not see each other.
TEXT = torch.arange(LONGEST) < 4 + torch.arange(SAMPLES)[:, None] % 3
PACKED = CAUSAL & (TEXT[:, None] == TEXT[:, :, None])


def _llama(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return {**sizes, "vocab_size": 50, "intermediate_size": 16}


def _perceiver(width: int) -> dict[str, Any]:
    sizes = {"num_latents": LONGEST, "d_latents": width, "d_model": 8, "num_blocks": 1, "num_self_attends_per_block": 2}
    return {**sizes, "num_self_attention_heads": 2, "num_cross_attention_heads": 2}


def _q_former(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return {**sizes, "encoder_hidden_size": 8, "vocab_size": 50}


LLAMA = hugging_face("LlamaForCausalLM", "LlamaConfig", _llama)
PERCEIVER = hugging_face("PerceiverModel", "PerceiverConfig", _perceiver)


def q_former(width: int) -> nn.Module:
    net = hugging_face("Blip2QFormerModel", "Blip2QFormerConfig", _q_former)(width)

    class Queries(nn.Module):
        """As many queries as there are tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.queries = net, nn.Parameter(torch.randn(1, LONGEST, width))

        def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
            queries = self.queries.expand(len(states), -1, -1)
            return self.net(queries, encoder_hidden_states=states, encoder_attention_mask=attention_mask)[0]

    return Queries()


class Resampler(nn.Module):
    """Learned vectors that look at a sequence of the same length."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(width, 2, kdim=8, vdim=8, batch_first=True)
            self.mix = nn.Linear(width, width)

        def forward(self, latents: Tensor, context: Tensor, mask: Tensor) -> Tensor:
            seen = self.attention(latents, context, context, key_padding_mask=~mask, need_weights=False)[0]
            return self.mix(latents + seen)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.latents, self.block = nn.Parameter(torch.randn(1, LONGEST, width)), self.Block(width)

    def forward(self, frames: Tensor, attention_mask: Tensor) -> Tensor:
        return self.block(self.latents.expand(len(frames), -1, -1), frames, attention_mask)


class Attention(nn.Module):
    """Its mask says for each sample which token sees which."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)

    def forward(self, words: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(words)
        scores = x @ x.mT
        if attention_mask is not None:
            rows = attention_mask.reshape(len(attention_mask), LONGEST, LONGEST)
            scores = scores.masked_fill(~(rows > 0 if rows.dtype != torch.float32 else rows == 0), -1e9)
        return self.mix(torch.softmax(scores, -1) @ x)


ADDED = torch.where(SEEN, 0.0, torch.finfo(torch.float32).min)

SITUATIONS = {
    "Llama, added to scores": Situation(
        LLAMA, (), "model.layers.1", VALID, {"input_ids": WORDS, "attention_mask": ADDED[:, None]}
    ),
    "Llama, booleans": Situation(LLAMA, (WORDS, SEEN[:, None]), "model.layers.1", VALID),
    "(B, T, T), booleans": Situation(Attention, (WORDS, SEEN), "mix", VALID),
    "(B, T, T), numbers": Situation(Attention, (WORDS, SEEN.long()), "mix", VALID),
    "(B, T, T), added": Situation(Attention, (WORDS, ADDED), "mix", VALID),
    "both directions": Situation(Attention, (WORDS, VALID[:, None].expand(-1, LONGEST, -1)), "mix", VALID),
    "causal, one for all": Situation(Attention, (WORDS, CAUSAL.expand(SAMPLES, -1, -1)), "mix", None),
    "several texts in a sample": Situation(Attention, (WORDS, PACKED), "mix", None, warning="does not show their"),
    "Perceiver, latent vectors": Situation(
        PERCEIVER, (VECTORS, VALID.long()), "encoder.self_attends.1", None, options={"select": 0}
    ),
    "Perceiver, by name": Situation(
        PERCEIVER, (), "encoder.self_attends.0.mlp", None, {"inputs": VECTORS, "attention_mask": VALID.long()}
    ),
    "Q-Former": Situation(q_former, (VECTORS, VALID.long()), "net.encoder.layer.1", None),
    "resampler": Situation(Resampler, (VECTORS, VALID), "block.mix", None),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_value(name: str) -> None:
    check_term(SITUATIONS[name])


def test_masks_of_other_batches() -> None:
    """The padding of each batch is that of its own mask."""
    seen = [CAUSAL & valid[:, None] for valid in (VALID, OTHER)]
    values = run(Attention(8), Attention(12), *[(WORDS, mask) for mask in (*seen, seen[0])])
    assert values[0] == pytest.approx(values[2], rel=1e-5)
    assert values[0] != pytest.approx(values[1], rel=1e-3)


class Marked(nn.Module):
    """Its mask has a name that libraries give to masks of both meanings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)


class Text(Marked):
    def forward(self, words: Tensor, text_mask: Tensor) -> Tensor:
        return self.mix(self.embed(words))


class Nodes(Marked):
    def forward(self, words: Tensor, *, node_mask: Tensor) -> Tensor:
        return self.mix(self.embed(words))


class Special(Marked):
    def forward(self, words: Tensor, special_tokens_mask: Tensor) -> Tensor:
        return self.mix(self.embed(words))


class Valid(Marked):
    def forward(self, words: Tensor, valid_mask: Tensor) -> Tensor:
        return self.mix(self.embed(words))


@pytest.mark.parametrize(("build", "argument"), [(Text, "text_mask"), (Nodes, "node_mask")])
def test_a_mask_of_unknown_meaning_is_named(build: type[Marked], argument: str) -> None:
    situation = Situation(build, (WORDS,), "mix", None, {argument: VALID})
    student, teacher = networks(situation)
    with pytest.warns(UserWarning, match=f"The argument '{argument}' of the (student|teacher) may be the padding"):
        found = term(student, teacher, situation)
    assert found == pytest.approx(by_hand(student, teacher, situation), rel=1e-4)


@pytest.mark.parametrize(
    ("build", "argument", "valid"), [(Special, "special_tokens_mask", None), (Valid, "valid_mask", VALID)]
)
def test_a_mask_of_known_meaning(build: type[Marked], argument: str, valid: Tensor | None) -> None:
    situation = Situation(build, (WORDS,), "mix", valid, {argument: VALID})
    check_term(situation)


class Patches(nn.Module):
    """Patches of padded images, as detection transformers take them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.layer = nn.Conv2d(3, width, 4, 4), Encoder(width)

    def forward(self, images: Tensor, pixels: Tensor) -> Tensor:
        seen = nn.functional.max_pool2d(pixels[:, None].float(), 4).flatten(1) > 0
        return self.layer(self.embed(images).flatten(2).mT, attention_mask=seen)


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.mix(x)


def test_padding_of_images_is_read_with_a_warning() -> None:
    pixels = torch.ones(SAMPLES, 16, 16, dtype=torch.bool)
    images = torch.randn(SAMPLES, 3, 16, 16)
    whole = run(Patches(8), Patches(12), (images, pixels), layer="layer.mix")
    assert len(whole) == 1
    pixels[1:, :, 8:] = False
    with pytest.warns(
        UserWarning, match="which are the patches of a map and are pooled like one: their padding is read"
    ):
        run(Patches(8), Patches(12), (images, pixels), layer="layer.mix")
