"""Which layers of two networks belong together: the pairing in order with the least sum of distances."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["match_in_order"]


def match_in_order(distances: Tensor) -> list[tuple[int, int]]:
    r"""The pairing of rows and columns, both in order and each used once, with the least sum of distances.

    As many pairs as possible are formed, so that of two networks every layer of the shallower one has a partner. Among
    all such pairings :math:`i_1 < i_2 < \dots`, :math:`j_1 < j_2 < \dots` dynamic programming finds the one of least
    :math:`\sum_k D_{i_k j_k}` in :math:`O(S T)`.

    Args:
        distances: D, ``(S, T)``; entries that are not finite cannot be paired.

    Returns:
        Pairs ``(row, column)`` in order.

    Example:
        >>> import torch
        >>> match_in_order(torch.tensor([[0.3, 0.1, 0.9], [0.0, 0.8, 0.2]]))
        [(0, 1), (1, 2)]
    """
    table = distances.tolist()
    rows, columns = len(table), len(table[0]) if table else 0
    # (minus the number of pairs, sum of distances) of the best pairing of the first i rows and j columns. Tuples
    # compare in this order, so that more pairs come before a smaller sum.
    best = [[(0, 0.0)] * (columns + 1) for _ in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            choices = [best[i - 1][j], best[i][j - 1]]
            distance = table[i - 1][j - 1]
            if math.isfinite(distance):
                count, total = best[i - 1][j - 1]
                choices.append((count - 1, total + distance))
            best[i][j] = min(choices)
    pairs = []
    i, j = rows, columns
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]
