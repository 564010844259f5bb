"""Decoders whose inputs are made from labels: the positions without a label are their padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forwards.masked import (
    HALVED,
    LENGTHS,
    LONGEST,
    MORE_WORDS,
    OTHER,
    SAMPLES,
    VALID,
    WORDS,
    Situation,
    _sequence,
    _t5,
    _tiny,
    _whisper,
    hugging_face,
)
from forwards.masked_terms import by_hand, check_term, networks, term
from helpers import with_slow
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

#: As many positions as the source has, so that a mask of the encoder would fit too.
LABELS = MORE_WORDS.masked_fill(~OTHER, -100)
SHIFTED = torch.cat([torch.ones(SAMPLES, 1, dtype=torch.long), MORE_WORDS[:, :-1]], 1)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = hugging_face("T5ForConditionalGeneration", "T5Config", lambda width: {**_t5(width), **TOKENS})
BART = hugging_face("BartForConditionalGeneration", "BartConfig", lambda width: {**_sequence(width), **TOKENS})
WHISPER = hugging_face("WhisperForConditionalGeneration", "WhisperConfig", _whisper)
CLASSIFIER = hugging_face(
    "BartForSequenceClassification", "BartConfig", lambda width: {**_sequence(width), **TOKENS, "num_labels": 3}
)


def captioner(width: int) -> nn.Module:
    """An encoder of images and a decoder of text, each a network of its own."""
    transformers = pytest.importorskip("transformers")
    sizes = {**_tiny(width), "image_size": 24, "patch_size": 8}
    vision = transformers.ViTConfig(**{key: value for key, value in sizes.items() if key != "vocab_size"})
    text = transformers.BertConfig(**_tiny(width), is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.pad_token_id, config.decoder_start_token_id = 0, 1
    return transformers.VisionEncoderDecoderModel(config)


class Wrapped(nn.Module):
    """A user's own module around such a model, with a part of its arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = T5(width)

    def forward(self, words: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        ids = SHIFTED if labels is None else None
        found = self.inner(words, attention_mask=attention_mask, labels=labels, decoder_input_ids=ids)
        return found.logits  # type: ignore[no-any-return]


BATCH: dict[str, Any] = {"input_ids": WORDS, "attention_mask": VALID.long(), "labels": LABELS}
IMAGES = {"pixel_values": torch.randn(SAMPLES, 3, 24, 24, generator=torch.Generator().manual_seed(6)), "labels": LABELS}
SOUND = {"input_features": torch.randn(SAMPLES, 5, 18, generator=torch.Generator().manual_seed(7)), "labels": LABELS}
FIRST: dict[str, Any] = {"select": 0}
SITUATIONS = {
    "T5, decoder": Situation(T5, (), "decoder.block.1", OTHER, BATCH, options=FIRST),
    "T5, encoder": Situation(T5, (), "encoder.block.1", VALID, BATCH, options=FIRST),
    "T5, logits": Situation(T5, (), "lm_head", OTHER, BATCH),
    "T5, keys of the encoder": Situation(T5, (), "decoder.block.1.layer.1.EncDecAttention.k", VALID, BATCH),
    "T5, a mask of its own": Situation(
        T5, (), "decoder.block.1", VALID, {**BATCH, "decoder_attention_mask": VALID}, options=FIRST
    ),
    "T5, no mask wanted": Situation(T5, (), "lm_head", None, BATCH, options={"mask": None}),
    "T5, whole labels": Situation(T5, (), "decoder.block.0", None, {**BATCH, "labels": MORE_WORDS}, options=FIRST),
    "BART, decoder": Situation(BART, (), "model.decoder.layers.1", OTHER, BATCH),
    "BART, ids of the decoder beside labels": Situation(
        BART, (), "model.decoder.layers.1", OTHER, {**BATCH, "decoder_input_ids": SHIFTED}
    ),
    "BART, queries": Situation(BART, (), "model.decoder.layers.0.encoder_attn.q_proj", OTHER, BATCH),
    "Whisper, decoder": Situation(WHISPER, (), "model.decoder.layers.1", OTHER, SOUND),
    "Whisper, embedding": Situation(WHISPER, (), "model.decoder.embed_tokens", OTHER, SOUND),
    "Whisper, encoder": Situation(
        WHISPER,
        (),
        "model.encoder.layers.1",
        HALVED,
        {**SOUND, "attention_mask": torch.arange(18) < 2 * LENGTHS[:, None] - 1},
    ),
    "captions, decoder": Situation(captioner, (), "decoder.bert.encoder.layer.1", OTHER, IMAGES),
    "wrapped, decoder": Situation(Wrapped, (WORDS, VALID, LABELS), "inner.decoder.block.1", OTHER, options=FIRST),
    "wrapped, logits": Situation(Wrapped, (WORDS, VALID, LABELS), "inner.lm_head", OTHER),
    "wrapped, no labels": Situation(Wrapped, (WORDS, VALID), "inner.lm_head", None),
}


@pytest.mark.parametrize("name", with_slow(SITUATIONS, "T5"))
def test_value(name: str) -> None:
    check_term(SITUATIONS[name])


@pytest.mark.parametrize(("build", "layer"), [(T5, "lm_head"), (BART, "model.decoder.layers.1")])
def test_labels_without_padding_first(build: Any, layer: str) -> None:
    student, teacher = networks(Situation(build, (), layer, None))
    whole = {**BATCH, "labels": MORE_WORDS}
    first = RepresentationTransfer(teacher, [LayerPair(layer, layer)], weight=1.0, plan="uniform", memory=0)
    with first.attached(student):
        values = []
        for batch in (whole, {**whole, "labels": None, "decoder_input_ids": SHIFTED}, BATCH):
            student(**batch)
            values.append(float(first.loss().detach()))
    padded = by_hand(student, teacher, Situation(build, (), layer, OTHER, BATCH))
    unpadded = by_hand(student, teacher, Situation(build, (), layer, None, whole))
    assert values[0] == pytest.approx(unpadded, rel=1e-4)
    assert values[2] == pytest.approx(padded, rel=1e-4)


def test_a_label_for_each_sample_is_no_mask() -> None:
    ids = WORDS.clone()
    ids[:, -1] = 2  # the end, where this model takes what it classifies
    student, teacher = networks(Situation(CLASSIFIER, (), "", None))
    batch = {"input_ids": ids, "labels": torch.arange(SAMPLES) % 3}
    situation = Situation(CLASSIFIER, (), "model.decoder.layers.1", None, batch)
    assert term(student, teacher, situation) == pytest.approx(by_hand(student, teacher, situation), rel=1e-4)


@pytest.mark.parametrize("build", [T5, Wrapped])
def test_distilled_logits(build: Any) -> None:
    """T² KL over the positions with a label, of as many source positions and with another mask."""
    student, teacher = networks(Situation(build, (), "", None))
    args, kwargs = ((), BATCH) if build is T5 else ((WORDS, VALID, LABELS), {})
    layer = "lm_head" if build is T5 else "inner.lm_head"
    transfer = RepresentationTransfer(teacher, {layer: layer}, distillation=1.0)
    with transfer.attached(student):
        student(*args, **kwargs)
        transfer.loss()
    found = [net(*args, **kwargs) for net in (student, teacher)]
    logits = [(each if isinstance(each, Tensor) else each.logits)[OTHER].detach() / 4 for each in found]
    expected = 16 * nn.functional.kl_div(
        *[each.log_softmax(-1) for each in logits], reduction="batchmean", log_target=True
    )
    assert float(transfer.distillation_value) == pytest.approx(float(expected), rel=1e-4)


def test_a_side_without_labels() -> None:
    student, teacher = T5(8), T5(12)

    def without(**batch: Tensor) -> dict[str, Tensor]:
        return {**{name: value for name, value in batch.items() if name != "labels"}, "decoder_input_ids": SHIFTED}

    pair = LayerPair("lm_head", "lm_head")
    transfer = RepresentationTransfer(teacher, [pair], plan="uniform", teacher_inputs=without)
    with transfer.attached(student):
        with pytest.warns(UserWarning, match=r"one side only: no mask was found for the teacher layers"):
            student(**BATCH)
        transfer.loss()


def test_the_batch_has_padding_of_both_kinds() -> None:
    assert (LABELS == -100).any(1).sum() == SAMPLES - 1
    assert LABELS.shape == WORDS.shape == (SAMPLES, LONGEST)


def test_samples_without_a_label() -> None:
    student, teacher = networks(SITUATIONS["T5, logits"])
    empty = {**BATCH, "labels": LABELS.index_fill(0, torch.tensor([2]), -100)}
    with pytest.warns(UserWarning, match="'labels' of the .* leaves no token in 1 samples.*read as zeros"):
        term(student, teacher, Situation(T5, (), "lm_head", None, empty))
