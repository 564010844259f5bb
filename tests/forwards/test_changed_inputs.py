"""Networks that change what they are given: each further forward of the first batch gets it as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

WORDS, LONGEST = 30, 9
VALID = torch.arange(LONGEST) < torch.tensor([[3], [9], [5], [4], [7], [6]])


class Tower(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (nn.TransformerEncoderLayer(width, 2, 8, 0.0, batch_first=True) for _ in "ab")
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SeesAndReads(nn.Module):
    """It may take the values out of its batch. The image has as many patches as the text has words."""

    def __init__(self, width: int, *, pops: bool) -> None:
        super().__init__()
        self.pops = pops
        self.embed, self.project = nn.Embedding(WORDS, width), nn.Linear(6, width)
        self.text, self.image, self.head = Tower(width), Tower(width), nn.Linear(2 * width, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        take = batch.pop if self.pops else batch.__getitem__
        words, patches, valid = take("input_ids"), take("patches"), take("attention_mask")[..., None]
        # The sum hides from which tensor the patches come, as positions that are added do.
        text, image = self.text(self.embed(words)), self.image(self.project(patches) + 0)
        return self.head(torch.cat([(text * valid).sum(1) / valid.sum(1), image.mean(1)], 1))


def _told(*, pops: bool) -> tuple[float, list[str]]:
    torch.manual_seed(0)
    student, teacher = SeesAndReads(8, pops=pops), SeesAndReads(6, pops=pops)
    batch = {
        "input_ids": torch.randint(1, WORDS, VALID.shape),
        "attention_mask": VALID,
        "patches": torch.randn(*VALID.shape, 6),
    }
    transfer = RepresentationTransfer(teacher, ["image.layers.1", "text.layers.1"])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with transfer.attached(student):
            student(batch)
            value = transfer.loss().item()
    return value, [str(each.message) for each in found]


def test_masks_are_settled_as_without_the_change() -> None:
    value, told = _told(pops=False)
    assert any("another sequence than the first one" in each for each in told)
    assert _told(pops=True) == (value, told)


#: Means of what forwards got; not in the module, whose attributes further forwards put back.
MEANS: list[float] = []


class Normalises(nn.Module):
    """Scales its images in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.div_(255).sub_(0.5)
        MEANS.append(float(x.mean()))
        return self.head(self.net(x).mean((2, 3)))


@pytest.mark.parametrize("layers", ["auto", "matched"])
def test_no_forward_gets_images_that_are_scaled_already(layers: str) -> None:
    torch.manual_seed(0)
    student, teacher, images = Normalises(4), Normalises(6), 255 * torch.rand(8, 3, 16, 16)
    given = images.clone()
    MEANS.clear()
    transfer: Any = RepresentationTransfer(teacher, layers)
    with transfer.attached(student):
        with pytest.warns(UserWarning, match="writes to its inputs in place"):
            student(images)
        transfer.loss()
    # Twice scaled ones would have a mean of -0.5. Probes with other rows differ a little.
    assert len(MEANS) > 2
    assert all(mean > -0.2 for mean in MEANS)
    torch.testing.assert_close(images, given / 255 - 0.5)
