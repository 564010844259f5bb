"""The layers that ``"auto"`` chooses where a network has no plain pyramid of maps: right values written by hand."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable

import pytest
import torch
from forwards.architectures import ARCHITECTURES
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer


def chosen(build: Callable[[], nn.Module], *args: object, **batch: object) -> list[tuple[str, str]]:
    torch.manual_seed(0)
    student, teacher = build().eval(), build().eval()
    transfer = RepresentationTransfer(teacher, plan="random")
    with transfer.attached(student):
        student(*args, **batch)
        transfer.loss()
    return [(pair.student, pair.teacher) for pair in transfer.pairs]


def same(*names: str) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


def of_zoo(name: str) -> list[tuple[str, str]]:
    entry = ARCHITECTURES[name]
    batch = entry.inputs(torch.Generator().manual_seed(1))
    floats = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    return chosen(entry.build, **floats)


def generator() -> nn.Module:
    up = [nn.ConvTranspose2d(8, 12, 4), nn.ReLU(), nn.ConvTranspose2d(12, 12, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*up, nn.Conv2d(12, 3, 3, padding=1), nn.Tanh())


def depth_map() -> nn.Module:
    down = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*down, nn.Conv2d(16, 1, 1), nn.Upsample(scale_factor=4), nn.Softplus())


class Pyramid(nn.Module):
    """Gives its coarse map first, as feature pyramids do."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.out_coarse, self.out_fine = (
            nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)) for _ in "ab"
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        fine = self.fine(x)
        coarse = self.out_coarse(self.coarse(fine))
        return [self.out_fine(fine), coarse]


def test_pictures_are_no_representation() -> None:
    assert chosen(generator, torch.randn(4, 8, 1, 1)) == same("1", "3")


def test_a_regression_map_is_no_representation() -> None:
    assert chosen(depth_map, torch.randn(4, 3, 16, 16)) == same("1", "3")


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("lraspp_mobilenet_v3_large", ("classifier", "classifier.low_classifier", "classifier.high_classifier")),
        pytest.param("fcn_resnet50", ("classifier", "classifier.4", "aux_classifier"), marks=pytest.mark.slow),
        ("SegFormer", ("decode_head.classifier",)),
        ("U-Net", ("head", "head.1")),
    ],
)
def test_class_logits_are_no_representation(name: str, logits: tuple[str, ...]) -> None:
    pairs = of_zoo(name)
    assert len(pairs) > 1
    assert not {student for student, _ in pairs} & set(logits)


class Sum(nn.Module):
    """Logits of two resolutions, added up in code."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(width, 5, 1), nn.Conv2d(width, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.coarse(nn.functional.avg_pool2d(x, 2))
        return self.fine(x) + nn.functional.interpolate(small, size=x.shape[-2:])


class Residual(nn.Module):
    """A network whose output is that of a residual block: a representation, with the channels of its input."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x).relu())


class Resized(nn.Module):
    """A body, a head, and the resizing of its output that no module shows."""

    def __init__(self, head: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()), head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(self.head(self.body(x)), size=x.shape[-2:])


@pytest.mark.parametrize(("head", "expected"), [(Sum, same("body")), (Residual, same("head"))])
def test_a_sum_of_logits_is_no_representation_and_a_residual_block_is(
    head: Callable[[], nn.Module], expected: list[tuple[str, str]]
) -> None:
    assert chosen(lambda: Resized(head), torch.randn(4, 3, 16, 16)) == expected


class Output(nn.Module):
    """The end of a block, which gets the residual as an argument, as in Hugging Face."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(3 * width, width), nn.Dropout(0.1)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(hidden)) + residual


class Block(nn.Module):
    def __init__(self, width: int, by_name: bool) -> None:
        super().__init__()
        self.intermediate, self.output, self.by_name = nn.Linear(width, 3 * width), Output(width), by_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.intermediate(x).relu()
        return self.output(hidden=hidden, residual=x) if self.by_name else self.output(hidden, x)


@pytest.mark.parametrize("by_name", [False, True])
def test_the_last_part_of_a_block_that_ends_a_network_is_no_output(by_name: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), *(Block(6, by_name) for _ in range(3)))

    assert chosen(build, torch.randn(4, 7, 5)) == same("1", "2", "3")


@pytest.mark.filterwarnings("ignore:.* has the patches of 2 frames, each of 2 x 2, and it is not known:UserWarning")
@pytest.mark.parametrize("name", ["VideoMAE", "Timesformer"])
def test_blocks_of_video_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 2, "hidden_size": 8, "intermediate_size": 32}
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=2, num_attention_heads=2, **sizes)
    model = getattr(transformers, f"{name}Model")
    assert chosen(lambda: model(config), pixel_values=torch.randn(4, 2, 3, 16, 16)) == same(
        "encoder.layer.0", "encoder.layer.1"
    )


class Sized(nn.Module):
    """A block on tokens that passes rows and columns on, or a cache."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, beside: object) -> tuple[torch.Tensor, object]:
        return x + self.linear(self.norm(x)).relu(), beside


class SizedNet(nn.Module):
    def __init__(self, beside: object) -> None:
        super().__init__()
        self.patches, self.beside = nn.Conv2d(3, 6, 4, 4), beside
        self.blocks = nn.ModuleList(Sized(6) for _ in range(2))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, beside = self.patches(x).flatten(2).mT, self.beside
        for block in self.blocks:
            x, beside = block(x, beside)
        return self.fc(x.mean(1))


@pytest.mark.parametrize("beside", [torch.Size([4, 4]), (4, 4), {"keys": []}, object()])
def test_blocks_that_return_a_tensor_and_something_else(beside: object) -> None:
    assert chosen(lambda: SizedNet(beside), torch.randn(4, 3, 16, 16)) == same("blocks.0", "blocks.1")


@dataclasses.dataclass
class Logits:
    logits: torch.Tensor


class Boxed:
    """A type of a library of its own."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, logits.detach().argmax(1))


class Returning(nn.Module):
    """A segmentation network, or a classifier, that returns its logits in some form, or a loss made of them."""

    def __init__(self, form: Callable[[torch.Tensor], object], head: nn.Module | None = None) -> None:
        super().__init__()
        down = [nn.Sequential(nn.Conv2d(size, 6, 3, 2, 1), nn.ReLU()) for size in (3, 6)]
        self.down = nn.ModuleList(down)
        self.up, self.form = nn.Upsample(scale_factor=4), form
        self.head = nn.Conv2d(6, 5, 1) if head is None else head
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> object:
        return self.form(self.head(self.up(self.down[1](self.down[0](x)))))


RETURNED: list[Callable[[torch.Tensor], object]] = [
    lambda logits: logits,
    lambda logits: {"logits": logits},
    lambda logits: Logits(logits),
    lambda logits: types.SimpleNamespace(logits=logits),
    Boxed,
    lambda logits: [Boxed(logits)],
    loss_of,
    lambda logits: (loss_of(logits), logits.argmax(1)),
    lambda logits: {"loss": loss_of(logits)},
    lambda logits: logits.argmax(1),
]


@pytest.mark.parametrize("form", RETURNED)
def test_logits_are_no_block_in_whatever_form_they_are_returned(form: Callable[[torch.Tensor], object]) -> None:
    assert chosen(lambda: Returning(form), torch.randn(4, 3, 32, 32)) == same("down.0", "down.1", "up")


class Losses(Returning):
    """A loss that is a module runs after two heads."""

    def __init__(self) -> None:
        super().__init__(loss_of)
        self.depth = nn.Conv2d(6, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.down[1](self.down[0](x)))
        depth, logits = self.depth(x), self.head(x)
        return self.criterion(logits, logits.detach().argmax(1)) + depth.square().mean()


def test_heads_of_a_network_that_returns_its_loss() -> None:
    assert chosen(Losses, torch.randn(4, 3, 32, 32)) == same("down.0", "down.1", "up")


def test_the_table_says_what_is_taken_for_the_output() -> None:
    lines: list[str] = []
    transfer = RepresentationTransfer(Returning(loss_of), plan="random")
    transfer.report = lines.append
    with transfer.attached(student := Losses()):
        student(torch.randn(4, 3, 32, 32))
        transfer.loss()
    assert "the student (Losses) returns no logits, map or tokens" in lines[0]
    assert "left out: 'head', 'depth'" in lines[0]
    assert "the teacher (Returning) returns no logits" in lines[0]


@pytest.mark.parametrize("form", [loss_of, lambda logits: Logits(logits), lambda logits: logits[:, 0]])
def test_a_classifier_that_returns_no_logits_has_a_head(form: Callable[[torch.Tensor], object]) -> None:
    def build() -> nn.Module:
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
        return Returning(form, pooled)

    torch.manual_seed(0)
    transfer = RepresentationTransfer(build(), "penultimate", plan="random")
    with transfer.attached(student := build()):
        student(torch.randn(4, 3, 32, 32))
        transfer.loss()
    assert [pair.student for pair in transfer.pairs] == ["head.2:input"]


def test_as_many_channels_as_the_output_is_wide_make_no_output() -> None:
    """16 channels, before a map of one logit and 16 columns."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.body(x)))

    assert chosen(Wide, torch.randn(4, 3, 16, 16)) == same("body")


def test_pyramids_are_paired_by_resolution() -> None:
    assert dict(chosen(Pyramid, torch.randn(4, 3, 16, 16))) == dict(same("out_coarse", "out_fine"))


def test_isotropic_networks_get_spaced_blocks() -> None:
    assert (
        of_zoo("dilated convolutions") == same("blocks.0", "blocks.1", "blocks.2", "blocks.4")
        or len(of_zoo("dilated convolutions")) == 4
    )
    assert len(of_zoo("timm convmixer")) == 4


@pytest.mark.parametrize("name", [pytest.param("T5", marks=pytest.mark.slow), "BART", "Whisper"])
def test_encoder_and_decoder_both_have_blocks(name: str) -> None:
    students = [student for student, _ in of_zoo(name)]
    assert sum("encoder." in student for student in students) == 2
    assert sum("decoder." in student for student in students) == 2
    assert of_zoo(name) == same(*students)


@pytest.mark.slow
def test_both_towers_have_blocks() -> None:
    students = [student for student, _ in of_zoo("CLIP")]
    assert {student.split(".")[0] for student in students} == {"text_model", "vision_model"}


def test_recurrent_networks() -> None:
    assert of_zoo("recurrent tagger") == same("rnn")


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, packed: nn.utils.rnn.PackedSequence) -> torch.Tensor:
        return self.fc(self.rnn(packed)[1][-1])


@pytest.mark.parametrize("is_sorted", [False, True])
def test_samples_of_packed_sequences(is_sorted: bool) -> None:
    lengths = torch.tensor([7, 5, 4, 2] if is_sorted else [2, 7, 4, 5])
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 7, 5), lengths, True, enforce_sorted=is_sorted)
    assert chosen(Packed, packed) == same("rnn")


class Twice(nn.Module):
    """Calls one encoder for each of two images."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.encoder(x), self.encoder(1 - x)], 1))


def test_the_table_names_layers_that_run_twice() -> None:
    lines: list[str] = []
    transfer = RepresentationTransfer(Twice(), plan="random")
    transfer.report = lines.append
    with transfer.attached(student := Twice()):
        student(torch.randn(4, 3, 8, 8))
        transfer.loss()
    assert "one forward runs 'encoder' (Sequential) 2 times" in lines[0]
    assert "pass student_root='encoder'" in lines[0]


@pytest.mark.parametrize("layers", ["auto", "matched"])
def test_the_inputs_go_once_through_a_pre_hook_of_the_user(layers: str) -> None:
    """Channels last to first, which a second time would mix up the axes."""

    def build() -> nn.Module:
        convolutions = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    torch.manual_seed(0)
    student, teacher, calls = build(), build(), []

    def permuted(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        calls.append(args[0].shape)
        return (args[0].permute(0, 3, 1, 2),)

    handle = student.register_forward_pre_hook(permuted)
    transfer = RepresentationTransfer(teacher, layers, plan="random")
    with transfer.attached(student):
        for _ in range(2):
            student(torch.rand(4, 8, 8, 3))
            transfer.loss()
    assert calls == [(4, 8, 8, 3)] * 2
    handle.remove()
    assert {pair.student for pair in transfer.pairs} <= {"1", "3"}


class SeesAndReads(nn.Module):
    """A vision tower of maps, and blocks over words that normalise their heads, as those of Gemma 3 and Qwen 3 do."""

    class Block(nn.Module):
        def __init__(self, width: int, heads: int, *, heads_first: bool) -> None:
            super().__init__()
            self.heads, self.heads_first = heads, heads_first
            self.queries, self.norm, self.out = (
                nn.Linear(width, heads * 8),
                nn.LayerNorm(8),
                nn.Linear(heads * 8, width),
            )

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            heads = self.queries(x).unflatten(2, (self.heads, 8))
            heads = self.norm(heads.transpose(1, 2)).transpose(1, 2) if self.heads_first else self.norm(heads)
            return x + self.out(heads.flatten(2)) * attention_mask[..., None]

    def __init__(self, width: int, heads: int, *, heads_first: bool) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.ReLU(), nn.Conv2d(width, width, 2, 2), nn.ReLU())
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(self.Block(width, heads, heads_first=heads_first) for _ in range(2))

    def forward(self, images: Tensor, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids) + self.vision(images).mean((2, 3))[:, None]
        for block in self.blocks:
            x = block(x, attention_mask)
        return x


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_of_an_attention_are_no_maps(heads: int, heads_first: bool) -> None:
    """Beside a vision tower they looked like one more resolution, whose padding nothing left out."""
    student, teacher = (SeesAndReads(width, heads, heads_first=heads_first) for width in (12, 16))
    ids, mask = torch.randint(50, (4, 10)), (torch.arange(10) < torch.tensor([[10], [4], [7], [5]])).long()
    with (transfer := RepresentationTransfer(teacher)).attached(student):
        student(torch.randn(4, 3, 16, 16), ids, mask)
        assert transfer.loss().isfinite()
    assert [pair.student for pair in transfer.pairs] == ["vision.1", "vision", "blocks.0", "blocks.1"]
