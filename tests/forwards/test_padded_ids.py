"""Padding that only ids show, in networks with one sequence or two, of which some have a mask."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import seeded, with_slow
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

SAMPLES, LONGEST = 6, 9
FIRST = torch.arange(LONGEST) < torch.tensor([[3], [9], [5], [4], [7], [6]])
WORDS, OTHERS = (seeded(seed, torch.randint, 2, 50, (SAMPLES, LONGEST)) for seed in (0, 1))
BEHIND, IN_FRONT = OTHERS * FIRST, OTHERS * FIRST.flip(1)
SHORT = BEHIND[:, :7]


def _told(student: nn.Module, teacher: nn.Module, layers: list[str], *args: Any, **inputs: Any) -> list[str]:
    transfer = RepresentationTransfer(teacher, layers, weight=1.0, plan="uniform")
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        student(*args, **inputs)
        transfer.loss()
    return [str(warning.message) for warning in caught]


def _t5(width: int) -> nn.Module:
    tf = pytest.importorskip("transformers")
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)).eval()


def _bart(width: int) -> nn.Module:
    tf = pytest.importorskip("transformers")
    sizes = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": width, "vocab_size": 50}
    return tf.BartForConditionalGeneration(tf.BartConfig(**sizes, pad_token_id=0)).eval()


class Translator(nn.Module):
    """Gets the mask of one sequence, and embeds both alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width, padding_idx=0)
        self.encode, self.decode, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 50)

    def forward(self, src: Tensor, tgt: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.head(self.decode(self.embed(tgt)) + self.encode(self.embed(src)).mean(1, keepdim=True))


KINDS = {
    "T5": (_t5, ["encoder.block.1.layer.1", "decoder.block.1.layer.2"], "'decoder' in the {} holds the pad_token_id"),
    "BART": (_bart, ["model.encoder.layers.1", "model.decoder.layers.1"], "of the {} gets its padding_idx"),
}


@pytest.mark.parametrize("kind", with_slow(KINDS, "T5"))
@pytest.mark.parametrize("ids", [SHORT, BEHIND, IN_FRONT], ids=["shorter", "as long", "in front"])
def test_the_mask_of_an_encoder_says_nothing_of_its_decoder(kind: str, ids: Tensor) -> None:
    build, layers, said = KINDS[kind]
    student, teacher, mask = build(8), build(12), FIRST.long()
    given = {"input_ids": WORDS * mask, "attention_mask": mask, "decoder_input_ids": ids}
    messages = [text for text in _told(student, teacher, layers, **given) if "padding is read" in text]
    for side, message in zip(("student", "teacher"), messages, strict=True):
        assert said.format(side) in message
        assert f"for the layers ['{layers[1]}']: their padding is read. Give the network a mask (B, T)" in message
    assert not _told(student, teacher, layers, **given, decoder_attention_mask=(ids != 0).long())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 3])
def test_the_padding_of_an_encoder_is_none_of_its_decoder(kind: str, start: int) -> None:
    build, layers, _ = KINDS[kind]
    ids = OTHERS.clone().index_fill_(1, torch.tensor([0]), start)
    given = {"input_ids": WORDS * FIRST, "attention_mask": FIRST.long(), "decoder_input_ids": ids}
    assert not _told(build(8), build(12), layers, **given)


def test_a_pad_token_without_any_mask() -> None:
    messages = _told(_t5(8), _t5(12), ["encoder.block.1.layer.1"], input_ids=BEHIND, decoder_input_ids=OTHERS)
    assert all("holds the pad_token_id of its configuration at the end of some samples" in text for text in messages)
    assert len(messages) == 2
    # A configuration says nothing of the types of tokens, which are 0, too.
    tf = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
    student, teacher = (tf.BertModel(tf.BertConfig(hidden_size=width, **sizes)).eval() for width in (8, 12))
    assert not _told(student, teacher, ["encoder.layer.1"], input_ids=WORDS, token_type_ids=FIRST.long())


def test_two_sequences_in_an_own_network() -> None:
    given = {"src": BEHIND[:, :8], "tgt": IN_FRONT}
    mask = {"src_key_padding_mask": given["src"] == 0}
    messages = _told(Translator(8), Translator(12), ["decode"], **given, **mask)
    assert len(messages) == 2
    assert all(
        "The embedding 'embed'" in text and "no mask was found for the layers ['decode']" in text for text in messages
    )
    assert not _told(Translator(8), Translator(12), ["decode"], given["src"], OTHERS, **mask)


def _gpt2(width: int) -> nn.Module:
    tf = pytest.importorskip("transformers")
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50, n_embd=width, n_layer=2, n_head=2, n_positions=16)).eval()


class Generator(nn.Module):
    """Causal, with targets that the user shifted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 50)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.mix(self.embed(idx))[0])
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


END = 0
PADDED = OTHERS.masked_fill(~FIRST, END)
LABELS = OTHERS.masked_fill(~FIRST, -100)
PROMPTS = torch.arange(LONGEST) < torch.tensor([[2], [3], [2], [1], [3], [2]])
SHIFTED = OTHERS.masked_fill(~FIRST, -1).roll(-1, 1).index_fill_(1, torch.tensor([LONGEST - 1]), -1)


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        (PADDED, LABELS),
        (PADDED.flip(1), LABELS.flip(1)),
        (PADDED, LABELS.masked_fill(PROMPTS, -100)),
        (PADDED, LABELS.index_fill(0, torch.tensor([1]), -100)),
    ],
    ids=["behind", "in front", "and prompts", "and a sample without labels"],
)
def test_labels_of_a_decoder_alone(ids: Tensor, labels: Tensor) -> None:
    layers, given = ["transformer.h.1"], {"input_ids": ids, "labels": labels}
    messages = _told(_gpt2(8), _gpt2(12), layers, **given)
    for side, message in zip(("student", "teacher"), messages, strict=True):
        assert message.startswith(f"The argument 'labels' of the {side} has no labels at an end of some samples")
        assert "for the layers ['transformer.h.1']: their padding is read. Give the network a mask (B, T)" in message
    assert not _told(_gpt2(8), _gpt2(12), layers, **given, attention_mask=(ids != END).long())


def test_targets_that_were_shifted() -> None:
    messages = _told(Generator(8), Generator(12), ["mix"], PADDED, SHIFTED)
    assert len(messages) == 2
    assert all(
        "The argument 'targets'" in text and "layers ['mix']: their padding is read" in text for text in messages
    )


WITH_START = OTHERS.index_fill(1, torch.tensor([0]), 1)
NEW_LINES = OTHERS.index_fill(1, torch.tensor([LONGEST - 1]), 3).index_fill(1, torch.tensor([LONGEST - 2]), 4)
LAST_TWO = torch.zeros(SAMPLES, LONGEST, dtype=torch.bool).index_fill(1, torch.tensor([LONGEST - 2, LONGEST - 1]), True)


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        (OTHERS, OTHERS),
        (OTHERS, LABELS),
        (OTHERS, OTHERS.masked_fill(PROMPTS, -100)),
        (WITH_START, WITH_START.masked_fill(PROMPTS, -100)),
        (OTHERS, OTHERS.masked_fill(seeded(5, torch.rand, SAMPLES, LONGEST) > 0.2, -100)),
        (OTHERS.index_fill(1, torch.tensor([7, 8]), 0), OTHERS.index_fill(1, torch.tensor([7, 8]), -100)),
        (NEW_LINES, NEW_LINES.masked_fill(LAST_TWO & (torch.arange(SAMPLES) > 1)[:, None], -100)),
        (OTHERS, torch.full_like(OTHERS, -100)),
    ],
    ids=["no padding", "answers", "prompts", "prompts with a start", "masked words", "all alike", "ends", "no labels"],
)
def test_labels_that_show_no_padding(ids: Tensor, labels: Tensor) -> None:
    assert not _told(_gpt2(8), _gpt2(12), ["transformer.h.1"], input_ids=ids, labels=labels)
