"""Which processes train together, and which of them share a batch."""

from __future__ import annotations

from typing import Any

from lightning_otrt.steps.ranks import Ranks

__all__ = ["Processes"]


class Processes:
    """The processes of a run.

    Args:
        global_batch: What the user passed as ``global_batch``.
        process_group: What the user passed as ``process_group``.

    Example:
        >>> processes = Processes(None, None)
        >>> processes.of_batch is None, processes.agree("no layer")  # a single process
        (True, 'no layer')
    """

    def __init__(self, global_batch: bool | None, process_group: Any | None) -> None:
        self._global_batch, self._given = global_batch, process_group
        #: Whether the processes of torch.distributed each see a part of the batch and take all steps together. None:
        #: not known, as outside of a Trainer. Then only a global batch communicates.
        self._shares_batch: bool | None = None
        self._group = process_group

    def set(self, shares_batch: bool, process_group: Any | None) -> None:
        """Say which processes train together, as a Trainer's strategy knows.

        Args:
            shares_batch: Whether each process sees a part of the batch, and all take all steps together.
            process_group: These processes; None: all of torch.distributed.
        """
        self._shares_batch, self._group = shares_batch, process_group

    def forget(self) -> None:
        """Go back to what the user passed: the group of a strategy ends with it, and cannot be pickled."""
        self._shares_batch, self._group = None, self._given

    @property
    def of_batch(self) -> Ranks | None:
        """The processes of the global batch, None for this one alone."""
        if self._global_batch is False or self._shares_batch is False:
            return None
        return Ranks.world(self._group)

    @property
    def in_step(self) -> Ranks | None:
        """The processes that take all steps together, None for this one alone."""
        return self.of_batch or (Ranks.world(self._group) if self._shares_batch else None)

    def agree(self, problem: str) -> str:
        """A problem of some process, on all of them; ``""`` if there is none. A collective.

        Args:
            problem: That of this process, ``""`` for none.
        """
        together = self.in_step
        if together is None:
            return problem
        others = enumerate(together.gather(problem))
        return problem or next((f"on process {rank}, {other}" for rank, other in others if other), "")
