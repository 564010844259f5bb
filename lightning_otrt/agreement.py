"""Which pairs of layers a run goes on with: those of a saved state, and on several processes those of the first one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.steps.ranks import Ranks

__all__ = ["agree_on_pairs"]


def agree_on_pairs(ranks: Ranks | None, layers: str, choose: Callable[[], Pairing]) -> Pairing:
    """The pairs that the first process chooses, on all of them: a choice may depend on each one's first batch.

    Processes whose users ask for different layers keep what they have; the engine then refuses to add them up.

    Args:
        ranks: The processes; None: this one decides alone.
        layers: What the user asks for, the same text for the same choice.
        choose: Chooses on this process.

    Raises:
        Exception: Whatever ``choose`` raises here.
        RuntimeError: If it raises on another process, so that none waits for it.
    """
    if ranks is None:
        return choose()
    try:
        pairing = choose()
    except Exception as error:
        ranks.gather((layers, (), f"{type(error).__name__}: {error}"))
        raise
    chosen = ranks.gather((layers, pairing.pairs, ""))
    for rank, (_, _, problem) in enumerate(chosen):
        if problem:
            raise RuntimeError(f"Process {rank} of {ranks.size} could not choose the layers of the transfer. {problem}")
    first_layers, first_pairs, _ = chosen[0]
    return replace(pairing, pairs=first_pairs) if first_layers == layers else pairing
