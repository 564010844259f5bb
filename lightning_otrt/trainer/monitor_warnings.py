"""Warnings of the monitor: what is wrong in a running transfer, and what to change. Each is given once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_otrt.distillation import as_distillation
from lightning_otrt.layers.names import named_layers
from lightning_otrt.notices import Notices
from lightning_otrt.reading.extra_forwards.batch_norm import batch_norms_in_training
from lightning_otrt.steps.first_batch import BLURRING_EPSILON
from lightning_otrt.transfer import RepresentationTransfer

__all__ = ["TransferWarnings"]

#: Measurements in a row that have to show a problem before there is a warning. Single batches are noise.
PATIENCE = 3
#: Kinds of plan that follow the cost.
SOLVED = ("sinkhorn", "exact", "static", "auto")
#: Bounds of the ratio of the term's gradient, at its full weight, to the task's. A ratio of 10 is no reason to warn: on
#: a–z weight 64 has about that before training, and is 2.7 points below the best weight (docs/weight.md).
WEAK, STRONG = 0.01, 50.0
#: What warnings call each term, with the option that is its weight and where to look.
_TERMS = (
    ("transfer term", "weight", "; see `suggest_weight`"),
    ("distillation of logits", "distillation", ""),
)
#: Steps in which the distillation of logits may be weak.
FIRST_STEPS = 50
#: A plan that spreads its mass over this share of all pairs of neurons hardly matches any.
NEARLY_UNIFORM = 0.5


class TransferWarnings:
    """Warns where an option or a layer of a transfer should be changed.

    Args:
        transfer: The transfer.
        notices: Gives each warning once.
    """

    def __init__(self, transfer: RepresentationTransfer, notices: Notices) -> None:
        self.transfer = transfer
        self._notices = notices
        self._seen: Counter[str] = Counter()

    def on_first_step(self) -> None:
        """Check what can be seen in the first step, while the student still has its first weights."""
        self._few_observations()
        self._copied_with_batch_norm()

    def on_values(self, values: Mapping[str, float], labels: Sequence[str]) -> None:
        """Check the values of a step, under the names that :class:`OTRTMonitor` logs them by."""
        transfer = self.transfer
        for label, distance in zip(labels, transfer.distances, strict=False):
            entropy = values.get(f"otrt/entropy/{label}", math.nan)
            # With a large epsilon the engine has warned at its first plan.
            if distance.matrix is None or transfer.plan not in SOLVED or transfer.epsilon >= BLURRING_EPSILON:
                continue
            rows, columns = distance.matrix.shape
            spread = (rows * columns) ** (entropy - 1)
            if self._persists(f"uniform {label}", min(rows, columns) > 2 and spread > NEARLY_UNIFORM):
                self._notices.warn(
                    f"The transport plan of {label!r} is nearly uniform: its mass spreads over {spread:.0%} of all "
                    f"pairs of {rows} student and {columns} teacher neurons, so that hardly anything is matched: the "
                    "costs hardly differ. Look for dead neurons and constant inputs, choose other layers, or lower "
                    f"`epsilon` (now {transfer.epsilon:g}).",
                    key="uniform",
                )
        shares = [values.get(f"otrt/{name}_share", 0.0) for name in ("gradient", "distillation")]
        task = 1 - sum(shares)
        full = transfer.weight, as_distillation(transfer.distillation).weight
        for (name, option, hint), share, weight, now in zip(_TERMS, shares, full, transfer.last_weights, strict=True):
            if not 0 < share < 1 or not 0 < task < 1 or not now:
                continue
            # A warm-up is meant to be weak.
            ratio = share / task * weight / now
            for key, off, meaning in (
                ("weak", ratio < WEAK, "so that it changes next to nothing"),
                ("strong", ratio > STRONG, "so that the task hardly counts"),
            ):
                # The moments of a regression of logits begin with few observations, from which it predicts all of them.
                is_early = key == "weak" and option == "distillation" and transfer.step < FIRST_STEPS
                if self._persists(f"{key} {option}", off and not is_early):
                    self._notices.warn(
                        f"On the recorded layers the gradient of the {name} is {ratio:.2g} times that of the task, "
                        f"{meaning}. {option}={weight / ratio:.2g} would make them equal (now {weight:g}){hint}. "
                        "A ratio that grows while the loss of the task falls is normal.",
                        key=f"{key} {option}",
                    )

    def _persists(self, key: str, is_so: bool) -> bool:
        self._seen[key] = self._seen[key] + 1 if is_so else 0
        return self._seen[key] >= PATIENCE

    def _few_observations(self) -> None:
        transfer = self.transfer
        if transfer.plan not in ("sinkhorn", "exact", "orthogonal", "auto"):  # a static plan has a memory
            return
        for pair, distance in zip(transfer.pairs, transfer.distances, strict=False):
            if distance.matrix is None or distance.is_skipped or distance.memory != 0:
                continue
            rows, columns = distance.matrix.shape
            if distance.observations < max(rows, columns):
                self._notices.warn(
                    f"The {'transport plan' if distance.alignment is None else 'orthogonal coupling'} of "
                    f"{pair.student!r} -> {pair.teacher!r} is solved from "
                    f"{distance.observations} observations of {rows} and {columns} neurons and without memory, so that "
                    'it follows the noise of each batch. Use memory="auto" (a running cost), a larger batch, or layers '
                    "with positions.",
                    key="few",
                )

    def _copied_with_batch_norm(self) -> None:
        transfer = self.transfer
        student, pairing = transfer.student, transfer.pairing
        if student is None or pairing is None:
            return
        root = named_layers(student)[pairing.student.root]
        norms = batch_norms_in_training(root)
        if norms and _is_copy(root, transfer.teacher.module):
            self._notices.warn(
                f"The student starts with the weights of its teacher, but its {len(norms)} BatchNorm layers (such as "
                f"{norms[0]!r}) are in train mode and normalise by each batch, while those of the teacher use their "
                "running statistics: equal weights then give unequal representations, and the term pulls the student "
                "away from the copy. Put these layers into evaluation mode for the fit (module.eval() on each of them, "
                "in on_train_start), or use weights of networks without BatchNorm.",
                key="copy",
            )


def _is_copy(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether most parameters of the teacher are in the student under the same names. Heads may differ."""
    own = dict(student.named_parameters())
    given = dict(teacher.named_parameters())
    return sum(name in own and _equal(own[name], tensor) for name, tensor in given.items()) > len(given) / 2


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.device == second.device and torch.equal(first, second.to(first.dtype))
