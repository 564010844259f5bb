"""From layer outputs to neurons: against torch's adaptive pooling and loops over samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reading.adaptive import ADAPTIVE, columns
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_otrt import neurons
from lightning_otrt.reading.neurons.positions import match_positions
from lightning_otrt.reading.neurons.reader import NeuronReader


@pytest.mark.parametrize(
    ("shape", "grid", "last"),
    [((3, 5, 7, 9), grid, False) for grid in (1, 2, 4, None)]
    + [((3, 5, 2, 6), 4, False), ((3, 5, 40), 4, False), ((3, 5, 40), 2, False), ((3, 5, 6, 8, 4), 4, False)]
    + [((3, 5, 7, 9), 4, True), ((3, 5, 6, 8, 4), 2, True), ((3, 5, 7, 9), None, True)],
)
def test_maps(grid: int | None, shape: tuple[int, ...], last: bool) -> None:
    x = torch.randn(shape)
    sizes = shape[2:]
    if grid is not None:
        limit = grid**2 if len(sizes) == 1 else grid
        sizes = tuple(min(limit, size) for size in sizes)
    expected = columns(ADAPTIVE[len(sizes)](x, sizes))
    x, axis = (x.movedim(1, -1), -1) if last else (x, 1)
    torch.testing.assert_close(neurons(x, neuron_axis=axis, grid=grid), expected)
    torch.testing.assert_close(neurons(x, neuron_axis=axis % x.dim(), grid=grid), expected)


def test_vectors() -> None:
    x = torch.randn(6, 4)
    assert torch.equal(neurons(x), x.T)
    assert torch.equal(neurons(x.T, batch_axis=1), x.T)
    assert torch.equal(neurons(x.T, neuron_axis=0, batch_axis=1), x.T)


@pytest.mark.parametrize(
    ("height", "width", "prefix", "batch_axis"),
    [(8, 8, 0, 0), (7, 7, 1, 0), (14, 14, 5, 0), (3, 3, 1, 1), (1, 1, 0, 1), (1, 1, 5, 0)],
)
def test_square_tokens_are_a_map(prefix: int, batch_axis: int, height: int, width: int) -> None:
    image = torch.randn(3, 5, height, width)
    tokens = torch.cat((torch.full((3, prefix, 5), 1e3), image.flatten(2).mT), 1)
    tokens = tokens.transpose(0, batch_axis)
    found = neurons(tokens, neuron_axis=-1, prefix_tokens=prefix, batch_axis=batch_axis)
    torch.testing.assert_close(found, neurons(image, neuron_axis=1))


@pytest.mark.parametrize("options", [{"prefix_tokens": 1}, {"token_grid": (4, 4)}])
@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 17), 1), ((3, 5, 4, 4), 1), ((3, 4, 4, 5), -1), ((3, 5), None)])
def test_options_of_tokens_are_refused_elsewhere(
    shape: tuple[int, ...], axis: int | None, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"no `prefix_tokens` and no `token_grid` for an output of shape \(3, "):
        neurons(torch.randn(shape), neuron_axis=axis, **options)


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(4, 5)], layout=torch.jagged)
    with pytest.raises(TypeError, match="but got a nested one"):
        neurons(nested, neuron_axis=-1)


def test_token_grid_need_not_be_square() -> None:
    image = torch.randn(3, 5, 6, 9)
    tokens = image.flatten(2).mT
    expected = neurons(image, neuron_axis=1)
    torch.testing.assert_close(neurons(tokens, neuron_axis=-1, token_grid=(6, 9)), expected)
    # 36 tokens are a square, but need not mean one.
    image = torch.randn(3, 5, 4, 9)
    tokens = image.flatten(2).mT
    expected = neurons(image, neuron_axis=1)
    torch.testing.assert_close(neurons(tokens, neuron_axis=-1, token_grid=(4, 9)), expected)


@pytest.mark.parametrize(
    ("prefix", "batch_axis", "grid"), [(0, 0, None), (2, 0, None), (0, 1, 1), (2, 1, 2), (0, 0, 4), (2, 0, 4)]
)
def test_sequences(prefix: int, batch_axis: int, grid: int | None) -> None:
    sequence = torch.randn(3, 5, 19)
    tokens = torch.cat((torch.full((3, prefix, 5), 1e3), sequence.mT), 1).transpose(0, batch_axis)
    found = neurons(tokens, neuron_axis=2, prefix_tokens=prefix, batch_axis=batch_axis, grid=grid)
    size = 19 if grid is None else min(19, grid**2)
    torch.testing.assert_close(found, columns(F.adaptive_avg_pool1d(sequence, size)))


@pytest.mark.parametrize(
    ("side", "prefix", "grid", "mask_dtype"),
    [(side, prefix, 3, torch.bool) for side in ("left", "right", "scattered") for prefix in (0, 1)]
    + [("right", 1, grid, torch.int64) for grid in (1, 2, None)]
    + [("left", 0, 2, torch.float32)],
)
def test_padding_is_left_out(side: str, prefix: int, grid: int | None, mask_dtype: torch.dtype) -> None:
    total, lengths = 16, (16, 11, 4, 1, 0)
    tokens = torch.randn(5, total, 6)
    mask = torch.zeros(5, total, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        where = {"left": torch.arange(total - length, total), "right": torch.arange(length)}
        row[where.get(side, torch.randperm(total)[:length])] = True
    target = total if grid is None else grid**2
    expected = torch.zeros(5, 6, target)
    for sample, (row, keep) in enumerate(zip(tokens, mask, strict=True)):
        if keep.any():
            expected[sample] = F.adaptive_avg_pool1d(row[keep].T[None], target)[0]
    # What padding holds must not matter, not even where it is not finite.
    tokens = tokens.masked_fill(~mask[..., None], torch.nan)
    if prefix:
        tokens = torch.cat((torch.full((5, prefix, 6), 1e3), tokens), 1)
        full = torch.cat((torch.ones(5, prefix, dtype=torch.bool), mask), 1)
        found = neurons(tokens, neuron_axis=-1, mask=full.to(mask_dtype), grid=grid, prefix_tokens=prefix)
        torch.testing.assert_close(found, columns(expected))
    found = neurons(tokens, neuron_axis=-1, mask=mask.to(mask_dtype), grid=grid, prefix_tokens=prefix)
    torch.testing.assert_close(found, columns(expected))


def test_gradient_stays_out_of_padding() -> None:
    tokens = torch.randn(2, 9, 3, requires_grad=True)
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    neurons(tokens, neuron_axis=-1, mask=mask, grid=2).square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad[0, 4:] == 0).all()
    assert (tokens.grad[0, :4] != 0).all()


READINGS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "vector": ((4, 6), {}),
    "vector, batch second": ((6, 4), {"batch_axis": 1}),
    "pooled map": ((4, 6, 8, 8), {"neuron_axis": 1}),
    "odd map": ((4, 6, 7, 7), {"neuron_axis": 1}),
    "small map": ((4, 6, 4, 4), {"neuron_axis": 1}),
    "whole map": ((4, 6, 5, 5), {"neuron_axis": 1, "grid": None}),
    "one position": ((4, 6, 1, 1), {"neuron_axis": 1}),
    "channels last": ((4, 4, 4, 6), {"neuron_axis": -1}),
    "tokens": ((4, 17, 6), {"neuron_axis": -1, "prefix_tokens": 1}),
    "sequence": ((4, 13, 6), {"neuron_axis": -1}),
    "whole sequence": ((4, 13, 6), {"neuron_axis": -1, "grid": None}),
}


@pytest.mark.parametrize("case", READINGS)
def test_autocast_does_not_lower_the_precision_of_a_reading(case: str) -> None:
    shape, arguments = READINGS[case]
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        found = neurons(x, **arguments)
    assert torch.equal(found, neurons(x, **arguments))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in READINGS]
    + [("vector", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    + [("pooled map", torch.bfloat16), ("odd map", torch.float16), ("tokens", torch.bfloat16)],
)
def test_reading_is_wide_differentiable_and_a_copy(case: str, dtype: torch.dtype) -> None:
    shape, arguments = READINGS[case]
    x = torch.randn(shape).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaf = x.clone().requires_grad_()
    output = leaf * 1
    found = neurons(output, **arguments)
    assert found.dtype == wide
    # Half precision is widened before it is averaged, not after.
    torch.testing.assert_close(found, neurons(x.to(wide), **arguments), rtol=1e-6, atol=1e-6)
    before = found.detach().clone()
    output.data.fill_(7)
    assert torch.equal(found, before), "an in-place layer after this one rewrote the reading"
    found.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    used = leaf.grad[:, 1:] if arguments.get("prefix_tokens") else leaf.grad
    assert (used != 0).all()


def test_reading_of_a_leaf_can_be_overwritten_before_backward() -> None:
    """What ReLU(inplace=True) after a recorded layer does, with autograd's version counter looking on."""
    layer = torch.nn.Conv2d(3, 4, 1)
    for size in (4, 7, 8):
        output = layer(torch.randn(2, 3, size, size))
        found = neurons(output, neuron_axis=1)
        F.relu_(output)
        found.square().sum().backward()


@pytest.mark.parametrize(
    ("shape", "arguments", "words"),
    [
        ((4,), {}, r"output to give \(batch, neurons, ...\), but got \(4,\)"),
        ((), {}, r"but got \(\)"),
        ((4, 6, 5), {}, r"neuron axis of output with shape \(4, 6, 5\) is ambiguous.*`neuron_axis=1`.*axis=-1`"),
        ((4, 6, 5, 5), {}, "ambiguous"),
        ((4, 6), {"neuron_axis": 2}, r"`neuron_axis` of output to lie in \[-2, 1\] for shape \(4, 6\), but got 2"),
        ((4, 6, 5), {"neuron_axis": -4}, r"\[-3, 2\] .* but got -4"),
        ((4, 6, 5), {"neuron_axis": 0}, r"neuron axis of output with shape \(4, 6, 5\) is its batch axis \(0\)"),
        ((4, 6, 5), {"neuron_axis": -2, "batch_axis": 1}, r"is its batch axis \(1\)"),
        ((4, 3, 5), {"neuron_axis": -1, "prefix_tokens": 3}, "has 3 tokens and `prefix_tokens` is 3"),
        ((4, 2, 5), {"neuron_axis": -1, "prefix_tokens": 3}, "has 2 tokens and `prefix_tokens` is 3"),
        ((4, 2, 5), {"neuron_axis": -1, "prefix_tokens": 3, "mask": torch.ones(4, 2)}, "has 2 tokens"),
        (
            (4, 17, 5),
            {"neuron_axis": -1, "token_grid": (4, 4)},
            r"gives 17 tokens after 0 prefix tokens, which do not fill the token grid \(4, 4\)",
        ),
        ((4, 9, 5), {"neuron_axis": -1, "mask": torch.ones(4, 8)}, r"shape \(4, 9\), but got \(4, 8\)"),
        ((4, 9, 5), {"neuron_axis": -1, "mask": torch.ones(3, 9)}, r"shape \(4, 9\), but got \(3, 9\)"),
        ((4, 9, 5), {"neuron_axis": -1, "mask": torch.ones(9)}, r"shape \(4, 9\), but got \(9,\)"),
    ],
)
def test_errors_name_shape_and_cure(shape: tuple[int, ...], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        neurons(torch.randn(shape), **arguments)


class NoSync(TorchDispatchMode):
    """Fails where a value is read on the host, which on an accelerator waits for it, or copied to it."""

    SYNCS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "_to_copy")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        copies = name == "_to_copy" and (kwargs or {}).get("device") is None
        assert copies or name not in self.SYNCS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_sync_sees_a_sync() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        torch.ones(2).sum().item()


@pytest.mark.parametrize(
    ("case", "masked"), [(case, False) for case in READINGS] + [("sequence", True), ("whole sequence", True)]
)
def test_reading_never_waits_for_the_device(case: str, masked: bool) -> None:
    shape, arguments = READINGS[case]
    x = torch.randn(shape)
    mask = torch.ones(shape[:2]) if masked else None
    with NoSync():
        reading = NeuronReader("layer", **arguments)(x, mask)
        match_positions(reading, reading[..., :1] if reading.dim() > 2 else reading, "pair")


def test_a_mask_where_there_is_no_sequence_is_refused() -> None:
    mask = torch.ones(4, 9, dtype=torch.bool)
    for shape, options in (((4, 6, 3, 3), {"neuron_axis": 1}), ((4, 9, 6), {"neuron_axis": 1}), ((4, 6), {})):
        with pytest.raises(ValueError, match=r"Expected no `mask` for an output of shape \(4, "):
            neurons(torch.randn(shape), mask=mask, **options)
    with pytest.raises(ValueError, match="token_grid"):
        neurons(torch.randn(4, 9, 6), mask=mask, neuron_axis=-1, token_grid=(3, 3))


def test_an_additive_mask_is_refused() -> None:
    """Its 0 keeps a token, which read as a truth value would leave it out."""
    mask = torch.zeros(4, 9)
    mask[0, 5:] = -torch.inf
    with pytest.raises(ValueError, match="it has negative values.*Pass `mask == 0`"):
        neurons(torch.randn(4, 9, 6), mask=mask, neuron_axis=-1)
