"""What a student does to its inputs in training alone: other samples than the teacher's are warned of, noise is not."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_otrt import RepresentationTransfer

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MESSAGE = "changes its inputs in training: its first layer with weights, "


class Net(nn.Module):
    def __init__(self, in_training: Callable[[Tensor], Tensor] | None = None, front: nn.Module | None = None) -> None:
        super().__init__()
        self.front = front or nn.Identity()
        self.a = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU())
        self.head, self.in_training = nn.Linear(6, 3), in_training

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.in_training is not None:
            x = self.in_training(x)
        return self.head(self.b(self.a(self.front(x))).mean((2, 3)))


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(3) if self.training else x


class GaussianNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class RunningScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean()) / x.std() if self.training else x / self.running_scale


class StochasticShift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(len(x), 1, 1, 1) if self.training else x


class SpectrumMask(nn.Module):
    """What it hides gets the mean, which is not 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.arange(16) < 5, x.mean() + 1, x) if self.training else x


class Thinned(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand_like(x) < self.p, x.roll(1, 3), x) if self.training else x


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_batches_seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True) if self.training else x


class Shifted(nn.Module):
    """It uses a weight of its own without a layer, and what follows is noise of features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = nn.ReLU(), nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) + self.shift
        return x + torch.rand_like(x) if self.training else x


class Reused(Net):
    """Its first layer gets a tensor that is written to later."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        found = self.a(x)
        x.add_(5.0)
        return self.head(self.b(found).mean((2, 3)))


class ByName(Net):
    """Its first layer gets its input by name."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.a[0](input=x.flip(3) if self.training else x)
        return self.head(self.b(self.a[1](found)).mean((2, 3)))


def crop(x: Tensor) -> Tensor:
    return F.interpolate(x[:, :, 3:11, 2:10], scale_factor=2)


OTHER_SAMPLES: dict[str, Callable[[], nn.Module]] = {
    "flip": lambda: Net(lambda x: x.flip(3)),
    "flip of some": lambda: Net(
        lambda x: torch.where((torch.arange(len(x)) % 2 == 0)[:, None, None, None], x.flip(3), x)
    ),
    "mixup": lambda: Net(lambda x: 0.5 * x + 0.5 * x.roll(1, 0)),
    "shuffle": lambda: Net(lambda x: x.roll(1, 0)),
    "crop": lambda: Net(crop),
    "another size": lambda: Net(lambda x: F.interpolate(x, size=(24, 24))),
    "views": lambda: Net(lambda x: torch.cat([x, x.flip(3)])),
    "a module": lambda: Net(front=Flip()),
    "a module before statistics": lambda: Net(front=nn.Sequential(Flip(), nn.BatchNorm2d(3))),
    "before a parametrised layer": lambda: Net(
        lambda x: x.flip(3), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    ),
    "by name": ByName,
    "before a frozen layer": lambda: Net(lambda x: x.flip(3), nn.Conv2d(3, 3, 1).requires_grad_(False)),
}


@pytest.mark.parametrize("make", OTHER_SAMPLES.values(), ids=OTHER_SAMPLES)
def test_other_samples_in_training_are_warned_of_once(make):
    student, transfer = make().train(), RepresentationTransfer(Net(), ["b"])
    with transfer.attached(student):
        with pytest.warns(UserWarning, match=MESSAGE) as caught:
            student(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            student(X)
        transfer.discard()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            student(X)
        transfer.discard()
    assert len(caught) == 1


QUIET: dict[str, Callable[[], nn.Module]] = {
    "nothing": Net,
    "statistics of the batch": lambda: Net(front=nn.BatchNorm2d(3)),
    "statistics without weights": lambda: Net(front=nn.BatchNorm2d(3, affine=False)),
    "running statistics": lambda: Net(front=RunningScale()),
    "dropout": lambda: Net(front=nn.Dropout(0.5)),
    "dropout of channels": lambda: Net(front=nn.Dropout2d(0.5)),
    "alpha dropout": lambda: Net(front=nn.AlphaDropout(0.5)),
    "functional dropout": lambda: Net(lambda x: F.dropout(x, 0.3)),
    "dropped samples": lambda: Net(lambda x: x * (torch.arange(len(x)) % 2)[:, None, None, None] * 2.0),
    "a mask of patches": lambda: Net(lambda x: x * (torch.arange(16) > 5)),
    "noise": lambda: Net(front=GaussianNoise()),
    "spectral norm": lambda: Net(front=nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))),
    "a stochastic shift": lambda: Net(front=StochasticShift()),
    "a mask with another value": lambda: Net(front=SpectrumMask()),
    "a kind of dropout": lambda: Net(front=Thinned(0.5)),
    "a count of batches": lambda: Net(front=Counted()),
    "noise behind a weight": lambda: Net(front=Shifted()),
    "a tensor that is written to later": Reused,
    "normalisation": lambda: Net(lambda x: x * 1.0),
}


@pytest.mark.parametrize("make", QUIET.values(), ids=QUIET)
@pytest.mark.parametrize("autocast", [False, True])
def test_noise_and_statistics_are_not_warned_of(make, autocast):
    student, transfer = make().train(), RepresentationTransfer(Net(), ["a", "b"])
    with warnings.catch_warnings(), transfer.attached(student):
        warnings.simplefilter("error")
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                student(X)
            transfer.loss()


def test_a_student_in_another_type():
    for dtype in (torch.bfloat16, torch.float64):
        student, transfer = Net().to(dtype), RepresentationTransfer(Net().to(dtype), ["a", "b"])
        with warnings.catch_warnings(), transfer.attached(student):
            warnings.simplefilter("error")
            student(X.to(dtype))
            transfer.loss()


@pytest.mark.parametrize(
    ("dtype", "change", "expected"),
    [
        (torch.bfloat16, lambda x: x + 0.005 * x.abs().max() * torch.arange(16).sin().to(x), False),
        (torch.float32, lambda x: x + 0.5 * x.abs().max() * torch.arange(16).sin().to(x), True),
        (torch.bfloat16, lambda x: x.flip(3), True),
        (torch.float32, lambda x: x + 1e-5 * torch.arange(16).sin().to(x), False),
    ],
)
def test_rounding_of_a_type_is_no_change(dtype, change, expected):
    student, transfer = Net(change).to(dtype), RepresentationTransfer(Net().to(dtype), ["a", "b"])
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        student(X.to(dtype))
        transfer.loss()
    assert any(MESSAGE in str(warning.message) for warning in caught) == expected


def test_another_size_is_named():
    student, transfer = Net(lambda x: F.interpolate(x, size=(24, 24))), RepresentationTransfer(Net(), ["a", "b"])
    with transfer.attached(student):
        with pytest.warns(UserWarning, match=r"got float32 \(8, 3, 16, 16\) in .* and float32 \(8, 3, 24, 24\) in"):
            student(X)
        transfer.loss()


def test_inputs_that_are_normalised_in_place():
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5).div_(0.25))

    student, transfer = InPlace(), RepresentationTransfer(InPlace(), ["a", "b"])
    with transfer.attached(student):
        with pytest.warns(UserWarning, match="in place") as caught:
            student(X.clone())
        transfer.loss()
    assert not any(MESSAGE in str(warning.message) for warning in caught)


class Attention(nn.Module):
    """The first weights are used by functions, with dropout behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.attend(x, x, x)[0]).mean(1))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out, self.head = nn.Bilinear(6, 6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(F.dropout(self.stem(x, x), 0.5, self.training).relu()).mean(1))


class Words(nn.Module):
    def __init__(self, replaced: bool) -> None:
        super().__init__()
        self.embed, self.out, self.head = nn.Embedding(30, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.replaced = replaced

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.roll(1, 1) if self.replaced and self.training else ids
        return self.head(self.out(self.embed(ids)).mean(1))


class Encoder(nn.Module):
    """In evaluation mode it makes nested tensors of padded ones."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 12, 0.5, batch_first=True)
        self.out = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]) >= x.shape[1] - torch.arange(len(x))[:, None] % 3
        return self.head(self.out(x, src_key_padding_mask=padding).mean(1))


class Checkpointed(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            checkpoint(self.out, checkpoint(self.stem, x, x, use_reentrant=False), use_reentrant=False).mean(1)
        )


@pytest.mark.parametrize(
    "make", [Attention, Functional, pytest.param(Encoder, id="nested"), Checkpointed, lambda: Words(False)]
)
def test_sequences_without_an_alarm(make):
    student, layers = make().train(), ["out.layers.1"] if make is Encoder else ["out"]
    x = torch.randint(30, (8, 9)) if hasattr(student, "embed") else torch.randn(8, 9, 6)
    transfer = RepresentationTransfer(make(), layers)
    with warnings.catch_warnings(), transfer.attached(student):
        warnings.filterwarnings("error", message=".*changes its inputs.*")
        warnings.filterwarnings("ignore", message=".*(nested|mask|padding).*")
        student(x)
        transfer.loss()


def test_words_that_are_replaced():
    student, transfer = Words(True), RepresentationTransfer(Words(False), ["out"])
    with transfer.attached(student):
        with pytest.warns(UserWarning, match=MESSAGE + r"'embed' \(Embedding\)"):
            student(torch.arange(72).reshape(8, 9) % 30)
        transfer.loss()


def test_a_sequence_that_is_turned_before_attention():
    class Turned(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(1) if self.training else x)

    student, transfer = Turned(), RepresentationTransfer(Attention(), ["out"])
    with transfer.attached(student):
        with pytest.warns(UserWarning, match=MESSAGE + r"'attend' \(MultiheadAttention\)"):
            student(torch.randn(8, 9, 6))
        transfer.loss()


def test_only_what_lies_behind_the_root_counts():
    student = Net(lambda x: x.flip(3))
    transfer = RepresentationTransfer(Net().b, {"b.0": "0"}, student_root="b")
    with warnings.catch_warnings(), transfer.attached(student):
        warnings.simplefilter("error")
        student(X)
        transfer.loss()


@pytest.mark.slow
def test_a_compiled_student():
    for change, expected in ((None, 0), (lambda x: x.flip(3), 1)):
        student = torch.compile(Net(change), backend="eager")
        transfer = RepresentationTransfer(Net(), ["a", "b"])
        with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
            warnings.simplefilter("always")
            for _ in range(2):
                student(X)
                transfer.loss()
        assert sum(MESSAGE in str(warning.message) for warning in caught) == expected


def test_nothing_is_left_on_the_student():
    student = Net()
    hooks = [len(module._forward_pre_hooks) for module in student.modules()]
    transfer = RepresentationTransfer(Net(), ["a", "b"])
    with transfer.attached(student):
        student(X)
        transfer.loss()
        # Those of the recorder alone: one on the root.
        assert sum(len(module._forward_pre_hooks) for module in student.modules()) == sum(hooks) + 1
        pickle.loads(pickle.dumps(student))
        copy.deepcopy(student)
    assert [len(module._forward_pre_hooks) for module in student.modules()] == hooks


@pytest.mark.slow
def test_a_detector_of_several_sizes():
    detection = pytest.importorskip("torchvision").models.detection

    def make() -> nn.Module:
        return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=160
        )

    images = [torch.rand(3, 64, 48), torch.rand(3, 60, 64)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 30.0, 30.0]]), "labels": torch.tensor([1])} for _ in images]
    layers = ["backbone.body.3", "backbone.body.6"]
    for sizes, expected in (((64,), False), ((96, 64), True)):
        student, transfer = make(), RepresentationTransfer(make().eval(), layers)
        student.transform.min_size = sizes
        student.transform.torch_choice = max  # training draws one of them, evaluation takes the last
        with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
            warnings.simplefilter("always")
            student(images, targets)
        assert any(MESSAGE in str(warning.message) for warning in caught) == expected


def test_values_that_are_not_finite_are_reported_elsewhere():
    student, transfer = Net(lambda x: x / (x > 0)), RepresentationTransfer(Net(), ["a", "b"])
    with warnings.catch_warnings(), transfer.attached(student):
        warnings.simplefilter("error")
        student(X)
        with pytest.raises(ValueError, match="NaN|infinite|finite"):
            transfer.loss()
