"""Maps (B, C, F, T) are read whole: where an argument says that some of the input is padding, there is one warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

SAMPLES, FRAMES = 4, 9
LENGTHS = torch.tensor([9, 7, 5, 4])
VALID = torch.arange(FRAMES) < LENGTHS[:, None]
SPECTRA = torch.randn(SAMPLES, 2, 6, FRAMES, generator=torch.Generator().manual_seed(0))


class Spectra(nn.Module):
    """Convolutions over frequencies and times, and what comes of their mean."""

    def __init__(self, width: int, argument: str) -> None:
        super().__init__()
        self.mix, self.down = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, 1)
        self.pool, self.head, self.argument = nn.AdaptiveAvgPool2d(1), nn.Linear(width, 3), argument

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.head(self.pool(self.down(self.mix(batch["x"]))).flatten(1))


class Series(Spectra):
    """Frames (B, C, T)."""

    def __init__(self, width: int, argument: str) -> None:
        super().__init__(width, argument)
        self.mix, self.down = nn.Conv1d(6, width, 3, padding=1), nn.Conv1d(width, width, 3, 2, 1)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.head(self.down(self.mix(batch["x"])).mean(2))


def told(kind: type[Spectra], argument: str, value: Any, layer: str, **options: Any) -> list[str]:
    """What is warned of, with such an argument beside the samples."""
    student, teacher = kind(4, argument), kind(6, argument)
    x = SPECTRA if kind is Spectra else SPECTRA[:, 0]
    transfer = RepresentationTransfer(teacher, [LayerPair(layer, layer, **options)])
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        student({"x": x, argument: value})
        transfer.loss()
    return [str(warning.message) for warning in caught]


KNOWN = [
    ("lengths", LENGTHS),
    ("x_len", LENGTHS),
    ("input_lengths", LENGTHS.int()),
    ("seqlens", LENGTHS.tolist()),
    ("wav_lens", LENGTHS / FRAMES),
    ("num_frames", LENGTHS),
    ("padding_mask", ~VALID),
    ("attention_mask", VALID.long()),
    ("frame_mask", VALID),
]


@pytest.mark.parametrize(("argument", "value"), KNOWN)
@pytest.mark.parametrize("layer", ["mix", "down", "down:input"])
def test_maps_with_padding_are_told(argument: str, value: Any, layer: str) -> None:
    messages = told(Spectra, argument, value, layer)
    what = f"marks padding in its input. The layers [{layer!r}] are maps"
    sides = [f"The argument {argument!r} of the {side} {what}" for side in ("student", "teacher")]
    assert len(messages) == 2, messages
    assert all(message.startswith(start) for message, start in zip(messages, sides, strict=True)), messages
    assert told(Spectra, argument, value, layer, mask=None) == []


def test_a_pooled_map_has_no_padding_left() -> None:
    """Its one position is what the network itself makes of all of them."""
    assert told(Spectra, "padding_mask", ~VALID, "pool") == []


@pytest.mark.parametrize(("argument", "value"), KNOWN[:6])
@pytest.mark.parametrize("layer", ["mix", "down"])
def test_lengths_of_series_are_told(argument: str, value: Any, layer: str) -> None:
    messages = told(Series, argument, value, layer)
    assert len(messages) == 2, messages
    assert all(
        f"The argument {argument!r}" in message and "may give the number of valid positions" in message
        for message in messages
    )


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("caption_lengths", torch.tensor([12, 20, 4, 5])),  # of another input
        ("padding_mask", torch.ones(SAMPLES, 20).tril() > 0),
        ("padding_mask", torch.zeros(SAMPLES, FRAMES, dtype=torch.bool)),  # no padding
        ("wavelength", torch.tensor([0.4, 0.5, 0.6, 0.7])),  # no share of the longest
        ("lengths", LENGTHS[:2]),
        ("labels", LENGTHS),
        ("targets", VALID),
    ],
)
def test_others_are_not(argument: str, value: Any) -> None:
    assert told(Spectra, argument, value, "mix") == []


PIXELS = torch.zeros(SAMPLES, 6, FRAMES, dtype=torch.bool)
PIXELS[0], PIXELS[1, :4, :7], PIXELS[2, :5], PIXELS[3, :, :6] = True, True, True, True
HOLE = torch.zeros(SAMPLES, 6, FRAMES, dtype=torch.bool)
HOLE[:, 2:4, 3:6] = True
HOLES = torch.rand(SAMPLES, 6, FRAMES, generator=torch.Generator().manual_seed(1)) > 0.5


@pytest.mark.parametrize("value", [PIXELS, ~PIXELS, PIXELS.long(), PIXELS.flip(1), PIXELS.float()])
def test_pixels_at_the_edges_are_padding(value: Tensor) -> None:
    messages = told(Spectra, "pixel_mask", value, "mix")
    assert len(messages) == 2
    assert all("'pixel_mask'" in message and "marks padding in its input" in message for message in messages)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("masks", torch.randint(4, (SAMPLES, 6, FRAMES), generator=torch.Generator().manual_seed(2))),  # labels
        ("mask", HOLES),
        ("mask", HOLES[:, None].float()),
        ("mask", torch.ones_like(PIXELS)),
        ("mask", HOLE),
        ("mask", ~HOLE),
    ],
    ids=["labels", "holes", "holes in a channel", "all", "one hole", "all but one hole"],
)
def test_other_masks_of_pixels_are_not(argument: str, value: Tensor) -> None:
    assert told(Spectra, argument, value, "mix") == []


def test_a_named_mask_of_a_map_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"mask='pad' cannot be used for the student layer 'mix', a map of shape"):
        told(Spectra, "pad", VALID, "mix", mask="pad")


@pytest.mark.slow
def test_pixels_of_a_detector() -> None:
    """DETR gets a mask of padded pixels, which its convolutions do not see."""
    transformers = pytest.importorskip("transformers")

    def detr(width: int) -> nn.Module:
        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, width], depths=[1, 1, 1, 1], out_features=["stage4"]
        )
        sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        config = transformers.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            d_model=16,
            num_queries=5,
            **sizes,
            **heads,
        )
        return transformers.DetrModel(config).requires_grad_(True)  # it freezes its backbone

    student, teacher = detr(8), detr(12)
    pixels, mask = torch.randn(2, 3, 96, 96), torch.ones(2, 96, 96, dtype=torch.long)
    mask[0, 64:] = 0
    names = [name for name, _ in student.named_modules() if name.endswith("encoder.stages.2")]
    for given, expected in ((mask, 2), (torch.ones_like(mask), 0)):
        transfer = RepresentationTransfer(teacher, names)
        with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
            warnings.simplefilter("always")
            student(pixel_values=pixels, pixel_mask=given)
            transfer.loss()
        messages = [str(warning.message) for warning in caught if "are maps" in str(warning.message)]
        assert len(messages) == expected, messages
