"""``"auto"`` and ``"penultimate"`` train known architectures: random weights, small inputs, students in train mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import hooks
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES

from lightning_otrt import RepresentationTransfer

BATCH = 4


@dataclass(frozen=True)
class Training:
    """A student and the teacher it learns from, by the names of the zoo."""

    student: str
    teacher: str
    slow: bool = False

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        case = CASES[self.student]
        generator = torch.Generator().manual_seed(1)
        if self.student == "BERT":
            words = torch.randint(1, 50, (BATCH, 7), generator=generator)
            return (), {"input_ids": words, "attention_mask": padding()}
        images = torch.randn(BATCH, 3, case.size, case.size, generator=generator)
        if self.student.startswith("HF"):
            size = case.inputs["pixel_values"].shape[-1]
            return (), {"pixel_values": torch.randn(BATCH, 3, size, size, generator=generator)}
        return (images,), {}


def padding() -> Tensor:
    lengths = torch.tensor([7, 5, 3, 6])
    return (torch.arange(7) < lengths[:, None]).long()


TRAININGS = [
    Training("resnet18", "resnet18"),
    Training("resnet18", "small vit at 64"),
    Training("mobilenet_v3_small", "resnet18", slow=True),
    Training("small vit", "small vit", slow=True),
    Training("small vit", "resnet18"),
    Training("regnet_y_400mf", "mobilenet_v3_small", slow=True),
    Training("timm resnet10t", "resnet18", slow=True),
    Training("timm vit_tiny", "small vit"),
    Training("BERT", "BERT"),
    Training("HF ViT", "HF ViT"),
    Training("efficientnet_b0", "efficientnet_b0", slow=True),
    Training("convnext_tiny", "resnet18", slow=True),
    Training("swin_t", "swin_t", slow=True),
    Training("swin_t", "resnet18", slow=True),
    Training("densenet121", "resnet18", slow=True),
    Training("regnet_y_400mf", "regnet_y_400mf", slow=True),
    Training("timm convnext_atto", "timm convnext_atto", slow=True),
    Training("timm vit_tiny with registers", "timm vit_tiny", slow=True),
    Training("timm swin_tiny", "timm swin_tiny", slow=True),
    Training("HF Swin", "resnet18", slow=True),
]


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if name == "small vit at 64":
        models = pytest.importorskip("torchvision.models")
        return models.VisionTransformer(64, 16, num_layers=4, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=5)
    return CASES[name].build()


def adapter(training: Training) -> Any:
    """Models of Hugging Face take images by name."""
    if training.student.startswith("HF") and not training.teacher.startswith("HF"):
        return lambda pixel_values: pixel_values
    return None


def marked(training: Training) -> Any:
    marks = [pytest.mark.slow] if training.slow else []
    return pytest.param(training, id=f"{training.student} from {training.teacher}", marks=marks)


@pytest.mark.parametrize("layers", ["auto", pytest.param("penultimate", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [marked(training) for training in TRAININGS])
def test_one_step(training, layers):
    student, teacher = build(training.student, 0).train(), build(training.teacher, 1)
    args, kwargs = training.inputs()
    modes = [module.training for module in teacher.modules()]
    transfer = RepresentationTransfer(teacher, layers, weight=1.0, teacher_inputs=adapter(training))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    found = []
    with transfer.attached(student):
        for _ in range(2):
            student(*args, **kwargs)
            loss = transfer.loss()
            optimizer.zero_grad()
            loss.backward()
            found.append(float(loss.detach()))
            if len(found) == 1:
                check_gradients(student, transfer)
            optimizer.step()
    assert 0 < found[0] < 3
    assert abs(found[1] - found[0]) > 1e-4, "a step changes the term by more than rounding"
    assert len(transfer.distances) == len(transfer.pairs) > 0
    assert [module.training for module in teacher.modules()] == modes
    assert not hooks(student, teacher)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def check_gradients(student: nn.Module, transfer: RepresentationTransfer) -> None:
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    reached = [name for name, gradient in gradients.items() if bool(gradient.any())]
    assert len(reached) > len(transfer.pairs)
    # From the first layer on; the head behind the last representation gets nothing.
    first = next(name for name, p in student.named_parameters() if p.dim() > 1 and "pos" not in name)
    assert first in reached or "token" in first
    head = [name for name in gradients if name.startswith(("fc.", "heads.head.", "classifier.3.", "head.fc."))]
    assert not [name for name in head if name in reached]


@pytest.mark.slow
def test_padding_has_no_part_in_it():
    """Neither the words behind the padding nor their number changes the distances."""
    student, teacher = build("BERT", 0).eval(), build("BERT", 1)
    _, kwargs = Training("BERT", "BERT").inputs()
    found = []
    for fill in (0, 7):
        words = torch.where(padding().bool(), kwargs["input_ids"], fill)
        transfer = RepresentationTransfer(teacher, "auto", weight=1.0)
        with transfer.attached(student):
            student(input_ids=words, attention_mask=padding())
            found.append(transfer.loss())
        found.append(transfer.distances[-1].value)
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-5, atol=1e-6)
    with transfer.attached(student):
        student(input_ids=words)
        assert abs(float(transfer.loss().detach() - found[0].detach())) > 1e-4, "without a mask the padding counts"


def test_the_task_and_the_term_train_together():
    student, teacher = build("resnet18", 0), build("resnet18", 1)
    images, labels = torch.randn(BATCH, 3, 64, 64), torch.arange(BATCH)
    transfer = RepresentationTransfer(teacher, "auto")
    with transfer.attached(student):
        loss = F.cross_entropy(student(images), labels) + transfer.loss()
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
