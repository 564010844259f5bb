"""The axis of the samples, and samples in another order, where sizes do not tell them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import BertConfig, BertForMultipleChoice, XLNetConfig, XLNetModel

from lightning_otrt import RepresentationTransfer, neurons, transport_distance
from lightning_otrt.reading.tracer import trace


class Mixing(nn.Module):
    """Attention along the first axis, without anything that tells it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (T, B, C)
        weights = torch.einsum("tbc,sbc->bts", x, x).softmax(-1)
        return x + self.value(torch.einsum("bts,sbc->tbc", weights, x))


class Text(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(Mixing(width) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(0))


class Padded(nn.Module):
    """Sorts by length, as packing once asked for; or lets the packing do it."""

    def __init__(self, width: int, *, sorts: bool) -> None:
        super().__init__()
        self.sorts = sorts
        self.rnn, self.head = nn.GRU(5, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if not self.sorts:
            _, last = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            return self.head(last[-1])
        lengths, order = lengths.sort(descending=True)
        _, last = self.rnn(pack_padded_sequence(x[order], lengths, batch_first=True))
        return self.head(last[-1][order.argsort()])


class Diffusion(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.net(x + (torch.randn_like(x) if noise is None else noise))


def xlnet(width: int) -> nn.Module:
    config = XLNetConfig(vocab_size=30, d_model=width, n_layer=2, n_head=2, d_inner=16)
    return XLNetModel(config).eval()


def term(student, teacher, layers, *inputs):
    transfer = RepresentationTransfer(teacher, layers, plan="exact")
    with transfer.attached(student):
        student(*inputs)
        transfer.loss()
    return transfer.transport_value


def outputs(net, name, *inputs):
    found = []
    with net.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output)):
        net(*inputs)
    return found[0][0] if isinstance(found[0], tuple) else found[0]


@pytest.mark.parametrize(("make", "name"), [(Text, "layers.1"), (xlnet, "layer.1")], ids=["own attention", "XLNet"])
@pytest.mark.parametrize(("samples", "length"), [(12, 12), (12, 9), (9, 12)])
def test_sequence_first_whatever_the_sizes(make, name, samples, length):
    student, teacher = make(8), make(16)
    ids = torch.randint(30, (samples, length))
    found = term(student, teacher, {name: name}, ids)
    # The reading of (T, B, C) is that of its transpose, by the public function for one tensor.
    both = [neurons(outputs(net, name, ids).transpose(0, 1), neuron_axis=-1) for net in (student, teacher)]
    torch.testing.assert_close(found, transport_distance(*both, plan="exact").value)
    order = torch.randperm(samples)
    torch.testing.assert_close(term(student, teacher, {name: name}, ids[order]), found)


def test_batch_first_stays_so():
    net = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8))
    layer = trace(net, (torch.randint(30, (6, 6)),)).layer("1")
    assert (layer.batch_axis, layer.neuron_axis) == (0, 2)


def test_a_warning_where_nothing_tells():
    class Shuffling(nn.Module):
        """Its positions come from outside, and mix with the samples of a permuted batch."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(30, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            return self.layer(self.embed(ids) + positions[None, :, None])

    ids, positions = torch.randint(30, (6, 6)), torch.randn(6)
    with pytest.warns(UserWarning, match=r"as many samples as its sequences have positions \(6\)"):
        term(Shuffling(), Shuffling(), {"layer": "layer"}, ids, positions)
    term(Shuffling(), Shuffling(), {"layer": "layer"}, torch.randint(30, (5, 6)), positions)


def test_samples_that_are_sorted_inside():
    inputs = torch.randn(8, 6, 5), torch.randint(2, 7, (8,))
    sorting, plain = Padded(8, sorts=True), Padded(8, sorts=False)
    assert "rnn" in trace(sorting, inputs).reordered
    assert trace(plain, inputs).reordered == ()
    with pytest.warns(UserWarning, match=r"student layers 'rnn' hold the samples in another order"):
        term(sorting, Padded(16, sorts=False), {"rnn": "rnn"}, *inputs)
    with pytest.warns(UserWarning, match=r"teacher layers 'rnn' hold the samples in another order"):
        term(plain, Padded(16, sorts=True), {"rnn": "rnn"}, *inputs)


class Sorted(nn.Module):
    """Takes samples that are sorted by length, and puts a layer behind the recurrent one."""

    def __init__(self, width: int, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.rnn = nn.LSTM(5, width, batch_first=batch_first)
        self.layer, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        packed, _ = self.rnn(pack_padded_sequence(x, lengths, batch_first=self.batch_first))
        found = pad_packed_sequence(packed, batch_first=self.batch_first)[0]
        return self.head(self.layer(found).mean(int(self.batch_first)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [8, 9])
def test_sorted_samples_show_their_axis(batch_first: bool, length: int) -> None:
    """No warning that nothing tells it, although they cannot stand in another order."""
    lengths = torch.tensor([length, 7, 7, 6, 5, 5, 3, 2])
    model = Sorted(6, batch_first=batch_first)
    traced = trace(model, (torch.randn(8, length, 5), lengths))
    assert not traced.unclear_axes
    assert not traced.reordered
    assert {traced.layer(name).batch_axis for name in ("rnn", "layer")} == {0 if batch_first else 1}
    term(model, Sorted(8, batch_first=batch_first), {"rnn": "rnn"}, torch.randn(8, length, 5), lengths)


def test_a_recurrent_layer_tells_its_own_axis() -> None:
    """Also where no other samples can be tried."""

    class Strict(Sorted):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            assert (lengths.diff() < 0).all()
            return super().forward(x, lengths)

    inputs = torch.randn(6, 6, 5), torch.arange(6, 0, -1)
    assert trace(Strict(6, batch_first=True), inputs).unclear_axes == ("layer",)
    term(Strict(6, batch_first=True), Strict(8, batch_first=True), {"rnn": "rnn"}, *inputs)


def test_the_same_order_on_both_sides_is_right():
    inputs = torch.randn(8, 6, 5), torch.tensor([2, 3, 6, 5, 4, 1, 7, 8]).clamp_max(6)
    teacher = Padded(16, sorts=True)
    student, plain = Padded(8, sorts=True), Padded(8, sorts=False)
    plain.load_state_dict(student.state_dict())
    teacher_plain = Padded(16, sorts=False)
    teacher_plain.load_state_dict(teacher.state_dict())
    found = term(student, teacher, {"rnn": "rnn"}, *inputs)
    torch.testing.assert_close(found, term(plain, teacher_plain, {"rnn": "rnn"}, *inputs))


def test_noise_that_each_network_draws_for_itself():
    x = torch.randn(8, 4)
    told = r"The forward of the student \(Diffusion\) and that of the teacher \(Diffusion\) draws random numbers"
    with pytest.warns(UserWarning, match=told):
        term(Diffusion(8), Diffusion(8), {"net.1": "net.1"}, x)
    student, teacher, noise = Diffusion(8), Diffusion(6), torch.randn(8, 4)
    found = term(student, teacher, {"net.1": "net.1"}, x, noise)
    both = [neurons(net.net[:2](x + noise), neuron_axis=-1) for net in (student, teacher)]
    torch.testing.assert_close(found, transport_distance(*both, plan="exact").value)


def test_others_run_once():
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert not warnings.warn("runs", stacklevel=2)
            return self.layer(x)

    with pytest.warns(UserWarning, match="runs") as caught:
        trace(Once(), (torch.randn(5, 4),))
    assert len(caught) == 1


class Attention(nn.Module):
    """Each row for itself, without anything that tells the axes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (rows, T, C)
        return x + self.value((x @ x.mT).softmax(-1) @ x)


class Folded(nn.Module):
    """Sentences of documents, the rows of each sample together or one apart from the other."""

    def __init__(self, width: int, *, samples_first: bool) -> None:
        super().__init__()
        self.embed, self.head, self.samples_first = nn.Embedding(30, width), nn.Linear(width, 3), samples_first
        self.layers = nn.ModuleList(Attention(width) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:  # (B, sentences, T)
        rows = ids if self.samples_first else ids.transpose(0, 1)
        x = self.embed(rows.flatten(0, 1))
        for layer in self.layers:
            x = layer(x)
        x = self.head(x.mean(1)).view(*rows.shape[:2], -1)
        return x.mean(1 if self.samples_first else 0)


@pytest.mark.parametrize("samples_first", [True, False])
@pytest.mark.parametrize("tokens", [8, 12])
def test_rows_of_folded_samples_with_as_many_tokens_as_samples(tokens: int, samples_first: bool) -> None:
    torch.manual_seed(0)
    student, teacher = Folded(6, samples_first=samples_first), Folded(10, samples_first=samples_first)
    ids = torch.randint(30, (8, 3, tokens))
    seen = []
    for net in (student, teacher):
        handle = net.layers[1].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        net(ids)
        handle.remove()
    y, x = (neurons(each, neuron_axis=-1) for each in seen)
    right = transport_distance(y, x, plan="exact").value
    torch.testing.assert_close(term(student, teacher, [("layers.1", "layers.1")], ids), right, rtol=1e-4, atol=1e-5)


def test_multiple_choice() -> None:
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    model = BertForMultipleChoice(config).eval()
    mask = (torch.arange(12) < torch.randint(3, 12, (12, 4, 1))).long()
    traced = trace(model, (), {"input_ids": torch.randint(30, (12, 4, 12)), "attention_mask": mask})
    layer = traced.layer("bert.encoder.layer.1")
    assert (layer.output_shape, layer.batch_axis) == ((48, 12, 16), 0)
    assert not traced.unclear_axes


def _sorted(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1).argsort()


def _put(x: Tensor, places: Tensor) -> Tensor:
    whole = torch.empty_like(x)
    whole[places] = x
    return whole


def _halves(x: Tensor) -> Tensor:
    return torch.cat([x[len(x) // 2 :], x[: len(x) // 2]])


#: What code does to the samples, and what undoes it.
ORDERS = {
    "flip": (lambda x: x.flip(0), lambda y, x: y.flip(0)),
    "roll": (lambda x: x.roll(1, 0), lambda y, x: y.roll(-1, 0)),
    "sort by values": (lambda x: x[_sorted(x)], lambda y, x: y[_sorted(x).argsort()]),
    "select": (lambda x: x.index_select(0, _sorted(x)), lambda y, x: y.index_select(0, _sorted(x).argsort())),
    "put": (lambda x: _put(x, _sorted(x)), lambda y, x: y[_sorted(x)]),
    "copy": (lambda x: torch.empty_like(x).index_copy_(0, _sorted(x), x), lambda y, x: y[_sorted(x)]),
    "halves": (_halves, lambda y, x: _halves(y)),
    "pieces": (lambda x: torch.cat(x.chunk(4)[::-1]), lambda y, x: torch.cat(y.chunk(4)[::-1])),
    "list": (lambda x: torch.stack(list(x)[::-1]), lambda y, x: torch.stack(list(y)[::-1])),
}
IN_ORDER = {
    "as it is": (lambda x: x, lambda y, x: y),
    "pieces in order": (lambda x: torch.cat(x.chunk(4)), lambda y, x: torch.stack(list(y))),
    "rows of a map": (lambda x: x.flip(-1).roll(1, -1), lambda y, x: y),
}


class Ordered(nn.Module):
    """Convolutions, or linear layers, on samples in another order, which the output no longer has."""

    def __init__(self, width: int, change, undo, *, is_flat: bool) -> None:
        super().__init__()
        self.change, self.undo = change, undo
        self.first = nn.Linear(8, width) if is_flat else nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(self.change(x)).relu()
        return self.undo(self.head(hidden if hidden.dim() == 2 else hidden.mean((2, 3))), x)


def _warnings_of(student: nn.Module, teacher: nn.Module, x: Tensor) -> list[str]:
    transfer = RepresentationTransfer(teacher, {"first": "first"})
    with warnings.catch_warnings(record=True) as seen, transfer.attached(student):
        warnings.simplefilter("always")
        student(x)
        transfer.loss()
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("name", [*ORDERS, *IN_ORDER])
def test_samples_that_code_puts_into_another_order(name: str, is_flat: bool) -> None:
    x = torch.randn(8, 8) if is_flat else torch.randn(8, 3, 10, 10)
    change, undo = {**ORDERS, **IN_ORDER}[name]
    odd, plain = (Ordered(4, *how, is_flat=is_flat) for how in ((change, undo), IN_ORDER["as it is"]))
    for student, teacher, side in ((odd, plain, "student"), (plain, odd, "teacher")):
        found = _warnings_of(student, teacher, x)
        assert len(found) == (name in ORDERS)
        assert all(f"The {side} layers 'first' hold the samples in another order" in text for text in found)
    assert not _warnings_of(odd, Ordered(6, change, undo, is_flat=is_flat), x)


def test_infinite_scores_are_no_random_numbers() -> None:
    """A number that evaluation mode draws for nothing, and scores of minus infinity in the same network."""

    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.scores, self.head = nn.Linear(5, 6), Scores(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1)
            x = self.embed(x)
            return self.head((self.scores(x).softmax(-1) @ x).mean(1))

    assert not trace(Net(), (torch.randn(4, 5, 5),)).is_random
