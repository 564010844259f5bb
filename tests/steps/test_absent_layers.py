"""Calls in which layers did not run: on one process and on several, where each may skip others."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_problem import assert_close
from engines import TERMS, OneRank, assert_same_state, draw, make
from processes import run_processes
from torch import Tensor

from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.global_engine import GlobalTransportEngine
from lightning_otrt.steps.ranks import Ranks
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.steps.term_engine import TermEngine
from lightning_otrt.transport.named_costs import get_cost

WEIGHTS = [0.2, 0.3, 0.5]
#: For each call and view, the pairs that run on rank 0 and on rank 1. The third starts late, and call 3 has none.
SCHEDULE = [
    [("01", "01"), ("0", "1")],
    [("0", "1"), ("01", "")],
    [("01", "2"), ("012", "0")],
    [("", ""), ("", "")],
    [("2", "012"), ("02", "2")],
    [("1", "12"), ("", "0")],
    [("012", "012"), ("012", "012")],
    [("2", ""), ("2", "")],
]


def part(call: int, view: int, rank: int, pair: int) -> tuple[Tensor, Tensor]:
    """Neurons of one pair that one process sees, whether its layers run or not."""
    seed = 1000 * call + 100 * view + 10 * rank + pair
    return draw(5 + pair, 7 - pair, 11 + rank, seed, torch.float64)


def blank(pair: int) -> tuple[Tensor, Tensor]:
    y, x = part(0, 0, 0, pair)
    return y.detach()[:, :0], x[:, :0]


def engine(cost: str, memory: float, ranks: Any = None) -> TermEngine:
    names = [(f"s{pair}", f"t{pair}") for pair in range(3)]
    term = TERMS[cost]
    settings = TermSettings(get_cost(term["cost"]), term["plan"], epsilon=0.02, memory=memory, solve_every=3)
    if ranks is None:
        return TransportEngine(names, WEIGHTS, settings)
    return GlobalTransportEngine(names, WEIGHTS, settings, ranks=ranks)


def train_globally(cost: str, memory: float) -> list[Any]:
    """Term, gradients and state of each call on one process of two."""
    rank, transport, found = dist.get_rank(), engine(cost, memory, Ranks.world()), []
    for call, views in enumerate(SCHEDULE):
        runs = [view[rank] for view in views]
        neurons = [
            [part(call, view, rank, pair) if str(pair) in ran else blank(pair) for pair in range(3)]
            for view, ran in enumerate(runs)
        ]
        absent = [pair for pair in range(3) if not any(str(pair) in ran for ran in runs)]
        term, distances = transport.term(neurons, 22, absent=absent)
        inputs = [y for view in neurons for y, _ in view if y.requires_grad]
        gradients = torch.autograd.grad(term, inputs) if inputs else []
        skipped = [distance.is_skipped for distance in distances]
        found.append((term.detach(), list(gradients), [d.value for d in distances], skipped))
    transport.synchronize()
    return [found, transport.state_dict()]


def train_at_once(cost: str, memory: float) -> tuple[list[Any], dict[str, Any]]:
    """The same on a process that has the samples of both."""
    transport, found = engine(cost, memory), []
    for call, views in enumerate(SCHEDULE):
        parts = [
            [[part(call, view, rank, pair) for rank, ran in enumerate(runs) if str(pair) in ran] for pair in range(3)]
            for view, runs in enumerate(views)
        ]
        neurons = [
            [
                tuple(torch.cat(side, 1) for side in zip(*all_ranks, strict=True)) if all_ranks else blank(pair)
                for pair, all_ranks in enumerate(view)
            ]
            for view in parts
        ]
        absent = [pair for pair in range(3) if not any(view[pair] for view in parts)]
        term, distances = transport.term(neurons, 46, absent=absent)
        inputs = {
            (view, rank, pair): y
            for view, runs in enumerate(views)
            for pair in range(3)
            for (y, _), rank in zip(parts[view][pair], [r for r in (0, 1) if str(pair) in runs[r]], strict=True)
        }
        gradients = dict(zip(inputs, torch.autograd.grad(term, list(inputs.values())), strict=True)) if inputs else {}
        found.append((term.detach(), gradients, [d.value for d in distances], [d.is_skipped for d in distances]))
    return found, transport.state_dict()


@pytest.mark.parametrize("cost", TERMS)
def test_two_processes_that_skip_other_layers_have_the_numbers_of_one(cost: str) -> None:
    for memory in (0.0, 0.9):
        both = run_processes(2, train_globally, cost, memory)
        expected, state = train_at_once(cost, memory)
        for call, (term, gradients, values, skipped) in enumerate(expected):
            for rank, (found, _) in enumerate(both):
                assert_close(found[call][0], term)
                torch.testing.assert_close(found[call][2], values, rtol=1e-9, atol=1e-10, equal_nan=True)
                assert found[call][3] == skipped
                # Averaged by DDP, the gradients of a process are divided by the number of processes.
                own = [gradients[key] for key in sorted(gradients, key=lambda key: (key[0], key[2])) if key[1] == rank]
                assert_close([gradient / 2 for gradient in found[call][1]], own)
        for _, found in both:
            assert [pair["has_run"] for pair in found["pairs"]] == [True] * 3
            for own, other in zip(found["pairs"], state["pairs"], strict=True):
                assert_close(own["plan"], other["plan"])
                assert (own["sums"] is None) == (memory == 0)
                # Brought together, also where another pair was solved since this one was.
                for part_of_all, expected_part in zip(own["sums"] or (), other["sums"] or (), strict=True):
                    assert_close(part_of_all, expected_part)


@pytest.mark.parametrize("cost", TERMS)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_pair_that_did_not_run_changes_nothing(cost: str, processes: int) -> None:
    """Its plan and statistics stay, its weight is missing, and the others are what they are alone."""
    transport = engine(cost, 0.9, OneRank() if processes == 2 else None)
    alone = engine(cost, 0.9, OneRank() if processes == 2 else None)
    for call in range(3):
        for each in (transport, alone):
            each.term([[part(call, 0, 0, pair) for pair in range(3)]], 11)
    before = transport.states[1].state_dict()
    y, x = part(9, 0, 0, 0)
    term, distances = transport.term([[(y, x), blank(1), blank(2)]], 11, absent=[1, 2])
    whole, others = alone.term([[(y, x), part(9, 0, 0, 1), part(9, 0, 0, 2)]], 11)
    assert_close(term, 0.2 * others[0].value)
    assert_close(distances[0].value, others[0].value)
    assert whole > term
    assert [distance.is_skipped for distance in distances] == [False, True, True]
    assert distances[1].value.isnan()
    assert torch.equal(distances[1].matrix, before["plan"])
    assert distances[1].observations == 0
    assert_same_state({"calls": 0, "pairs": [before]}, {"calls": 0, "pairs": [transport.states[1].state_dict()]})
    assert transport.bad_calls == 0


def test_the_mean_is_that_of_the_views_in_which_a_pair_ran() -> None:
    transport = make(pairs=2)
    pairs = [draw(seed=seed) for seed in range(3)]
    empty = (pairs[0][0].detach()[:, :0], pairs[0][1][:, :0])
    term, distances = transport.term([[pairs[0], pairs[1]], [pairs[2], empty]], 80)
    other = make(pairs=1)
    _, (single,) = other.term([[pairs[1]]], 40)
    torch.testing.assert_close(distances[1].value, single.value)
    assert distances[1].observations == 40
    (gradient,) = torch.autograd.grad(term, pairs[1][0])
    (expected,) = torch.autograd.grad(other.term([[pairs[1]]], 40, reevaluation=True)[0], pairs[1][0])
    torch.testing.assert_close(gradient, expected / 2)


@pytest.mark.parametrize("cost", TERMS)
@pytest.mark.parametrize("ranks", [None, OneRank()])
def test_a_reevaluation_may_run_other_layers(cost: str, ranks: Any) -> None:
    """The closures of LBFGS draw other layers each time."""
    transport = engine(cost, 0.9, ranks)
    for call in range(3):
        transport.term([[part(call, 0, 0, pair) for pair in range(3)]], 11)
    for runs in itertools.product((True, False), repeat=3):
        neurons = [part(3, 0, 0, pair) if ran else blank(pair) for pair, ran in enumerate(runs)]
        absent = [pair for pair, ran in enumerate(runs) if not ran]
        term, distances = transport.term([neurons], 11, absent=absent, reevaluation=True)
        assert [not math.isnan(distance.value) for distance in distances] == list(runs)
        expected = sum(WEIGHTS[pair] * distances[pair].value for pair in range(3) if runs[pair])
        assert_close(term.detach(), torch.as_tensor(expected, dtype=torch.float64))
    assert transport.calls == 3


def test_which_pairs_never_ran() -> None:
    transport = engine("correlation", 0.0)
    assert transport.absent_pairs() == [0, 1, 2]
    transport.term([[blank(0), part(0, 0, 0, 1), blank(2)]], 11, absent=[0, 2])
    assert transport.absent_pairs() == [0, 2]
    resumed = engine("correlation", 0.0)
    resumed.load_state_dict(transport.state_dict(), torch.device("cpu"))
    assert resumed.absent_pairs() == [0, 2]
    transport.reset()
    assert transport.absent_pairs() == [0, 1, 2]


def test_an_engine_that_continues_another_one_knows_what_it_has_not_shared() -> None:
    before, after = (engine("correlation", 0.9, OneRank()) for _ in range(2))
    for call in range(6):  # the last one solves nothing
        before.term([[part(call, 0, 0, pair) for pair in range(3)]], 11)
    after.continue_from(before, torch.device("cpu"))  # without the warning of a save
    with pytest.warns(UserWarning, match="Call `synchronize"):
        saved = after.state_dict()
    with pytest.warns(UserWarning, match="Call `synchronize"):
        assert_same_state(saved, before.state_dict())
    after.synchronize()
    assert_same_state(after.state_dict(), saved)


@pytest.mark.parametrize("late", [0, 2])
def test_a_pair_that_starts_late_does_not_hide_what_the_others_have_not_shared(late: int) -> None:
    """Its plan is solved in a call in which those of the others are not due."""
    transport = engine("correlation", 0.9, OneRank())
    for call in range(6):
        runs = [pair != late or call == 5 for pair in range(3)]
        neurons = [part(call, 0, 0, pair) if ran else blank(pair) for pair, ran in enumerate(runs)]
        transport.term([neurons], 11, absent=[pair for pair, ran in enumerate(runs) if not ran])
    with pytest.warns(UserWarning, match="Call `synchronize"):
        transport.state_dict()
    transport.synchronize()
    transport.state_dict()
