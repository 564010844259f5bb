"""What makes the output of a model is no block, in whatever form it is returned; what only looks like it is one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_otrt import RepresentationTransfer
from lightning_otrt.layers.automatic import block_names
from lightning_otrt.layers.model_output import output_layers
from lightning_otrt.reading.tracer import trace

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Dense(nn.Module):
    """A map of as many channels as are asked for, and what is made of it at the end."""

    def __init__(self, channels: int, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.GELU())
        self.out, self.end = nn.Conv2d(6, channels, 1), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.out(self.up(self.down(x))))


ENDS: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "as it is": (5, lambda x: x),
    "squeezed": (1, lambda x: x.squeeze(1)),
    "the first channel": (2, lambda x: x[:, 0]),
    "scaled": (1, lambda x: 10 * x.sigmoid().squeeze(1)),
    "enlarged and squeezed": (1, lambda x: nn.functional.interpolate(x, scale_factor=2).squeeze(1)),
    "split": (7, lambda x: x.split([4, 2, 1], 1)),
    "a mapping of parts": (7, lambda x: [{"heat": x[:, :3], "size": x[:, 3:5], "offset": x[:, 5:]}]),
    "pixels in a row": (7, lambda x: x.flatten(2).transpose(1, 2)),
    "pixels shuffled": (12, lambda x: nn.functional.pixel_shuffle(x, 2)),
    "classes alone": (5, lambda x: x.argmax(1)),
}


@pytest.mark.parametrize("name", ENDS)
def test_forms_of_an_output(name: str) -> None:
    net = Dense(*ENDS[name]).eval()
    found = trace(net, (IMAGES,))
    assert "out" in output_layers(found)
    assert block_names(found) == ["down", "up"]


class Shuffled(nn.Module):
    """ESPCN: what is shuffled to the larger image is added to the enlarged input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.c, self.shuffle = nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shuffle(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))


class Body(nn.Module):
    """Maps of three sizes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 12, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class Yolo(nn.Module):
    """One head for each size, and all boxes in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = Body(), nn.ModuleList(nn.Conv2d(n, 3 * 7, 1) for n in (8, 12, 16))

    def forward(self, x: Tensor) -> Tensor:
        boxes = [head(level) for head, level in zip(self.heads, self.body(x), strict=True)]
        return torch.cat([box.unflatten(1, (3, 7)).flatten(3).transpose(2, 3).flatten(1, 2) for box in boxes], 1)


class SingleShot(nn.Module):
    """Two heads for each size: classes and places; what is returned are the best boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.kinds = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, n, 3, padding=1), nn.Conv2d(n, 8, 1)) for n in (8, 12, 16)
        )
        self.places = nn.ModuleList(nn.Conv2d(n, 8, 3, padding=1) for n in (8, 12, 16))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = self.body(x)
        kinds, places = (
            torch.cat([head(level).flatten(2) for head, level in zip(heads, levels, strict=True)], 2)
            for heads in (self.kinds, self.places)
        )
        best = kinds.amax(1).topk(5).indices[:, None].expand(-1, 8, -1)
        return {"boxes": places.gather(2, best).flatten(0, 1), "scores": kinds.gather(2, best).flatten()}


@pytest.mark.parametrize(
    ("build", "heads", "blocks"),
    [
        (Shuffled, {"c", "shuffle"}, ["a", "b"]),
        (Yolo, {f"heads.{level}" for level in range(3)}, [f"body.stages.{level}" for level in range(3)]),
        (
            SingleShot,
            {*(f"kinds.{level}" for level in range(3)), *(f"places.{level}" for level in range(3))},
            [f"kinds.{level}.0" for level in range(3)],
        ),
    ],
)
def test_heads(build: Callable[[], nn.Module], heads: set[str], blocks: list[str]) -> None:
    found = trace(build().eval(), (IMAGES,))
    assert heads <= output_layers(found)
    assert block_names(found) == blocks


class Functional(nn.Module):
    """Code between the modules carries each output on: into a sum, a concatenation, a product and an activation."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.gate, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.down, self.end = nn.Conv2d(8, 8, 3, 2, 1), end

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.first(x))
        x = x * torch.sigmoid(self.gate(x))
        x = torch.relu(self.second(torch.cat([x, self.first.weight.new_zeros(x.shape)], 1)))
        return self.end(torch.relu(self.down(x)))


@pytest.mark.parametrize(
    "end",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        nn.Sequential(nn.Flatten(), nn.Linear(8 * 256, 5)),
        nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)),
    ],
    ids=["pooled", "flat", "dense"],
)
def test_layers_that_code_between_modules_carries_on(end: nn.Module) -> None:
    found = trace(Functional(end).eval(), (IMAGES,))
    assert not {"stem", "first", "gate", "second", "down"} & output_layers(found)


class Trunk(nn.Module):
    """Its code adds what entered it to what its last layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.after = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU()), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.body(x))


def test_a_layer_that_the_code_of_its_container_carries_on() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Trunk(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)).eval()
    found = trace(net, (IMAGES,))
    assert output_layers(found) - {""} == {"2", "3"}
    assert block_names(found) == ["1"]


def test_layers_that_get_the_output_of_a_container() -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.trunk = nn.Conv2d(3, 8, 3, 2, 1), Trunk()
            self.heads = nn.ModuleList(nn.Conv2d(8, size, 1) for size in (4, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(self.stem(x))
            return torch.cat([head(x).flatten(1) for head in self.heads], 1)

    found = trace(Levels().eval(), (IMAGES,))
    assert output_layers(found) == {"heads.0", "heads.1"}
    assert block_names(found) == ["trunk"]


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_weights_that_are_computed(norm: Callable[[nn.Module], nn.Module]) -> None:
    """The modules that compute the weights run inside of the layers, which have no other layer inside."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.stage = nn.Conv2d(3, 8, 3, 2, 1), norm(nn.Conv2d(8, 10, 3, 2, 1))
            self.out = norm(nn.Conv2d(10, 5, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(nn.functional.gelu(self.stage(self.stem(x))))

    found = trace(Normed().eval(), (IMAGES,))
    assert output_layers(found) - {""} == {"out"}
    assert block_names(found) == ["stem", "stage"]


_VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}


def _dpt() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.DPTConfig(
        **_VIT, patch_size=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=16
    )
    return transformers.DPTForDepthEstimation(config)


def _swin2sr() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Swin2SRConfig(
        image_size=32, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=4, upsampler="pixelshuffledirect"
    )
    return transformers.Swin2SRForImageSuperResolution(config)


def _ssdlite() -> nn.Module:
    detection = pytest.importorskip("torchvision").models.detection
    return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


@pytest.mark.parametrize(
    ("build", "inputs", "heads"),
    [
        (_dpt, (IMAGES,), ("head.head.4",)),
        (_swin2sr, (IMAGES,), ("upsample", "upsample.conv")),
        (
            _ssdlite,
            ([torch.rand(3, 320, 320) for _ in range(2)],),
            tuple(
                f"head.{kind}_head.module_list.{level}"
                for kind in ("classification", "regression")
                for level in range(6)
            ),
        ),
    ],
    ids=["DPT", "Swin2SR", "SSDLite"],
)
def test_real_networks(build: Callable[[], nn.Module], inputs: tuple[Any, ...], heads: tuple[str, ...]) -> None:
    found = trace(build().eval(), inputs)
    assert set(heads) <= output_layers(found)
    assert not set(heads) & set(block_names(found))


def test_the_last_block_of_a_real_network_stays() -> None:
    """What ``conv_after_body`` makes is added to what enters the trunk, by the code of the trunk."""
    found = trace(_swin2sr().eval(), (IMAGES,))
    assert output_layers(found) - {""} == {"upsample", "upsample.conv", "upsample.pixel_shuffle"}
    assert "swin2sr.conv_after_body" in block_names(found)


def test_the_term_of_a_detector() -> None:
    torch.manual_seed(0)
    student, teacher = Yolo(), Yolo()
    transfer = RepresentationTransfer(teacher, weight=1.0)
    with transfer.attached(student):
        student(IMAGES)
        assert float(transfer.loss().detach()) > 0
    assert [pair.student for pair in transfer.pairs] == [f"body.stages.{level}" for level in range(3)]
