"""Runs values that need the sums of several processes side by side, so that all share one reduction a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_otrt.transport.cost import Rounds, Sums, ValueAndGradient

__all__ = ["run_rounds"]


def run_rounds(
    rounds: Sequence[Rounds],
    reduce: Callable[[list[Sums]], list[Sums]],
    replies: Sequence[Sums | None] | None = None,
) -> list[ValueAndGradient]:
    """Run generators of :meth:`Cost.shared_value` to their end, with one reduction a round for all of them.

    Args:
        rounds: The generators. They need not have the same number of rounds.
        reduce: Sums every tensor over all processes.
        replies: For each generator, what to send it first: the sums of all processes in answer to those that it has
            already yielded, or None if it has not started. Default: none has started.

    Returns:
        What each generator returns.

    Example:
        >>> import torch
        >>> def mean(part):
        ...     total, count = yield [part.sum(), torch.tensor(float(len(part)))]
        ...     return total / count, torch.ones_like(part) / count
        >>> two_processes = lambda sums: [[2 * tensor for tensor in one] for one in sums]
        >>> [(value, gradient)] = run_rounds([mean(torch.tensor([1.0, 3.0]))], two_processes)
        >>> value, gradient
        (tensor(2.), tensor([0.2500, 0.2500]))
    """
    results: dict[int, ValueAndGradient] = {}
    pending: dict[int, Sums | None] = dict(enumerate(replies or [None] * len(rounds)))
    while pending:
        yielded: dict[int, Sums] = {}
        for index, reply in pending.items():
            try:
                # Sending None to a generator starts it.
                yielded[index] = rounds[index].send(reply)  # type: ignore[arg-type]
            except StopIteration as stop:
                results[index] = stop.value
        pending = dict(zip(yielded, reduce(list(yielded.values())), strict=True)) if yielded else {}
    return [results[index] for index in range(len(rounds))]
