"""BatchNorm layers in train mode, whose outputs depend on the other samples of the batch."""

from __future__ import annotations

from torch import nn

__all__ = ["BATCH_NORM_NOTE", "batch_norms_in_training"]

BATCH_NORM_NOTE = (
    "The student has BatchNorm layers, which see the samples of one process alone. So under a global batch the term is "
    "not that of a single process with all samples; with SyncBatchNorm it is."
)


def batch_norms_in_training(model: nn.Module, *, synchronized: bool = True) -> list[str]:
    """Names of the BatchNorm layers that normalise by the statistics of the batch.

    Args:
        model: Any module.
        synchronized: Whether to count SyncBatchNorm, which takes the statistics of all processes.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> batch_norms_in_training(model), batch_norms_in_training(model.eval())
        (['1'], [])
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *((nn.SyncBatchNorm,) if synchronized else ()))
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and module.training]
