"""The mask of a text is not that of images or vectors beside it, also where these have as many tokens."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

TOKENS = 16
WORDS = seeded(0, torch.randint, 3, 50, (6, TOKENS))
VALID = torch.arange(TOKENS) < torch.tensor([[3], [16], [5], [4], [7], [12]])
IMAGES = seeded(1, torch.randn, 6, 3, 32, 32)
VECTORS = seeded(2, torch.randn, 6, TOKENS, 8)


class Towers(nn.Module):
    """Words beside images of 4 x 4 patches, or beside vectors that go through a projection."""

    def __init__(self, width: int, *, sees: bool) -> None:
        super().__init__()
        self.embed, self.sees = nn.Embedding(50, width), sees
        self.start = nn.Conv2d(3, width, 8, 8) if sees else nn.Linear(8, width)
        self.other, self.text = (nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True) for _ in "ab")
        self.tower = Tower(self.start, self.other) if sees else None
        self.head = nn.Linear(2 * width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, values: Tensor) -> Tensor:
        text = self.text(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        other = self.tower((values - 0.5) / 0.5) if self.tower is not None else self.other(self.start(values))
        return self.head(torch.cat([text.mean(1), other.mean(1)], 1))


class Tower(nn.Module):
    """Gets images that no input of the network is any more."""

    def __init__(self, patches: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.patches, self.block = patches, block

    def forward(self, images: Tensor) -> Tensor:
        return self.block(self.patches(images).flatten(2).transpose(1, 2))


def _term(sees: bool, padding: Tensor, **options: Any) -> tuple[float, list[str]]:
    student, teacher = (seeded(number, Towers, width, sees=sees) for number, width in ((3, 8), (4, 12)))
    transfer = RepresentationTransfer(teacher, ["other"], weight=1.0, plan="uniform", **options)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student.eval()):
        warnings.simplefilter("always")
        student(WORDS, padding, IMAGES if sees else VECTORS)
        return float(transfer.loss().detach()), [str(warning.message) for warning in caught]


def test_images() -> None:
    """Without a word, since images have no padding."""
    expected, _ = _term(True, torch.ones_like(VALID).long())
    assert _term(True, VALID.long()) == (pytest.approx(expected, rel=1e-6), [])


def test_vectors() -> None:
    """They may have the padding of the words, so a warning says that it is not used."""
    expected, _ = _term(False, torch.ones_like(VALID).long())
    found, messages = _term(False, VALID.long())
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(messages) == 2
    assert all("get another sequence than the first one" in message for message in messages)


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_vision_language_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"transformers has no {name}")
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**vision, "num_key_value_heads": 2, "vocab_size": 60, "pad_token_id": 1}
    options = {
        "vision_config": {**vision, "image_size": 32, "patch_size": 8},
        "text_config": {"model_type": "llama", **text},
        "scale_factor": 2,
        "image_token_id": 59,
        "pad_token_id": 1,
    }
    words = torch.where(VALID, WORDS, 1)
    words[:, :4], valid = 59, VALID.clone()
    valid[:, :4] = True
    values = []
    for mask in (valid, torch.ones_like(valid)):
        torch.manual_seed(0)
        student, teacher = (getattr(transformers, f"{name}Model")(config(**options)).eval() for _ in "ab")
        layer = next(key for key, _ in student.named_modules() if key.endswith("encoder.layers.0") and "vision" in key)
        transfer = RepresentationTransfer(teacher, [layer], weight=1.0, plan="uniform")
        with warnings.catch_warnings(), transfer.attached(student):
            warnings.simplefilter("ignore")
            student(input_ids=words, attention_mask=mask.long(), pixel_values=IMAGES[:, None])
            values.append(float(transfer.loss().detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


class OneModule(nn.Module):
    """Both towers in one forward, in either order, so that no module around a tower tells its inputs."""

    def __init__(self, width: int, *, image_first: bool) -> None:
        super().__init__()
        self.image_first = image_first
        self.patches, self.embed = nn.Conv2d(3, width, 8, 8), nn.Embedding(50, width)
        self.sees, self.reads = (
            nn.ModuleList(
                nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in "ab"
            )
            for _ in "ab"
        )
        self.head = nn.Linear(width, 3)

    def forward(self, first: Tensor, second: Tensor, attention_mask: Tensor) -> Tensor:
        images, words = (first, second) if self.image_first else (second, first)
        seen, read = self.patches(images).flatten(2).transpose(1, 2), self.embed(words)
        for block in self.sees:
            seen = block(seen)
        for block in self.reads:
            read = block(read)
        return self.head(seen.mean(1) + (read * attention_mask[..., None]).sum(1))


@pytest.mark.parametrize("image_first", [True, False])
@pytest.mark.parametrize("tokens", [TOKENS, 12], ids=["as many tokens as patches", "fewer tokens"])
def test_towers_in_one_forward(image_first: bool, tokens: int) -> None:
    """Without a word: a change of the words shows which layers hold them."""
    layers, found = ["sees.0", "sees.1", "reads.0", "reads.1"], {}
    for kind, mask in (("padded", VALID[:, :tokens].long()), ("full", torch.ones(len(WORDS), tokens).long())):
        student, teacher = (
            seeded(number, OneModule, width, image_first=image_first) for number, width in ((3, 8), (4, 12))
        )
        transfer = RepresentationTransfer(teacher, layers, weight=1.0, plan="uniform")
        with transfer.attached(student):
            inputs = (IMAGES, WORDS[:, :tokens]) if image_first else (WORDS[:, :tokens], IMAGES)
            student(*inputs, mask)
            transfer.loss()
        found[kind] = {distance.name: float(distance.value) for distance in transfer.distances}
    same = [found["padded"][name] == pytest.approx(found["full"][name], rel=1e-6) for name in found["full"]]
    assert same == [True, True, False, False]


class Regions(nn.Module):
    """Vectors of regions beside words, as many of both; each tower with code between its layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.regions, self.embed = nn.Linear(8, width), nn.Embedding(50, width)
        self.sees, self.reads = (nn.ModuleList(nn.Linear(width, width) for _ in "ab") for _ in "ab")
        self.head = nn.Linear(width, 3)

    def forward(self, values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen, read = self.regions(values), self.embed(input_ids)
        for one, other in zip(self.sees, self.reads, strict=True):
            seen, read = seen + one(seen).relu(), read + other(read).relu()
        return self.head(seen.mean(1) + (read * attention_mask[..., None]).sum(1))


def test_regions_beside_words() -> None:
    """They may have the same padding, so a warning says that the mask is not used."""
    student, teacher = seeded(3, Regions, 8), seeded(4, Regions, 12)
    transfer = RepresentationTransfer(teacher, ["sees.1", "reads.1"], weight=1.0, plan="uniform")
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        student(VECTORS, WORDS, VALID.long())
        transfer.loss()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert all("layers ['sees.1'] get another sequence than the first one" in message for message in messages)


class OwnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).relu()


class MaskedTower(nn.Module):
    """Gets a mask of its own, if any."""

    def __init__(self, entered: int, width: int) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Linear(entered, width), nn.ModuleList(OwnBlock(width) for _ in "ab")

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        if attention_mask is None:
            return x.mean(1)
        return (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


class TwoSeries(nn.Module):
    """Two towers of vectors, of which one or both get a mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.text, self.video = MaskedTower(5, width), MaskedTower(8, width)
        self.head = nn.Linear(2 * width, 3)

    def join(self, text: Tensor, video: Tensor) -> Tensor:
        return self.head(torch.cat([text, video], 1))


class BothMasked(TwoSeries):
    def forward(self, text: Tensor, video: Tensor, attention_mask: Tensor, video_mask: Tensor) -> Tensor:
        return self.join(self.text(text, attention_mask), self.video(video, attention_mask=video_mask))


class VideoFirst(TwoSeries):
    def forward(self, video: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        return self.join(self.text(text, attention_mask), self.video(video))


SERIES = seeded(5, torch.randn, 6, TOKENS, 5)
OTHER_VALID = VALID.flip(0)
SERIES_LAYERS = [f"{tower}.blocks.{index}" for tower in ("text", "video") for index in (0, 1)]


def _distances(kind: type[nn.Module], *args: Tensor) -> tuple[list[float], list[str]]:
    transfer = RepresentationTransfer(seeded(4, kind, 12), SERIES_LAYERS, weight=1.0, plan="uniform")
    with warnings.catch_warnings(record=True) as caught, transfer.attached(seeded(3, kind, 8)) as attached:
        warnings.simplefilter("always")
        attached.student(*args)
        transfer.loss()
    return [float(distance.value) for distance in transfer.distances], [str(each.message) for each in caught]


def test_each_tower_has_the_mask_that_its_own_module_gets() -> None:
    padded = SERIES.where(VALID[..., None], 9.0), VECTORS.where(OTHER_VALID[..., None], 9.0)
    found, messages = _distances(BothMasked, SERIES, VECTORS, VALID.float(), OTHER_VALID.float())
    assert messages == []
    assert found == pytest.approx(_distances(BothMasked, *padded, VALID.float(), OTHER_VALID.float())[0], rel=1e-5)


def test_a_tower_without_a_mask_beside_one_with() -> None:
    """Of two series nothing tells whose mask that of the network is, so the tower without one is told of."""
    found, messages = _distances(VideoFirst, VECTORS, SERIES, VALID.float())
    padded, _ = _distances(VideoFirst, VECTORS, SERIES.where(VALID[..., None], 9.0), VALID.float())
    assert found == pytest.approx(padded, rel=1e-5)
    other_mask, _ = _distances(VideoFirst, VECTORS, SERIES, OTHER_VALID.float())
    assert found[2:] == pytest.approx(other_mask[2:], rel=1e-6)
    assert len(messages) == 2
    assert all("['video.blocks.0', 'video.blocks.1'] get another sequence" in message for message in messages)


class WithTimes(nn.Module):
    """A series with the features of its times: one sequence in two arguments, and one mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.series, self.times = nn.Linear(5, width), nn.Linear(8, width)
        self.blocks = nn.ModuleList(OwnBlock(width) for _ in "ab")
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, times: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.series(x) + self.times(times)
        for block in self.blocks:
            x = block(x)
        return self.head((x * attention_mask[..., None]).sum(1))


def test_inputs_that_are_added_up_have_one_mask() -> None:
    values = []
    for filler in (0.0, 9.0):
        transfer = RepresentationTransfer(seeded(4, WithTimes, 12), ["blocks.0", "blocks.1"], plan="uniform")
        with transfer.attached(seeded(3, WithTimes, 8)) as attached:
            valid = VALID[..., None]
            attached.student(SERIES.where(valid, filler), VECTORS.where(valid, filler), VALID.float())
            values.append(float(transfer.loss().detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
