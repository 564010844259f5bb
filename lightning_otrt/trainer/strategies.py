"""Which processes share a batch under a strategy of Lightning, which were tested, and the type of the student."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_otrt.notices import warn

__all__ = ["SharedBatch", "shared_batch", "student_dtype"]

#: Whether processes share a batch, and their process group, None for all of torch.distributed.
SharedBatch = tuple[bool, Any]

#: Precisions in which a plugin changes the type of the module itself.
_TRUE_PRECISIONS = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def student_dtype(trainer: pl.Trainer) -> torch.dtype | None:
    """The type that the Trainer's precision plugin gives to the module; None where it leaves it as it is."""
    return _TRUE_PRECISIONS.get(str(trainer.precision))


def shared_batch(trainer: pl.Trainer, *, strict: bool) -> SharedBatch:
    """Whether several processes share a batch, and which.

    Args:
        trainer: The Trainer, with its processes started.
        strict: Whether an untested strategy is an error. Else it is a warning.

    Raises:
        MisconfigurationException: If the strategy was never tested with this package, and ``strict``.
    """
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return False, None
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        return mesh.size() > 1, mesh.get_group()
    # The last two are subclasses of the first.
    tested = isinstance(strategy, (DDPStrategy, FSDPStrategy))
    if not tested or isinstance(strategy, (DeepSpeedStrategy, XLAStrategy)):
        message = (
            f"{type(strategy).__name__} was never tested with representation transfer. It may change the outputs of "
            "layers, or how gradients are averaged over processes, and so the term. Tested are one device, "
            'strategy="ddp" (also "ddp_spawn" and "ddp_notebook"), "fsdp" and ModelParallelStrategy (FSDP2)'
        )
        if strict:
            raise MisconfigurationException(f"{message}. Use one of these, or strict=False to try.")
        warn(f"{message}. It is tried because of strict=False.")
    return trainer.world_size > 1, None
