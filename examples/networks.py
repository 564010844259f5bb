"""The networks of the examples and the plain LightningModule that trains them; neither knows about transport."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

TEACHER_WIDTHS = (16, 32, 64)
STUDENT_WIDTHS = (8, 16, 32)


class ConvNet(nn.Module):
    """Convolution blocks that halve the map each, a global average and a linear head.

    Args:
        widths: Number of channels of each block.
        num_classes: Number of classes.
    """

    def __init__(self, widths: Sequence[int] = TEACHER_WIDTHS, num_classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_block(*ends) for ends in zip((1, *widths), widths, strict=False)))
        self.head = nn.Linear(widths[-1], num_classes)
        # Twice as fast on a CPU, where pooling and few channels dominate.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """From images (B, 1, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.blocks(images).mean(dim=(2, 3)))
        return logits


def _block(channels: int, width: int) -> nn.Sequential:
    # Pooling first leaves normalisation and ReLU a quarter of the map.
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.ReLU()
    )


class Classifier(pl.LightningModule):
    """Trains a network by cross-entropy with AdamW and a one-cycle learning rate.

    Args:
        net: The network.
        num_classes: Number of classes.
        lr: Highest learning rate.
        weight_decay: Weight decay.
    """

    def __init__(self, net: nn.Module, num_classes: int, *, lr: float = 3e-2, weight_decay: float = 1.0) -> None:
        super().__init__()
        self.net = net
        self.lr = lr
        self.weight_decay = weight_decay
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, *inputs: Tensor) -> Tensor:
        """From images, or token ids and their mask, to logits."""
        logits: Tensor = self.net(*inputs)
        return logits

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The cross-entropy of the batch."""
        *inputs, labels = batch
        loss = functional.cross_entropy(self(*inputs), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Counts what is classified right."""
        *inputs, labels = batch
        self.accuracy(self(*inputs), labels)
        self.log("test/accuracy", self.accuracy, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW whose learning rate rises, then falls, over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
