r"""Many machines, the same numbers: the transfer term is that of the batch over all processes.

Start it on each of two machines, with torchrun:

    torchrun --nnodes=2 --nproc-per-node=4 --node-rank=<0 or 1> --master-addr=<host of node 0> --master-port=29500 \
        -m examples.multi_node --nodes 2 --devices 4

or with Lightning's own launcher:

    NODE_RANK=<0 or 1> MASTER_ADDR=<host of node 0> MASTER_PORT=29500 \
        python -m examples.multi_node --nodes 2 --devices 4
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from examples.glyphs import SCRIPTS, glyphs
from examples.networks import STUDENT_WIDTHS, TEACHER_WIDTHS, Classifier, ConvNet
from lightning_otrt import OTRTCallback


def main() -> None:
    """Train a teacher, then a smaller student with its help, on all processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1, help="number of machines")
    parser.add_argument("--devices", type=int, default=1, help="processes on each machine")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    pl.seed_everything(0)
    classes = len(SCRIPTS["greek"])
    data = DataLoader(glyphs("greek", "train", per_class=40), batch_size=64, shuffle=True)

    def fit(net: ConvNet, callbacks: list[pl.Callback]) -> pl.Trainer:
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            num_nodes=options.nodes,
            devices=options.devices,
            strategy="ddp",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
        )
        trainer.fit(Classifier(net, classes), data)
        return trainer

    teacher = ConvNet(TEACHER_WIDTHS, classes)
    fit(teacher, [])
    trainer = fit(ConvNet(STUDENT_WIDTHS, classes), [OTRTCallback(teacher, {"net.blocks.2": "blocks.2"})])
    test = DataLoader(glyphs("greek", "test", per_class=20), batch_size=64)
    result = trainer.test(trainer.lightning_module, test, verbose=False)
    if trainer.is_global_zero:
        print(f"accuracy of the student: {result[0]['test/accuracy']:.1%}")


if __name__ == "__main__":
    main()
