"""What the plans and statistics of a run belong to, to tell whether those of a checkpoint are of this run."""

from __future__ import annotations

from typing import Any

from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.logit_recording import LogitRecording

__all__ = ["Identities", "difference"]


class Identities:
    """Plain values that are the same where plans and statistics may go on.

    Args:
        teacher: The teacher.
        logits: What reads the logits, where they are distilled.
    """

    def __init__(self, teacher: Teacher, logits: LogitRecording | None) -> None:
        self._teacher, self._logits = teacher, logits

    def leading_weights(self, pairing: Pairing) -> str:
        """A checksum of the teacher's weights that lead to the layers of a pairing."""
        return self._teacher.checksum_before(pairing)

    @property
    def reading(self) -> dict[str, Any] | None:
        """What of the teacher's logits is regressed on what of the student; None where nothing is."""
        return None if self._logits is None else self._logits.regression

    @property
    def regression(self) -> dict[str, Any] | None:
        """The same, with a checksum of the teacher."""
        return None if self.reading is None else {**self.reading, "checksum": self._teacher.whole_checksum()}


def difference(saved: dict[str, Any] | None, own: dict[str, Any] | None) -> str:
    """In which words a regression is another one than before; empty if it is not, or that is not known.

    Example:
        >>> difference({"features": "fc:input", "grid": 4}, {"features": "layer3", "grid": 4})
        "features='layer3' (before: 'fc:input')"
    """
    if saved is None or own is None:
        return ""
    changed = {name: value for name, value in own.items() if saved.get(name, value) != value}
    return ", ".join(
        "other weights of the teacher" if name == "checksum" else f"{name}={value!r} (before: {saved[name]!r})"
        for name, value in changed.items()
    )
