"""A choice that depends on the data of each process: the first process makes it for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lightning_otrt.steps.ranks import Ranks

__all__ = ["choice_of_first"]

Choice = TypeVar("Choice")


def choice_of_first(ranks: Ranks | None, request: str, choose: Callable[[], Choice]) -> Choice:
    """What ``choose`` returns on the first process, on all processes. A collective.

    A process with another request than the first one keeps its own choice. The engine then reports how the settings
    differ.

    Args:
        ranks: The processes; None: this process alone.
        request: What is to be chosen, in words that are equal for equal requests.
        choose: Makes the choice on this process. Every process calls it; its result can be pickled.

    Raises:
        Exception: Whatever ``choose`` raises on this process.
        RuntimeError: If it raises on another process. So no process waits for one that has failed.

    Example:
        >>> choice_of_first(None, "a layer", lambda: "layer4")
        'layer4'
    """
    if ranks is None:
        return choose()
    try:
        choice = choose()
    except Exception as error:
        ranks.gather((request, None, f"{type(error).__name__}: {error}"))
        raise
    answers = ranks.gather((request, choice, ""))
    for rank, (_, _, problem) in enumerate(answers):
        if problem:
            raise RuntimeError(f"Process {rank} of {ranks.size} could not choose the layers of the transfer. {problem}")
    first_request, first_choice, _ = answers[0]
    return first_choice if first_request == request else choice
