"""From layer outputs to neurons: against torch's adaptive pooling and loops over samples."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lightning_otrt import neurons
from lightning_otrt.reading.neurons import NeuronReader
from lightning_otrt.reading.outputs import select_tensor
from lightning_otrt.reading.pooling import pool
from lightning_otrt.reading.positions import as_matrix, match_positions

ADAPTIVE: dict[int, Callable[[Tensor, Any], Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
SIZES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((16,), (16,)),
    ((16,), (4,)),
    ((17,), (16,)),
    ((31,), (7,)),
    ((5,), (1,)),
    ((8, 8), (4, 4)),
    ((7, 7), (4, 4)),
    ((14, 14), (4, 4)),
    ((4, 4), (4, 4)),
    ((8, 7), (4, 4)),
    ((3, 9), (3, 4)),
    ((1, 1), (1, 1)),
    ((6, 10), (1, 1)),
    ((4, 8, 8), (2, 4, 4)),
    ((14, 15), (4, 4)),
    ((16, 12), (4, 4)),
    ((16, 4), (4, 4)),
    ((5, 7, 9), (4, 4, 4)),
    ((3, 4, 5), (3, 4, 4)),
]


def columns(reading: Tensor) -> Tensor:
    """Neuron matrix of ``(B, C, *positions)``, written out as a loop."""
    rows = [[sample[neuron].flatten() for sample in reading] for neuron in range(reading.shape[1])]
    return torch.stack([torch.cat(row) for row in rows])


@pytest.mark.parametrize(("sizes", "targets"), SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pool_is_adaptive_average_pooling(
    sizes: tuple[int, ...], targets: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    x = torch.randn(3, 5, *sizes, dtype=dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        x = torch.stack((x, x), -1)[..., 0]
    x.requires_grad_()
    pooled = pool(x, targets)
    assert pooled.dtype == dtype
    expected = ADAPTIVE[len(sizes)](x, targets)
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((value * weights).sum(), x)[0] for value in (pooled, expected)))


@pytest.mark.parametrize("grid", [1, 2, 4, None])
@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (3, 5, 7, 9), (3, 5, 2, 6), (3, 5, 40), (3, 5, 6, 8, 4)])
@pytest.mark.parametrize("last", [False, True])
def test_maps(grid: int | None, shape: tuple[int, ...], last: bool) -> None:
    x = torch.randn(shape)
    sizes = shape[2:]
    if grid is not None:
        limit = grid**2 if len(sizes) == 1 else grid
        sizes = tuple(min(limit, size) for size in sizes)
    expected = columns(ADAPTIVE[len(sizes)](x, sizes))
    if last and x.dim() > 3:
        x = x.movedim(1, -1)
    axis = -1 if last and x.dim() > 3 else 1
    torch.testing.assert_close(neurons(x, neuron_axis=axis, grid=grid), expected)
    torch.testing.assert_close(neurons(x, neuron_axis=axis % x.dim(), grid=grid), expected)


def test_vectors() -> None:
    x = torch.randn(6, 4)
    assert torch.equal(neurons(x), x.T)
    assert torch.equal(neurons(x.T, batch_axis=1), x.T)
    assert torch.equal(neurons(x.T, neuron_axis=0, batch_axis=1), x.T)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("batch_axis", [0, 1])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (14, 14), (3, 3), (1, 1)])
def test_square_tokens_are_a_map(prefix: int, batch_axis: int, height: int, width: int) -> None:
    image = torch.randn(3, 5, height, width)
    tokens = torch.cat((torch.full((3, prefix, 5), 1e3), image.flatten(2).mT), 1)
    tokens = tokens.transpose(0, batch_axis)
    found = neurons(tokens, neuron_axis=-1, prefix_tokens=prefix, batch_axis=batch_axis)
    torch.testing.assert_close(found, neurons(image, neuron_axis=1))


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


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("batch_axis", [0, 1])
@pytest.mark.parametrize("grid", [None, 1, 2, 4])
def test_sequences(prefix: int, batch_axis: int, grid: int | None) -> None:
    sequence = torch.randn(3, 5, 19)
    tokens = torch.cat((torch.full((3, prefix, 5), 1e3), sequence.mT), 1).transpose(0, batch_axis)
    found = neurons(tokens, neuron_axis=2, prefix_tokens=prefix, batch_axis=batch_axis, grid=grid)
    size = 19 if grid is None else min(19, grid**2)
    torch.testing.assert_close(found, columns(F.adaptive_avg_pool1d(sequence, size)))


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [1, 2, 3, None])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
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


@pytest.mark.parametrize("case", READINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
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


POSITIONS: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((6,), (8,), 1),
    ((6, 4, 4), (8, 4, 4), 16),
    ((6, 4, 4), (8, 2, 2), 4),
    ((6, 2, 4), (8, 4, 3), 6),
    ((6,), (8, 4, 4), 1),
    ((6, 4, 4), (8,), 1),
    ((6, 16), (8, 9), 9),
    ((6,), (8, 9), 1),
    ((6, 3, 4, 4), (8, 2, 2, 4), 16),
]


@pytest.mark.parametrize(("student", "teacher", "positions"), POSITIONS)
def test_match_positions(student: tuple[int, ...], teacher: tuple[int, ...], positions: int) -> None:
    y, x = torch.randn(5, *student), torch.randn(5, *teacher)
    found = match_positions(y, x, "pair")
    sizes = tuple(map(min, student[1:], teacher[1:])) if min(len(student), len(teacher)) > 1 else ()
    for matrix, reading in zip(found, (y, x), strict=True):
        assert matrix.shape == (reading.shape[1], 5 * positions)
        if sizes:
            expected = ADAPTIVE[len(sizes)](reading, sizes)
        else:
            expected = reading.flatten(2).mean(2) if reading.dim() > 2 else reading
        torch.testing.assert_close(matrix, columns(expected))


def test_match_positions_errors() -> None:
    with pytest.raises(ValueError, match=r"layer a: the batch sizes differ \(student \(4, 6\), teacher \(5, 8\) as"):
        match_positions(torch.ones(4, 6), torch.ones(5, 8), "layer a")
    with pytest.raises(ValueError, match=r"layer a: the positions cannot be paired .*one side is a map and the other"):
        match_positions(torch.ones(4, 6, 16), torch.ones(4, 8, 4, 4), "layer a")


def test_as_matrix() -> None:
    reading = torch.randn(3, 4, 2, 5)
    assert torch.equal(as_matrix(reading), columns(reading))


@dataclass
class Opaque:
    tensor: Tensor


Pair = namedtuple("Pair", ["hidden", "other"])
X, Z = torch.randn(4, 6), torch.randn(4, 3)


@pytest.mark.parametrize(
    ("output", "select"),
    [
        (X, None),
        (X, "ignored"),
        ((X,), None),
        ([X], None),
        ((X, None), None),
        ((X, Z), 0),
        ((Z, X), -1),
        (Pair(X, Z), 0),
        ({"x": X, "z": Z}, "x"),
        (OrderedDict(x=X), "x"),
        ({"x": (X, None)}, "x"),
        (BaseModelOutputWithPooling(last_hidden_state=Z, pooler_output=X), "pooler_output"),
        (BaseModelOutputWithPooling(last_hidden_state=X), "last_hidden_state"),
        (BaseModelOutputWithPooling(last_hidden_state=X), 0),
    ],
)
def test_select(output: Any, select: str | int | None) -> None:
    assert select_tensor(output, select, "layer") is X
    assert torch.equal(neurons(output, select=select), X.T)
    assert torch.equal(as_matrix(NeuronReader("layer", select=select)(output)), X.T)


@pytest.mark.parametrize(
    ("output", "select", "error", "words"),
    [
        (
            (X, Z),
            None,
            TypeError,
            r"layer: its output is not one tensor but tuple\(float32 \(4, 6\), float32",
        ),
        ((X, 1), None, TypeError, r"tuple\(float32 \(4, 6\), int\). Choose one with `select=`"),
        ((), None, TypeError, r"not one tensor but tuple\(\)"),
        ((None,), None, TypeError, "not one tensor"),
        ({"x": X}, None, TypeError, r"not one tensor but dict\(x: float32 \(4, 6\)\). Choose one with `select=`"),
        ({"x": X}, "y", ValueError, r"layer: its output has no 'y'; it is dict\(x: float32 \(4, 6\)\)"),
        ((X, Z), 2, ValueError, r"has no 2; it is tuple\("),
        ((X, Z), "x", ValueError, r"has no 'x'"),
        (
            BaseModelOutputWithPooling(last_hidden_state=X),
            "logits",
            ValueError,
            r"\(last_hidden_state: float32",
        ),
        (Opaque(X), None, TypeError, "expected its output to be a tensor, but got Opaque"),
        (Opaque(X), "tensor", ValueError, "has no 'tensor'; it is Opaque"),
        ("text", None, TypeError, "but got str"),
        (None, None, TypeError, "but got NoneType"),
        (X.long(), None, TypeError, r"floating-point output, but got int64 \(4, 6\)"),
        (X * 1j, None, TypeError, "but got complex64"),
        (X > 0, None, TypeError, "but got bool"),
    ],
)
def test_select_errors(output: Any, select: str | int | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        select_tensor(output, select, "layer")


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


@pytest.mark.parametrize("case", READINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_reading_never_waits_for_the_device(case: str, masked: bool) -> None:
    shape, arguments = READINGS[case]
    x = torch.randn(shape)
    mask = torch.ones(shape[:2]) if masked and len(shape) == 3 else None
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
