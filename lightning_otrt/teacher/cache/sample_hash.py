r"""A 128-bit hash of the bytes of each sample of a batch, computed where the tensors are.

Multilinear hashing (Lemire and Kaser, "Strongly universal string hashing is fast", arXiv 1202.4961): for words
:math:`s_i` of 32 bits and random keys :math:`k_i` of 64 bits, the upper 32 bits of

.. math:: k_0 + \sum_i k_i s_i \mod 2^{64}

agree for two different strings of one length with a probability of :math:`2^{-32}`, whatever the strings are:
differences in sign bits alone, swapped or repeated words are no special cases. Four sums with keys of their own make
128 bits. They are integers that wrap around, so that neither order nor device nor the size of the batch changes them.

Long samples are cut into blocks, whose hashes are hashed again, with other keys: a tree with a handful of levels, each
of which adds :math:`2^{-128}` to the probability that two samples get one key. Among :math:`10^9` samples that is about
:math:`10^{-20}`. The keys are fixed, so that this does not hold for samples that somebody made to collide.

On a CPU the same integers come from products of floating point, which take less time: words in halves of 16 bits times
keys in limbs of 22 bits, whose sums stay below :math:`2^{51}`, and so are exact in float64 in any order.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_otrt.reading.traced.arguments import Inputs
from lightning_otrt.teacher.cache.samples import batch_size_of, is_per_sample, leaves, shown_path

__all__ = ["SampleHash", "check_dense"]

#: Changed with every change of the hash: keys of another version are those of other samples.
VERSION = 1
#: Words of a block. Its keys, 64 KiB or 384 KiB in limbs, stay in the second-level cache.
BLOCK = 2048
#: Sums of 64 bits, the upper half of each of which is kept.
LANES = 4
#: Words that are worked on at once, so that temporary memory stays flat: 2 MiB, and 80 MiB on other devices.
_WORDS_AT_ONCE = {"cpu": 2**16}
_WORDS_AT_ONCE_ELSEWHERE = 2**21
_LOW = 2**32 - 1
#: Bits of a limb of a key, and of the lower half of a word. Three limbs hold 64 bits.
_LIMB, _HALF = 22, 16


class SampleHash:
    """Keys of samples: calling it gives ``(B, 2)`` int64 for the inputs of a network.

    All tensors whose first axis is the batch belong to the samples, by their bytes: shape, type, -0.0 and the payload
    of a NaN count; the memory format does not. Other tensors, plain values and the nesting of all are common to the
    samples of a batch and part of each key. The host waits for a device once, when the first call copies the random
    numbers to it.

    Example:
        >>> import torch
        >>> hash_samples = SampleHash()
        >>> images = torch.arange(12.0).view(3, 4)
        >>> keys = hash_samples(((images,), {}))
        >>> keys.shape, keys.dtype
        (torch.Size([3, 2]), torch.int64)
        >>> torch.equal(hash_samples(((images[1:],), {})), keys[1:])
        True
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    @torch.no_grad()
    def __call__(self, inputs: Inputs, batch_size: int | None = None) -> Tensor:
        """Hash each sample.

        Args:
            inputs: Positional and keyword arguments.
            batch_size: Samples of the batch; None: the size of the first axis of the first tensor.

        Returns:
            ``(B, 2)`` int64, on the device of the first tensor that is not on the CPU, if there is one.

        Raises:
            TypeError: If a value is no dense tensor and no plain value.
            ValueError: If no tensor has an axis of samples.
        """
        size = batch_size_of(inputs) if batch_size is None else batch_size
        structure: list[str] = [f"version {VERSION}"]
        digests: list[Tensor] = []
        has_samples = False
        # A tuple and a dictionary of its own: another Mapping type of keywords is no other input.
        for path, value in leaves((tuple(inputs[0]), dict(inputs[1]))):
            if not isinstance(value, Tensor):
                structure.append(f"{path}={value!r}")
                continue
            check_dense(value, path)
            own = is_per_sample(value, size)
            has_samples |= own
            shape = tuple(value.shape[1:] if own else value.shape)
            structure.append(f"{path}={value.dtype}{shape}{'' if own else ' common'}")
            digest = self._digest(_words(value if own else value[None]), "values")
            digests.append(digest if own else digest.expand(size, LANES))
        if not has_samples:
            raise ValueError(f"No tensor among the teacher's inputs has {size} samples along its first axis.")
        words = digests[0]
        if len(digests) > 1:
            # Never a copy to the host that nobody waits for.
            device = next((digest.device for digest in digests if digest.device.type != "cpu"), words.device)
            joined = torch.cat([digest.to(device, non_blocking=True) for digest in digests], dim=1)
            words = self._digest(joined, "tensors")
        common = hashlib.blake2b("\n".join(structure).encode(), digest_size=16).digest()
        upper, lower = (int.from_bytes(common[i : i + 8], "little", signed=True) for i in (0, 8))
        # A number that all samples share distinguishes structures, and travels as an argument of the kernel.
        return torch.stack([_join(words[:, 0], words[:, 1]) ^ upper, _join(words[:, 2], words[:, 3]) ^ lower], dim=1)

    def _digest(self, words: Tensor, stage: str) -> Tensor:
        """``(B, n)`` words of 32 bits to ``(B, LANES)``, with sign, in int64."""
        level = 0
        while True:
            blocks, width = _blocks(words.shape[1])
            words = self._hash_blocks(words, blocks, width, f"{stage} {level}")
            if blocks == 1:
                return words
            level += 1

    def _hash_blocks(self, words: Tensor, blocks: int, width: int, name: str) -> Tensor:
        missing = blocks * width - words.shape[1]
        if missing:
            # Zeros are safe: the shape, which is part of the structure, tells how many words there are.
            words = torch.nn.functional.pad(words, (0, missing))
        table = self._table(name, words.device)
        keys, start = table[:, 1 : width + 1], table[:, 0]
        limit = _WORDS_AT_ONCE.get(words.device.type, _WORDS_AT_ONCE_ELSEWHERE)
        parts = words.reshape(len(words) * blocks, width).split(max(1, limit // max(width, 1)))  # type: ignore[no-untyped-call]
        if words.device.type == "cpu":
            sums = _sums_in_floats(parts, self._limbs_of(name, table[:, 1:]))
        else:
            sums = _sums_in_integers(parts, keys)
        return (sums + start >> 32).view(len(words), blocks * LANES)

    def _limbs_of(self, name: str, keys: Tensor) -> Tensor:
        """Keys ``(LANES, n)`` in limbs ``(2, n, 3 * LANES)``, for the lower halves of words and for the upper ones."""
        name = f"limbs of {name}"
        if (name, keys.device) not in self._tables:
            both = torch.stack([keys, keys << _HALF])
            limbs = [both & (1 << _LIMB) - 1, both >> _LIMB & (1 << _LIMB) - 1, both >> 2 * _LIMB]
            self._tables[name, keys.device] = torch.cat(limbs, dim=1).double().mT.contiguous()
        return self._tables[name, keys.device]

    def _table(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._tables:
            self._tables[name, device] = torch.from_numpy(_keys(name).copy()).to(device)
        return self._tables[name, device]

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables, which are made again where they are needed."""
        return {"_tables": {}}

    def __deepcopy__(self, memo: Mapping[int, Any]) -> SampleHash:
        return SampleHash()


def _sums_in_integers(parts: Sequence[Tensor], keys: Tensor) -> Tensor:
    """Σ k s mod 2⁶⁴ ``(rows, LANES)`` of words ``(rows, width)`` in parts, and keys ``(LANES, width)``."""
    rows, width = parts[0].shape
    # Written into again and again: fresh memory of this size would cost as much as the sums.
    wide = torch.empty(rows, 1, width, dtype=torch.int64, device=keys.device)
    product = torch.empty(rows, LANES, width, dtype=torch.int64, device=keys.device)
    sums = []
    for part in parts:
        rows = len(part)
        torch.mul(wide[:rows].copy_(part[:, None]), keys, out=product[:rows])
        sums.append(product[:rows].sum(-1))
    return torch.cat(sums)


def _sums_in_floats(parts: Sequence[Tensor], limbs: Tensor) -> Tensor:
    """The same integers, of keys in limbs ``(2, width or more, 3 * LANES)``."""
    rows, width = parts[0].shape
    halves = torch.empty(2, rows, width, dtype=torch.float64, device=limbs.device)
    of_lower, of_upper = limbs[:, :width]
    sums = []
    for part in parts:
        lower, upper = halves[:, : len(part)]
        lower.copy_(part & (1 << _HALF) - 1)
        upper.copy_(part >> _HALF)
        sums.append((lower @ of_lower).addmm_(upper, of_upper))
    low, middle, high = torch.cat(sums).long().view(-1, 3, LANES).unbind(1)
    return low + (middle << _LIMB) + (high << 2 * _LIMB)


@functools.lru_cache(maxsize=16)
def _keys(name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Random numbers ``(LANES, BLOCK + 1)`` that never change, unlike those of a generator of torch."""
    stream = hashlib.shake_256(f"lightning_otrt sample hash {VERSION} {name}".encode())
    numbers = np.frombuffer(stream.digest(LANES * (BLOCK + 1) * 8), dtype="<i8")
    return numbers.astype(np.int64).reshape(LANES, BLOCK + 1)


def _blocks(words: int) -> tuple[int, int]:
    """How many blocks of which width, by the number of words alone; without a remainder where possible."""
    least = max(1, -(-words // BLOCK))
    for count in range(least, 2 * least):
        if words % count == 0:
            return count, words // count
    return least, -(-words // least)


def check_dense(tensor: Tensor, path: str) -> None:
    """Check that the bytes of a tensor can be read.

    Raises:
        TypeError: If it is sparse, nested, quantized or spread over processes.
    """
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"The teacher's input {shown_path(path)} is a tensor with layout {tensor.layout}, nested, quantized or "
            "distributed, but `teacher_cache` reads dense tensors. Convert it in `teacher_inputs`."
        )


def _words(tensor: Tensor) -> Tensor:
    """The bytes of each sample as words ``(B, n)`` of 32 bits; the last word is filled up with zeros."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten(1) if tensor.dim() > 1 else tensor[:, None]
    flat = flat.contiguous()
    if flat.element_size() >= 4:
        return flat.view(torch.int32)
    bytes_ = flat.view(torch.uint8)
    rest = -bytes_.shape[1] % 4
    if rest or bytes_.storage_offset() % 4:
        # Also where rows fit, but begin in the middle of a word: padding makes a copy, even by nothing.
        bytes_ = torch.nn.functional.pad(bytes_, (0, rest)) if rest else bytes_.clone()
    return bytes_.view(torch.int32)


def _join(upper: Tensor, lower: Tensor) -> Tensor:
    return (upper << 32) | (lower & _LOW)
