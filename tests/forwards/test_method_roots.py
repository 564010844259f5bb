"""A method of the student as root: the teacher runs its own method of that name, not its forward."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

X = seeded(0, torch.randn, 16, 8)
IMAGES = seeded(1, torch.randn, 8, 3, 16, 16)


class Flow(nn.Module):
    """Its inverse runs the same layers on other values, the last one first."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            a, b = x.chunk(2, -1)
            x = torch.cat([b + step(a), a], -1)
        return x

    def inverse(self, z: Tensor) -> Tensor:
        for step in reversed(self.steps):
            b, a = z.chunk(2, -1)
            z = torch.cat([a, b - step(a)], -1)
        return z


class AutoEncoder(nn.Module):
    """Images and codes have one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))
        self.decoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, x: Tensor) -> Tensor:
        return self.decoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def _clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 9, "eos_token_id": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def _vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=12, num_heads=2)


class Task(nn.Module):
    """A network inside of a task."""

    def __init__(self) -> None:
        super().__init__()
        self.net = AutoEncoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


#: The network, the root, what is called, and layers that run in it.
CALLS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Any], Any], list[str]]] = {
    "inverse of a flow": (Flow, ":inverse", lambda net: net.inverse(X), ["steps.0.1", "steps.2.1"]),
    "decoder": (AutoEncoder, ":decode", lambda net: net.decode(IMAGES), ["decoder.1"]),
    "encoder": (AutoEncoder, ":encode", lambda net: net.encode(IMAGES), ["encoder.1"]),
    "inside of a task": (
        Task,
        "net:decode",
        lambda task: task.net.decode(IMAGES),
        ["net.decoder.1"],
    ),
    "images of CLIP": (
        _clip,
        ":get_image_features",
        lambda net: net.get_image_features(pixel_values=IMAGES),
        ["vision_model.encoder.layers.1"],
    ),
    "features of timm": (_vit, ":forward_features", lambda net: net.forward_features(IMAGES), ["blocks.1"]),
    "intermediate layers of timm": (
        _vit,
        ":forward_intermediates",
        lambda net: net.forward_intermediates(IMAGES, indices=1),
        ["blocks.1"],
    ),
}


def _value(student: nn.Module, teacher: nn.Module, root: str, call: Callable[[Any], Any], layers: Any) -> float:
    transfer = RepresentationTransfer(teacher, layers, weight=1.0, plan="identity", student_root=root)
    with transfer.attached(student):
        call(student)
        value = float(transfer.loss().detach())
    assert transfer.pairing is not None
    assert f"teacher: its method {root.partition(':')[2]!r}" in transfer.pairing.note
    return value


@pytest.mark.parametrize("is_task", [True, False], ids=["teacher is a task", "teacher is the network"])
@pytest.mark.parametrize("name", CALLS)
def test_a_copy_as_teacher_is_at_distance_0(name: str, is_task: bool) -> None:
    build, root, call, layers = CALLS[name]
    student = seeded(3, build).eval()
    teacher = copy.deepcopy(student)
    pairs: Any = layers
    if isinstance(student, Task) and not is_task:
        teacher, pairs = teacher.net, {layer: layer.removeprefix("net.") for layer in layers}
    assert _value(student, teacher, root, call, pairs) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("words", ["auto", "matched"])
def test_layers_by_words(words: str) -> None:
    student = seeded(3, _vit).eval()
    call = CALLS["features of timm"][2]
    assert _value(student, copy.deepcopy(student), ":forward_features", call, words) == pytest.approx(0, abs=1e-5)


def test_a_cache_knows_the_method(tmp_path: Path) -> None:
    """The same images are read again by another method."""
    student = seeded(3, AutoEncoder)
    teacher = seeded(4, AutoEncoder)
    found = []
    for cache in (tmp_path / "store", None):
        for method in ("decode", "encode"):
            transfer = RepresentationTransfer(
                teacher,
                [f"{method}r.1"],
                weight=1.0,
                plan="identity",
                student_root=f":{method}",
                teacher_cache=None if cache is None else str(cache),
            )
            with transfer.attached(student):
                for _ in range(2):
                    getattr(student, method)(IMAGES)
                    loss = transfer.loss()
            found.append(float(loss.detach()))
    assert found[:2] == pytest.approx(found[2:], rel=1e-5)


class Masked(nn.Module):
    """Its method has the mask first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)

    def features(self, attention_mask: Tensor, words: Tensor) -> Tensor:
        return self.mix(self.embed(words))

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return self.features(attention_mask, words)


@pytest.mark.parametrize("cached", [True, False])
def test_masks_of_the_method(cached: bool) -> None:
    words = seeded(5, torch.randint, 3, 50, (6, 9))
    valid = torch.arange(9) < torch.tensor([[3], [9], [5], [4], [7], [6]])
    values = []
    for padding in (words, torch.where(valid, words, (words + 7) % 50)):
        student, teacher = seeded(6, Masked, 8), seeded(7, Masked, 12)
        cache = "memory" if cached else None
        transfer = RepresentationTransfer(
            teacher, ["mix"], weight=1.0, plan="uniform", student_root=":features", teacher_cache=cache
        )
        with warnings.catch_warnings(), transfer.attached(student):
            warnings.simplefilter("error")
            student.features(valid, padding)
            values.append(float(transfer.loss().detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_features_that_are_taken_for_logits() -> None:
    """What the task makes of them lies outside of the method."""
    student, teacher = seeded(3, AutoEncoder), seeded(4, AutoEncoder)
    transfer = RepresentationTransfer(teacher, ["encoder.1"], student_root=":encode", distillation=1.0)
    with transfer.attached(student):
        student.decode(student.encode(IMAGES))
        with pytest.warns(UserWarning, match=r"outside of the root ':encode': 'decoder.0', 'decoder.2'.*as logits"):
            transfer.loss()
        student.decode(student.encode(IMAGES))
        transfer.loss()


class Plain(nn.Module):
    """Has no such method."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)


@pytest.mark.parametrize("options", [{}, {"teacher_inputs": lambda x: x}], ids=["no such method", "teacher_inputs"])
def test_the_forward_of_the_teacher_where_it_has_no_such_method_or_gets_its_own_inputs(options: dict[str, Any]) -> None:
    student, teacher = seeded(3, AutoEncoder), Plain()
    teacher.decoder.load_state_dict(student.decoder.state_dict())
    if options:
        object.__setattr__(teacher, "decode", lambda x: teacher.decoder(x + 1))
    transfer = RepresentationTransfer(
        teacher, ["decoder.1"], weight=1.0, plan="identity", student_root=":decode", **options
    )
    with transfer.attached(student):
        student.decode(IMAGES)
        assert float(transfer.loss().detach()) == pytest.approx(0, abs=1e-5)


class Reader(nn.Module):
    """Its method gets the mask, and no inner module does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(10, width), nn.Linear(width, width)

    def encode(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.embedding(ids))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encode(ids, attention_mask)


def test_a_compiled_teacher_has_the_masks_of_its_method() -> None:
    ids, mask = torch.randint(1, 10, (4, 20)), torch.ones(4, 20, dtype=torch.long)
    mask[:2, 12:] = 0
    values = []
    for wrap in (lambda net: net, lambda net: torch.compile(net, backend="eager")):
        transfer = RepresentationTransfer(wrap(seeded(1, Reader, 6)), {"layer": "layer"}, student_root=":encode")
        with transfer.attached(student := seeded(0, Reader, 4)):
            for _ in range(2):
                student.encode(ids, mask)
                values.append(float(transfer.loss().detach()))
    assert values[2:] == pytest.approx(values[:2], rel=1e-5)
