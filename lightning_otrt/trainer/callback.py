"""The callback of the Lightning Trainer: its arguments. ``transfer_callback.py`` has what it does in a fit."""

from __future__ import annotations

from typing_extensions import Unpack

from lightning_otrt.layers.pairs import LayerSpec
from lightning_otrt.options import TransferOptions, check_option_names, takes_options_of
from lightning_otrt.teacher.loading.load import TeacherSource
from lightning_otrt.trainer.transfer_callback import TransferCallback
from lightning_otrt.transfer import RepresentationTransfer

__all__ = ["OTRTCallback"]


class OTRTCallback(TransferCallback):
    r"""Adds the transport between teacher and student representations to the loss of a LightningModule.

    The term is that of :class:`RepresentationTransfer` (arXiv 2007.06737, equation 3).

    The module's ``training_step`` is wrapped during ``fit``. After it, also if it failed or was interrupted, no hook
    is left on module or teacher. The term is logged as ``train/otrt`` (unweighted), ``otrt/weight`` and
    ``otrt/distance/<student layer>``; the distillation of logits, if there is one, as ``train/distillation``
    (unweighted).

    With automatic optimization the term joins the loss that ``training_step`` returns; with manual optimization the
    loss of the first ``manual_backward`` after a forward.

    It takes the arguments of :class:`RepresentationTransfer`, all but ``process_group``; names of layers are relative
    to the LightningModule, or to ``student_root``. In place of the teacher it also takes a ready
    :class:`RepresentationTransfer`, which has layers and options of its own. ``callback.weight`` and
    ``callback.schedule`` can be set at any time, also during a fit.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range; in ``fit``, if a layer does not exist, or on the first batch a value
            is not finite or there are too few observations.
        RuntimeError: In ``fit``, if no term can be formed, and ``strict``.
        MisconfigurationException: In ``fit``, if Trainer, strategy, module or checkpoint do not fit the callback.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader
        >>> from lightning_otrt import OTRTCallback
        >>> teacher = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> callback = OTRTCallback(teacher, layers={"layer": "1"}, weight=0.5)
        >>> trainer = L.Trainer(
        ...     callbacks=[callback], max_steps=1, limit_val_batches=0, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel(), DataLoader(RandomDataset(32, 64), batch_size=16))
        >>> sorted(name for name in trainer.callback_metrics if "otrt" in name)
        ['otrt/distance/layer', 'otrt/weight', 'train/otrt']
    """

    @takes_options_of(RepresentationTransfer, without=("process_group",))
    def __init__(
        self,
        teacher: TeacherSource | RepresentationTransfer,
        layers: LayerSpec = "auto",
        **options: Unpack[TransferOptions],
    ) -> None:
        check_option_names(type(self).__name__, options)
        super().__init__(teacher, layers, options)
