"""Sends figures to the loggers of a Trainer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_figure"]


def log_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Send a figure to a logger through its own API. Loggers that take no figures are skipped.

    TensorBoard and W&B show it under ``name``; MLflow gets the artifact ``<name>/step=<step>.png``; a CSV logger gets
    that file in its directory.

    Args:
        logger: A logger of the Trainer.
        name: Name with ``/``.
        figure: The figure. It is not closed.
        step: The step at which it is shown.

    Example:
        >>> import os, tempfile
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> from lightning_otrt.trainer.log_figure import log_figure
        >>> from lightning_otrt import plot_history
        >>> logger = CSVLogger(tempfile.mkdtemp())
        >>> log_figure(logger, "otrt/curve", plot_history({"loss": [2.0, 1.0]})[0], step=7)
        >>> os.listdir(os.path.join(logger.log_dir, "otrt", "curve"))
        ['step=7.png']
    """
    file = f"{name}/step={step}.png"
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, global_step=step, close=False)
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [figure], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, file)
    elif isinstance(logger, CSVLogger):
        path = os.path.join(logger.log_dir, *file.split("/"))
        files = get_filesystem(path)
        files.makedirs(os.path.dirname(path), exist_ok=True)
        with files.open(path, "wb") as target:
            figure.savefig(target, format="png")
