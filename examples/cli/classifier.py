"""A plain LightningModule around any image classifier; it knows nothing of teachers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy


class Classifier(pl.LightningModule):
    """Trains a network by cross-entropy.

    Args:
        net: From images (B, 3, H, W) to logits (B, num_classes), or to an output of Hugging Face that holds them.
        num_classes: Number of classes.
        lr: Learning rate.
    """

    def __init__(self, net: nn.Module, num_classes: int = 10, lr: float = 1e-3) -> None:
        super().__init__()
        self.net = net
        self.lr = lr
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """From images to logits."""
        output: Any = self.net(images)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of the batch."""
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Counts what is classified right."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def pretrained(name: str) -> nn.Module:
    """An image classifier of Hugging Face with its weights, for a ``class_path``.

    Args:
        name: A model of the hub, or a folder that ``save_pretrained`` wrote.
    """
    from transformers import AutoModelForImageClassification

    network: nn.Module = AutoModelForImageClassification.from_pretrained(name)
    return network
