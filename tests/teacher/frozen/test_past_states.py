"""A teacher never goes on from what the student kept of an earlier forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaModel,
    RwkvConfig,
    RwkvModel,
    StaticCache,
)

from lightning_otrt import RepresentationTransfer, compare_representations
from lightning_otrt.teacher.frozen.past_states import PastStates


def gpt(width: int, depth: int = 2) -> nn.Module:
    sizes = {"n_embd": width, "n_layer": depth, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, bos_token_id=0, eos_token_id=0, **sizes)).eval()


def name_of(net: nn.Module, *names: str) -> str:
    """The name that this release gives to the argument for a cache."""
    return next(name for name in names if name in inspect.signature(net.forward).parameters)


def test_an_empty_cache_stays_the_students_and_a_filled_one_is_an_error():
    student, ids = gpt(8), torch.randint(20, (4, 6))
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        expected = student(ids).logits
    transfer = RepresentationTransfer(gpt(16), "blocks")
    with transfer.attached(student):
        logits = student(ids, cache, use_cache=True).logits
        torch.testing.assert_close(logits, expected)
        assert cache.get_seq_length() == 6
        with pytest.raises(ValueError, match=r"goes on from: \w+ \(DynamicCache\)"):
            student(ids, cache)
        with transfer.paused():
            student(ids, cache)
        assert torch.isfinite(transfer.loss())


@pytest.mark.filterwarnings("ignore:A forward of the teacher or of the traced student writes to its inputs")
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, max_cache_len=8)])
def test_an_empty_cache_is_none_to_a_teacher_of_other_sizes(make: Callable[..., Any], by_name: bool):
    """It was made for as many layers, or for tensors of the widths, as the student has."""
    student, teacher, ids = gpt(8), gpt(16, depth=4), torch.randint(20, (4, 6))

    def term(*args: Any, **kwargs: Any) -> float:
        transfer = RepresentationTransfer(teacher, {"transformer.h.1": "transformer.h.3"}, weight=1.0)
        with transfer.attached(student):
            student(ids, *args, **kwargs)
            return float(transfer.loss().detach())

    cache = make(config=student.config)
    given = term(**{name_of(student, "cache", "past_key_values"): cache}) if by_name else term(cache)
    assert given == pytest.approx(term(), rel=1e-5)
    assert cache.get_seq_length() == 6


class Recurrent(nn.Module):
    """It goes on from a state, under a name of the caller's choice."""

    def __init__(self, width: int, kind: Any = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.rnn = kind(width, width, batch_first=True, **options)
        self.head = nn.Linear(width * (2 if self.rnn.bidirectional else 1), 5)

    def forward(self, ids: Tensor, z: Any = None) -> tuple[Tensor, Any]:
        found, z = self.rnn(self.embed(ids), z)
        return self.head(found), z


class Keyword(Recurrent):
    def forward(self, ids: Tensor, *, previous: Any = None) -> tuple[Tensor, Any]:
        return super().forward(ids, previous)


class Whole(Recurrent):
    """A whole batch in one mapping."""

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        return super().forward(batch["ids"], batch.get("before"))


class Cells(nn.Module):
    """A loop over time."""

    def __init__(self, width: int, kind: Any = nn.GRUCell) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(20, width), kind(width, width), nn.Linear(width, 5)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        for x in self.embed(ids).unbind(1):
            state = self.cell(x, state)
        return self.head(state[0] if isinstance(state, tuple) else state), state


class Own(nn.Module):
    """A recurrence of its own, whose state is no state of a known module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, width), nn.Linear(width, 5)

    def forward(self, ids: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embed(ids).cumsum(1)
        x = x if hidden is None else x + hidden[:, None]
        return self.head(x), x[:, -1]


def rwkv(width: int) -> nn.Module:
    sizes = {"vocab_size": 20, "attention_hidden_size": width, "num_hidden_layers": 2, "intermediate_size": 16}
    return RwkvModel(RwkvConfig(**sizes, hidden_size=width, context_length=16, rescale_every=0))


def mamba(width: int) -> nn.Module:
    return MambaModel(MambaConfig(vocab_size=20, hidden_size=width, num_hidden_layers=2, state_size=4))


def detached(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach()
    return type(state)(map(detached, state)) if isinstance(state, (tuple, list)) else state


def second(output: Any) -> Any:
    return output[1]


#: From a width to a network; its layer; how a state enters; how it comes out.
CASES: dict[str, tuple[Any, str, Callable[[nn.Module, Tensor, Any], Any], Callable[[Any], Any]]] = {
    "LSTM, positional": (Recurrent, "rnn", lambda net, x, state: net(x, state), second),
    "LSTM, keyword": (Keyword, "rnn", lambda net, x, state: net(x, previous=state), second),
    "LSTM in two directions": (
        lambda width: Recurrent(width, bidirectional=True, num_layers=2),
        "rnn",
        lambda net, x, state: net(x, state),
        second,
    ),
    "LSTM, projected": (
        lambda width: Recurrent(width, num_layers=2), "rnn", lambda net, x, state: net(x, z=state), second
    ),
    "GRU": (lambda width: Recurrent(width, nn.GRU), "rnn", lambda net, x, state: net(x, state), second),
    "RNN": (lambda width: Recurrent(width, nn.RNN), "rnn", lambda net, x, state: net(x, state), second),
    "a mapping": (Whole, "rnn", lambda net, x, state: net({"ids": x, "before": state}), second),
    "GRU cell": (Cells, "head:input", lambda net, x, state: net(x, state), second),
    "LSTM cell": (
        lambda width: Cells(width, nn.LSTMCell), "head:input", lambda net, x, state: net(x, state), second
    ),
    "of its own": (Own, "head:input", lambda net, x, state: net(x, hidden=state), second),
    "RWKV": (rwkv, "blocks.1", lambda net, x, state: net(x, state=state, use_cache=True), lambda out: out.state),
    "Mamba": (
        mamba,
        "layers.1",
        lambda net, x, state: net(x, use_cache=True, **{name_of(net, "cache", "cache_params"): state}),
        lambda out: out["cache" if "cache" in out else "cache_params"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("width", [8, 12], ids=["same width", "another width"])
@pytest.mark.parametrize("case", CASES)
def test_a_state_is_an_error(case: str, width: int) -> None:
    """In the second batch, and in the first."""
    build, layer, call, state_of = CASES[case]
    student, ids = build(8), torch.randint(20, (4, 6))
    transfer = RepresentationTransfer(build(width), {layer: layer})
    with transfer.attached(student):
        state = detached(state_of(call(student, ids, None)))
        transfer.loss()
        with pytest.raises(ValueError, match=r"of the student hold a state that it goes on from: .*`teacher_inputs`"):
            call(student, ids, state)
        with transfer.paused():
            call(student, ids, state)
    if case == "of its own":  # a plain tensor of unknown use: it may be data
        return
    with (
        transfer.attached(student),
        pytest.raises(ValueError, match="hold a state that it goes on from.*even where the widths are equal"),
    ):
        call(student, ids, state)


class Apart(Recurrent):
    """The two states of an LSTM are arguments of their own."""

    def forward(self, ids: Tensor, first: Any = None, cell: Any = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        return super().forward(ids, None if first is None else (first, cell))


def zeros(state: Any) -> Any:
    return torch.zeros_like(state) if isinstance(state, Tensor) else type(state)(map(zeros, state))


#: Those whose first state is one of zeros.
STARTS = {
    **{name: case for name, case in CASES.items() if name not in ("of its own", "RWKV", "Mamba")},
    "LSTM, two arguments": (
        Apart, "rnn", lambda net, x, state: net(x, *([] if state is None else state)), second
    ),
    "LSTM of more layers": (
        lambda width: Recurrent(width, num_layers=1 if width == 8 else 3),
        "rnn",
        lambda net, x, state: net(x, state),
        second,
    ),
}  # fmt: skip


@pytest.mark.parametrize("width", [8, 12], ids=["same width", "another width"])
@pytest.mark.parametrize("case", STARTS)
def test_zeros_are_the_state_of_a_new_sequence(case: str, width: int) -> None:
    """The term is that without a state, in all steps; a later state that is not zero is an error."""
    build, layer, call, state_of = STARTS[case]
    student, teacher, ids = build(8), build(width), torch.randint(20, (4, 6))
    state = detached(state_of(call(student, ids, None)))

    def terms(given: Any) -> list[float]:
        transfer, found = RepresentationTransfer(teacher, {layer: layer}, plan="uniform", weight=1.0), []
        with transfer.attached(student):
            for _ in range(2):
                call(student, ids, given)
                found.append(float(transfer.loss().detach()))
            with pytest.raises(ValueError, match="hold a state that it goes on from"):
                call(student, ids, state)
        return found

    assert terms(zeros(state)) == pytest.approx(terms(None), rel=1e-5)


def test_zeros_of_an_unknown_recurrence() -> None:
    """They stay as they are."""
    student, ids = Own(8), torch.randint(20, (4, 6))
    inputs = PastStates(student, "forward", (ids,), {}, Own(12))
    state = torch.zeros(4, 8)
    assert inputs.without((ids,), {"hidden": state})[1]["hidden"].shape == (4, 8)
    with pytest.raises(ValueError, match="goes on from: hidden"):
        inputs.without((ids,), {"hidden": state + 1})


def test_compiled_code_gets_no_zeros() -> None:
    """Its later states are not looked at, so that one that is not zero would go unnoticed."""
    student, ids = torch.compile(Recurrent(8), backend="eager"), torch.randint(20, (4, 6))
    transfer = RepresentationTransfer(Recurrent(8), {"rnn": "rnn"})
    with transfer.attached(student), pytest.raises(ValueError, match="a state that it goes on from: z"):
        student(ids, tuple(torch.zeros(1, 4, 8) for _ in range(2)))


def test_keys_of_zeros_are_no_new_sequence() -> None:
    with pytest.raises(ValueError, match="past_key_values .tuple"):
        PastStates(teacher=Own(8)).without((), {"past_key_values": ((torch.zeros(1),),)})


def test_a_state_that_teacher_inputs_leave_out() -> None:
    student, teacher, ids = Recurrent(8), Recurrent(8), torch.randint(20, (4, 6))
    state = tuple(torch.randn(1, 4, 8) for _ in range(2))
    transfer = RepresentationTransfer(
        teacher, {"rnn": "rnn"}, teacher_inputs=lambda ids, z: ids, plan="uniform", weight=1.0
    )
    with transfer.attached(student):
        own = student.rnn(student.embed(ids), state)[0]
        student(ids, state)
        found = float(transfer.loss().detach())
    other = teacher.rnn(teacher.embed(ids))[0]
    rows = torch.cat([each.detach().flatten(0, 1).T for each in (own, other)])
    assert found == pytest.approx(float((1 - torch.corrcoef(rows)[:8, 8:]).mean()), rel=1e-4)


#: Arguments that are no states: their names, shapes or places are alike.
DATA = {
    "a batch of as many sequences as layers": (
        lambda width: nn.GRU(8, width, num_layers=2, batch_first=True), (torch.randn(2, 6, 8),)
    ),
    "hidden states as the sequence": (lambda width: Named(width), (torch.randn(4, 6, 8), torch.randn(4, 6, 8))),
    "observations": (lambda width: Observed(width), (torch.randn(4, 8), torch.randn(4, 8))),
}  # fmt: skip


class Named(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, width), nn.Linear(width, 3)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.head(self.mix(hidden_states + encoder_hidden_states))


class Observed(Named):
    def forward(self, state: Tensor, action: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.mix(state + action))


@pytest.mark.parametrize("name", DATA)
def test_data_is_no_state(name: str) -> None:
    build, args = DATA[name]
    student = build(8)
    root = PastStates(student, "forward", args)
    for _ in range(2):
        assert root.without(args, {})[0] is args


@pytest.mark.parametrize("name", ["past_key_values", "mems"])
def test_states_as_tensors(name: str) -> None:
    PastStates().without((), {name: ()})
    with pytest.raises(ValueError, match=f"{name} .tuple.*teacher_inputs"):
        PastStates().without((), {name: ((torch.ones(1),),)})
    PastStates().without((torch.ones(1),), {"hidden": torch.ones(1)})


def test_an_object_of_states() -> None:
    with pytest.raises(ValueError, match=r"state \(SimpleNamespace"):
        PastStates().without((torch.ones(4, 3),), {"state": SimpleNamespace(wkv=torch.ones(4, 3))})


def test_positional_names_that_differ_do_not_hide_a_state() -> None:
    class Other(Recurrent):
        def forward(self, z: Any = None, ids: Any = None) -> tuple[Tensor, Any]:
            return super().forward(ids, z)

    student, ids = Recurrent(8), torch.randint(20, (4, 6))
    state = tuple(torch.ones(1, 4, 8) for _ in range(2))
    transfer = RepresentationTransfer(Other(8), {"rnn": "rnn"})
    with transfer.attached(student), pytest.raises(ValueError, match="a state that it goes on from: z"):
        student(ids, state)


def test_comparisons() -> None:
    student, ids = Recurrent(8), torch.randint(20, (4, 6))
    batch = ids, tuple(torch.ones(1, 4, 8) for _ in range(2))
    with pytest.raises(ValueError, match="a state that it goes on from: z"):
        compare_representations(student, Recurrent(12), [batch], layers=["rnn"], progress=False, inputs=lambda b: b)
