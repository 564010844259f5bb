"""One process chooses for all, and none waits for one that has failed."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from processes import run_processes

from lightning_otrt.steps.first_process import choice_of_first
from lightning_otrt.steps.ranks import Ranks


def test_alone():
    assert choice_of_first(None, "a", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        choice_of_first(None, "a", lambda: 1 // 0)


def choose_on_three() -> list[Any]:
    ranks, rank = Ranks.world(), dist.get_rank()
    found: list[Any] = [choice_of_first(ranks, "same", lambda: rank)]
    found.append(choice_of_first(ranks, "same" if rank < 2 else "other", lambda: rank))

    def fails() -> int:
        if rank == 1:
            raise ValueError("no layer")
        return rank

    try:
        choice_of_first(ranks, "same", fails)
    except (ValueError, RuntimeError) as error:
        found.append((type(error).__name__, str(error)))
    return found


def test_three_processes():
    found = run_processes(3, choose_on_three)
    assert [each[0] for each in found] == [0, 0, 0]
    assert [each[1] for each in found] == [0, 0, 2], "a process with another request keeps its own choice"
    other = ("RuntimeError", "Process 1 of 3 could not choose the layers of the transfer. ValueError: no layer")
    assert [each[2] for each in found] == [other, ("ValueError", "no layer"), other]
