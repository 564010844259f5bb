"""Tokens that one network alone adds to its input: a warning, and the right value where the advice is followed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from forwards.masked import LONGEST, VALID, WORDS
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

PROMPTS = 4


class Words(nn.Module):
    """A text network with as many learned prompts before its tokens as are asked for."""

    def __init__(self, width: int, prompts: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.prompts = nn.Parameter(torch.randn(prompts, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.tokens = nn.Identity()
        self.head = nn.Linear(width, 3)

    def forward(self, words: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        count = len(self.prompts)
        inside = torch.cat([self.prompts.expand(len(words), -1, -1), self.embed(words)], 1)
        valid = torch.ones_like(words) if attention_mask is None else attention_mask
        padding = torch.cat([valid.new_ones(len(words), count), valid], 1) == 0
        return self.head(self.tokens(self.block(inside, src_key_padding_mask=padding)[:, count:]).mean(1))


def _bert(width: int, prompts: int) -> nn.Module:
    """The same around a model of Hugging Face, which gets embeddings in place of ids."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}

    class Bert(Words):
        def __init__(self) -> None:
            super().__init__(width, prompts)
            self.block = transformers.BertModel(transformers.BertConfig(hidden_size=width, **sizes))

        def forward(self, words: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            count = len(self.prompts)
            valid = torch.ones_like(words) if attention_mask is None else attention_mask
            inside = torch.cat([self.prompts.expand(len(words), -1, -1), self.embed(words)], 1)
            mask = torch.cat([valid.new_ones(len(words), count), valid], 1)
            hidden = self.block(inputs_embeds=inside, attention_mask=mask).last_hidden_state
            return self.head(self.tokens(hidden[:, count:]).mean(1))

    return Bert().eval()


BUILDS: dict[str, tuple[Callable[[int, int], nn.Module], str]] = {
    "by hand": (Words, "block"),
    "BERT": (_bert, "block.encoder.layer.0"),
}


def _term(student: nn.Module, teacher: nn.Module, pair: LayerPair, mask: Tensor | None) -> float:
    transfer = RepresentationTransfer(teacher, [pair], weight=1.0, plan="uniform")
    with transfer.attached(student):
        student(WORDS, mask)
        return float(transfer.loss().detach())


@pytest.mark.parametrize("mask", [VALID.long(), None], ids=["mask", "no mask"])
@pytest.mark.parametrize("name", BUILDS)
def test_warning(name: str, mask: Tensor | None) -> None:
    build, layer = BUILDS[name]
    for prompts, side in (((PROMPTS, 0), "student"), ((0, PROMPTS), "teacher"), ((PROMPTS + 1, 1), "student")):
        student, teacher = build(8, prompts[0]), build(12, prompts[1])
        with pytest.warns(UserWarning, match=rf"The {side} adds {PROMPTS} more tokens .*\['{layer}'\]"):
            _term(student, teacher, LayerPair(layer, layer), mask)


@pytest.mark.parametrize("mask", [VALID.long(), None], ids=["mask", "no mask"])
@pytest.mark.parametrize("name", BUILDS)
def test_what_the_warning_advises(name: str, mask: Tensor | None) -> None:
    build, layer = BUILDS[name]
    student, teacher = build(8, PROMPTS), build(12, 0)
    kept: list[Tensor] = []
    hooks = [net.tokens.register_forward_hook(lambda *call: kept.append(call[2])) for net in (student, teacher)]
    for net in (student, teacher):
        net(WORDS, mask)
    for hook in hooks:
        hook.remove()
    valid = torch.ones(len(WORDS), LONGEST, dtype=torch.bool) if mask is None else VALID
    segments = [
        [
            nn.functional.adaptive_avg_pool1d(x[keep].double().T[None], LONGEST)[0]
            for x, keep in zip(tokens, valid, strict=True)
        ]
        for tokens in kept
    ]
    rows = [torch.cat(samples, 1).detach() for samples in segments]
    expected = float((1 - torch.corrcoef(torch.cat(rows))[:8, 8:]).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _term(student, teacher, LayerPair("tokens", "tokens", neuron_axis=-1), mask) == pytest.approx(
            expected, rel=1e-4
        )
        _term(student, teacher, LayerPair(layer, layer, mask=None), mask)


@pytest.mark.parametrize("prompts", [0, PROMPTS])
@pytest.mark.parametrize("name", BUILDS)
def test_no_warning_where_both_add_the_same(name: str, prompts: int) -> None:
    build, layer = BUILDS[name]
    for mask in (VALID.long(), None):
        _term(build(8, prompts), build(12, prompts), LayerPair(layer, layer), mask)
