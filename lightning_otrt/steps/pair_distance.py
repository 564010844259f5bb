"""What users see of one pair of layers in one call: its distance, and the plan or the rotation behind it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_otrt.transport.orthogonal import Alignment

__all__ = ["PairDistance"]


@dataclass(frozen=True, eq=False)
class PairDistance:
    """The distance of one pair of layers in one call, with the :attr:`plan` or the :attr:`rotation` behind it.

    Attributes:
        name: Name of the student layer.
        value: ⟨P, M⟩, the mean over views, detached; NaN if the pair was skipped.
        matrix: The plan or the rotation, ``(N, M)``. If the pair was skipped, its last one, or None if it had none yet.
        memory: Decay of the running cost behind the plan; 0 if the plan sees the batch of its solve alone, None before
            the first call of the pair.
        observations: Observations of the call over all views. Other processes are taken to have as many as this one.
        is_skipped: Whether the pair is left out of the term of this call: its layers did not run, or there are too few
            observations.
        alignment: The orthogonal coupling behind it, None for a transport plan.

    Example:
        >>> import torch
        >>> from lightning_otrt import PairDistance
        >>> PairDistance("layer4", torch.tensor(0.5), torch.eye(4) / 4, memory=0.0, observations=64)
        PairDistance('layer4', 0.5, plan (4, 4), 64 observations)
    """

    name: str
    value: Tensor
    matrix: Tensor | None
    memory: float | None
    observations: int
    is_skipped: bool = False
    alignment: Alignment | None = None

    def __repr__(self) -> str:
        """The value, and the shape of the plan in place of its entries. To read the value waits for the device."""
        kind = "plan" if self.alignment is None else "rotation"
        matrix = f"no {kind}" if self.matrix is None else f"{kind} {tuple(self.matrix.shape)}"
        value = "skipped" if self.is_skipped else f"{float(self.value):.4g}"
        return f"{type(self).__name__}({self.name!r}, {value}, {matrix}, {self.observations} observations)"

    @property
    def plan(self) -> Tensor | None:
        """The transport plan P, ``(N, M)``; None as for :attr:`matrix`.

        Raises:
            AttributeError: If an orthogonal coupling is behind the distance.
        """
        if self.alignment is not None:
            raise AttributeError("An orthogonal coupling has no transport plan: use `rotation`, or `matrix` for both.")
        return self.matrix

    @property
    def rotation(self) -> Tensor | None:
        """The matrix from centred teacher neurons to the targets of the student's; None as for :attr:`matrix`.

        Its scale is that of :attr:`TransportResult.rotation`, with the norms over the observations of the last solve.

        Raises:
            AttributeError: If a transport plan is behind the distance.
        """
        if self.alignment is None and self.matrix is not None:
            raise AttributeError("A transport plan is no rotation: use `plan`, or `matrix` for both.")
        return self.matrix
