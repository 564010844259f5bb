"""Flat buffers, and the processes of a global batch that talk through them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import Tensor

from lightning_otrt.steps.ranks import COLLECTIVE_BYTES, Ranks, on_flat_buffers


def buffers_of(*tensors: Tensor) -> list[tuple[torch.dtype, int]]:
    """Type and length of each buffer that the tensors are laid in, after a look at the results."""
    found = []

    def double(flat: Tensor) -> None:
        found.append((flat.dtype, flat.numel()))
        flat.mul_(2)

    for result, tensor in zip(on_flat_buffers(tensors, double), tensors, strict=True):
        assert result.dtype == tensor.dtype
        assert torch.equal(result, 2 * tensor)
    return found


def test_few_numbers_ride_in_the_widest_buffer() -> None:
    singles, doubles, counts = torch.rand(3, 4), torch.rand(5, dtype=torch.float64), torch.tensor(2**24 + 1)
    assert buffers_of(singles, doubles, counts) == [(torch.float64, 18)]
    assert buffers_of(singles, torch.rand(())) == [(torch.float32, 13)]
    assert buffers_of() == []


@pytest.mark.parametrize("beyond", [0, 1])
def test_many_numbers_have_a_buffer_of_their_own(beyond: int) -> None:
    # Four bytes each are added to a float32 that travels as a float64.
    count = COLLECTIVE_BYTES // 4 + beyond
    parts = torch.rand(count - 7), torch.rand(2, dtype=torch.float64), torch.rand(7)
    expected = [(torch.float32, count), (torch.float64, 2)] if beyond else [(torch.float64, count + 2)]
    assert buffers_of(*parts) == expected


def test_tensors_that_need_a_gradient_stay_as_they_are() -> None:
    tensor = torch.ones(3, requires_grad=True)
    [doubled] = on_flat_buffers([tensor], lambda flat: flat.mul_(2))
    assert not doubled.requires_grad
    assert torch.equal(tensor, torch.ones(3))


class Note(NamedTuple):
    numbers: list[Tensor]
    nothing: Tensor | None
    more: dict[str, Tensor]


def talk() -> dict[str, Any]:
    ranks = Ranks.world()
    assert ranks is not None
    note = Note([torch.full((2,), ranks.rank + 1.0), torch.tensor(10)], None, {"a": torch.tensor([ranks.rank])})
    return {
        "sum": tuple(ranks.sum(note)),
        "kept": note.numbers[0],
        "broadcast": ranks.broadcast([torch.full((3,), ranks.rank + 0.1)]),
        "gather": ranks.gather(f"rank {ranks.rank}"),
        "same": ranks.have_same([torch.ones(2)]),
        "other": ranks.have_same([torch.full((2,), 1.0 + 1e-7 * ranks.rank)]),
        "any": ranks.any([ranks.rank == 1, False], "cpu"),
    }


def test_what_processes_say_to_each_other() -> None:
    for rank, found in enumerate(run_processes(2, talk)):
        numbers, nothing, more = found["sum"]
        assert [part.tolist() for part in numbers] == [[3.0, 3.0], 20]
        assert nothing is None
        assert more["a"].tolist() == [1]
        assert found["kept"].tolist() == [rank + 1.0] * 2, "the message itself was changed"
        assert torch.equal(found["broadcast"][0], torch.full((3,), 0.1))
        assert found["gather"] == ["rank 0", "rank 1"]
        assert found["same"] is True
        assert found["other"] is False
        assert found["any"] == [True, False]


def outside() -> str:
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        return str(Ranks.world(group))
    with pytest.raises(ValueError, match="not in the `process_group`") as caught:
        Ranks.world(group)
    return str(caught.value)


def test_a_group_of_one_and_a_process_outside_of_it() -> None:
    alone, said = run_processes(2, outside)
    assert alone == "None"
    assert "Pass its own group" in said
