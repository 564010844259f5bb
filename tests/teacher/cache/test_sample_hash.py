"""Keys of samples: alike for equal bytes, whatever the batch and process, and different for everything else."""

from __future__ import annotations

import copy
import hashlib
import pickle
import subprocess
import sys
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from old_versions import needs_fake_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_otrt.teacher.cache import sample_hash
from lightning_otrt.teacher.cache.sample_hash import BLOCK, LANES, SampleHash
from lightning_otrt.teacher.cache.samples import batch_size_of, select_samples

#: Of one fixed batch: a folder of one version is read by the next.
RECORDED = [[-5667812713299326281, 7810887593786425743], [-5922775890881981844, -1553077633729673516]]


def keys(*args: Any, **kwargs: Any) -> Tensor:
    return SampleHash()((args, kwargs))


def distinct(*of: Tensor) -> int:
    return len(torch.unique(torch.cat(of), dim=0))


def halves(of: Tensor) -> Tensor:
    """The 32-bit words of keys."""
    return of.contiguous().view(torch.int32)


def python_key(row: bytes, structure: str) -> list[int]:
    """The definition, in integers of Python, for one block of words."""
    words = np.frombuffer(row + b"\0" * (-len(row) % 4), "<i4").tolist()
    table = np.frombuffer(
        hashlib.shake_256(b"lightning_otrt sample hash 1 values 0").digest(LANES * (BLOCK + 1) * 8), "<i8"
    ).reshape(LANES, BLOCK + 1)
    lanes = []
    for lane in table.tolist():
        total = lane[0] + sum(key * word for key, word in zip(lane[1:], words, strict=False))
        lanes.append((total % 2**64) >> 32)
    common = hashlib.blake2b(structure.encode(), digest_size=16).digest()
    found = []
    for i, (upper, lower) in enumerate((lanes[:2], lanes[2:])):
        number = (upper << 32 | lower) ^ int.from_bytes(common[8 * i : 8 * i + 8], "little")
        found.append(number - 2**64 if number >= 2**63 else number)
    return found


def test_is_the_multilinear_hash() -> None:
    x = torch.randn(3, 5, 7)
    structure = "\n".join(
        [
            "version 1",
            "inputs:tuple=2",
            "inputs:tuple[0]:tuple=1",
            "inputs:tuple[0]:tuple[0]:Tensor=torch.float32(5, 7)",
            "inputs:tuple[1]:dict=0",
        ]
    )
    assert keys(x).tolist() == [python_key(row.numpy().tobytes(), structure) for row in x]


@pytest.mark.parametrize("width", [1, 7, BLOCK])
def test_floats_and_integers_give_the_same_sums(width: int) -> None:
    """The first is the way of a CPU, the second that of other devices; also where words and keys are the largest."""
    extremes = torch.tensor([-(2**31), 2**31 - 1, -1, 0, 0xFFFF, -0x10000]).int()[:, None].expand(-1, width)
    words = torch.cat([extremes, torch.randint(-(2**31), 2**31, (5, width)).int()])
    table = torch.from_numpy(sample_hash._keys("values 0")[:, 1 : width + 1].copy())
    for keys in (table, *(torch.full_like(table, key) for key in (-1, -(2**63), 2**63 - 1))):
        limbs = SampleHash()._limbs_of("", keys)
        parts = words.split(4)
        assert torch.equal(sample_hash._sums_in_floats(parts, limbs), sample_hash._sums_in_integers(parts, keys))


def test_a_default_device_is_not_that_of_the_samples() -> None:
    x = torch.rand(2, 3000)
    expected = keys(x)
    with torch.device("meta"):
        assert torch.equal(keys(x), expected)


def test_other_lengths_make_no_other_tables() -> None:
    """Texts that are padded to the longest of a batch have another length in each."""
    hash_samples = SampleHash()
    hash_samples(((torch.rand(2, 3000),), {}))
    tables = len(hash_samples._tables)
    for length in range(10, 2000, 100):
        hash_samples(((torch.rand(2, length),), {}))
    assert len(hash_samples._tables) == tables


def test_keys_are_those_of_earlier_versions() -> None:
    assert keys(torch.arange(2 * 3 * 50 * 50).view(2, 3, 50, 50).double()).tolist() == RECORDED


@pytest.mark.slow
def test_same_in_another_process() -> None:
    code = (
        "import torch; from lightning_otrt.teacher.cache.sample_hash import SampleHash;"
        "x = torch.arange(2 * 3 * 50 * 50).view(2, 3, 50, 50).double(); print(SampleHash()(((x,), {})).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(RECORDED)


@pytest.mark.parametrize("shape", [(1,), (3, 32, 32), (3, 97, 89), (8192 * BLOCK // 1024,), (3, 224, 224)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float16, torch.int64])
def test_batch_does_not_matter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (100 * torch.rand(5, *shape)).to(dtype)
    whole = keys(x)
    assert torch.equal(torch.cat([keys(x[i : i + 1]) for i in range(5)]), whole)
    order = torch.randperm(5)
    assert torch.equal(keys(x[order]), whole[order])
    assert distinct(whole) == len(torch.unique(x.flatten(1), dim=0))


@pytest.mark.parametrize("words_at_once", [1, 1000])
def test_parts_do_not_matter(words_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 3, 50, 50)
    whole = keys(x)
    monkeypatch.setattr(sample_hash, "_WORDS_AT_ONCE", {"cpu": words_at_once})
    assert torch.equal(keys(x), whole)


def test_layout_in_memory_does_not_matter() -> None:
    x = torch.randn(4, 3, 16, 16)
    expected = keys(x)
    assert torch.equal(keys(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(keys(torch.cat([x, x])[::2]), torch.cat([expected, expected])[::2])
    grown = torch.zeros(4, 3, 16, 20)
    grown[..., 3:19] = x
    assert torch.equal(keys(grown[..., 3:19]), expected)
    assert torch.equal(keys(x.clone().requires_grad_()), expected)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.bfloat16])
def test_small_types_from_the_middle_of_a_storage(start: int, dtype: torch.dtype) -> None:
    storage = torch.randint(0, 2, (100,)).to(dtype)
    rows = storage[start : start + 96].view(12, 8)
    assert torch.equal(keys(rows), keys(rows.clone()))


def test_conjugate_views() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64)
    assert torch.equal(keys(x.conj()), keys(x.conj().resolve_conj()))
    assert torch.equal(keys(x.conj().imag), keys(x.conj().imag.resolve_neg()))
    assert distinct(keys(x), keys(x.conj())) == 6


def test_types_and_shapes_count() -> None:
    zeros = [
        torch.zeros(1, *shape) for shape in ((1,), (2,), (3,), (4,), (2, 2), (4, 1), (1, 4), (4096,), (4097,), (0,))
    ]
    others = [torch.zeros(1, 4, dtype=dtype) for dtype in (torch.int32, torch.float64, torch.bool, torch.uint8)]
    assert distinct(*map(keys, zeros + others)) == len(zeros + others)
    assert distinct(keys(torch.zeros(1)), keys(torch.zeros(1, 1))) == 2


def test_signs_of_zeros_and_payloads_of_nans_count() -> None:
    bits = [0, -(2**31), 0x7FC00000, 0x7FC00001, -0x400000, 0x7F800001]
    floats = torch.tensor(bits, dtype=torch.int32).view(torch.float32)[:, None]
    assert distinct(keys(floats)) == len(bits)
    assert torch.equal(keys(floats), keys(floats.clone()))


def test_zeros_at_the_end_count() -> None:
    x = torch.zeros(1, 5000, dtype=torch.uint8)
    x[0, :3] = 7
    assert distinct(*(keys(x[:, :count]) for count in range(1, 5000, 7))) == len(range(1, 5000, 7))


@pytest.mark.parametrize("width", [1, 7, 64, 3 * 32 * 32, 3 * 64 * 64])
def test_every_flipped_bit_counts(width: int) -> None:
    x = torch.randn(width)
    count = min(32 * width, 6000)
    bits = torch.randperm(32 * width)[:count]
    flipped = x.view(torch.int32).repeat(count, 1)
    rows = torch.arange(count)
    flipped[rows, bits // 32] ^= (1 << (bits % 32)).to(torch.int32)
    assert distinct(keys(flipped.view(torch.float32)), keys(x[None])) == count + 1


def test_pairs_of_flipped_signs_count() -> None:
    """A multilinear hash that kept the lower bits would not see two flips of the highest bit."""
    x = torch.randn(200)
    first, second = torch.triu_indices(200, 200, 1)
    rows = torch.arange(len(first))
    flipped = x.repeat(len(first), 1)
    flipped[rows, first] *= -1
    flipped[rows, second] *= -1
    assert distinct(keys(flipped), keys(x[None])) == len(first) + 1


def test_order_of_pixels_counts() -> None:
    image = torch.randn(3, 32, 32)
    moved = [image.roll((i, j), (1, 2)) for i in range(32) for j in range(32)]
    turned = [image.rot90(k, (1, 2)) for k in (1, 2, 3)] + [image.flip(1), image.flip(2), image.flip(0)]
    swapped = []
    for _ in range(1000):
        i, j = torch.randperm(3072)[:2]
        one = image.flatten().clone()
        one[i], one[j] = one[j].clone(), one[i].clone()
        swapped.append(one.view_as(image))
    assert distinct(keys(torch.stack(moved + turned + swapped))) == 1024 + 6 + 1000


def test_nearly_equal_samples() -> None:
    """10⁵ black images with two white pixels each, and as many steps of one brightness."""
    first, second = torch.triu_indices(450, 450, 1)[:, :100_000]
    images = torch.zeros(100_000, 450)
    rows = torch.arange(100_000)
    images[rows, first], images[rows, second] = 1.0, 1.0
    steps = torch.arange(100_000, dtype=torch.int32).view(torch.float32)[:, None] + torch.zeros(1, 450)
    found = torch.cat([keys(images), keys(steps)])
    assert distinct(found) == 200_000
    # No half of 64 bits collides either, and each word of 32 bits as often as chance has it: 4.7 times in 2·10⁵.
    assert [len(found[:, i].unique()) for i in range(2)] == [200_000] * 2
    collisions = [200_000 - len(halves(found)[:, i].unique()) for i in range(4)]
    assert max(collisions) <= 20


@pytest.mark.parametrize("width", [2, 100, 3000, 9000])
def test_avalanche(width: int) -> None:
    """A flipped bit of the input flips each bit of the key in half of the cases."""
    count = 4000
    base = torch.randint(-(2**31), 2**31 - 1, (count, width), dtype=torch.int32)
    flipped = base.clone()
    where = torch.randint(width, (count,))
    flipped[torch.arange(count), where] ^= (1 << torch.randint(32, (count,))).to(torch.int32)
    change = halves(keys(base)) ^ halves(keys(flipped))
    share = torch.stack([(change >> bit & 1).double().mean(0) for bit in range(32)])
    # The standard deviation of a share is 0.008, but larger for two words, in which the same 64 flips come again.
    assert abs(share.mean() - 0.5) < (0.01 if width > 2 else 0.04)
    assert (share - 0.5).abs().max() < (0.04 if width > 2 else 0.2)


def test_bits_are_uniform() -> None:
    found = halves(keys(torch.eye(4096)))
    share = torch.stack([(found >> bit & 1).double().mean(0) for bit in range(32)])
    assert (share - 0.5).abs().max() < 0.04
    together = ((found[:, 0, None] ^ found[:, 1:]) >> torch.arange(32)[:, None, None] & 1).double().mean(1)
    assert (together - 0.5).abs().max() < 0.04


Point = namedtuple("Point", "x y")


@dataclass
class Parts:
    image: Tensor
    scale: float


NESTINGS: dict[str, Any] = {
    "one": lambda call, x, y: call(x),
    "two": lambda call, x, y: call(x, y),
    "turned": lambda call, x, y: call(y, x),
    "twice": lambda call, x, y: call(x, x),
    "keyword": lambda call, x, y: call(x, other=y),
    "another keyword": lambda call, x, y: call(x, another=y),
    "list": lambda call, x, y: call([x, y]),
    "tuple": lambda call, x, y: call((x, y)),
    "named tuple": lambda call, x, y: call(Point(x, y)),
    "nested": lambda call, x, y: call({"a": [x, {"b": (y,)}]}),
    "mapping": lambda call, x, y: call(UserDict(a=x, b=y)),
    "dataclass": lambda call, x, y: call(Parts(x, 1.0)),
    "number in dataclass": lambda call, x, y: call(Parts(x, 2.0)),
    "flag": lambda call, x, y: call(x, flag=True),
    "other flag": lambda call, x, y: call(x, flag=False),
    "none": lambda call, x, y: call(x, flag=None),
    "one as number": lambda call, x, y: call(x, flag=1),
    "string": lambda call, x, y: call(x, flag="True"),
    "type": lambda call, x, y: call(x, flag=torch.float32),
    "common": lambda call, x, y: call(x, y[:2]),
    "other common": lambda call, x, y: call(x, y[1:3]),
    "scalar": lambda call, x, y: call(x, torch.tensor(0.0)),
    "other scalar": lambda call, x, y: call(x, torch.tensor(-0.0)),
}


def test_nesting_and_plain_values_count() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 5)
    found = [nesting(keys, x, y) for nesting in NESTINGS.values()]
    assert distinct(*found) == 4 * len(NESTINGS)


@pytest.mark.parametrize("name", NESTINGS)
def test_nested_inputs_of_parts_of_a_batch(name: str) -> None:
    """Samples that are selected have the keys that they had."""
    x, y = torch.randn(4, 3), torch.randn(4, 5)
    index = torch.tensor([2, 0, 3])
    inputs = NESTINGS[name](lambda *args, **kwargs: (args, kwargs), x, y)
    selected = select_samples(inputs, index, 4)
    assert torch.equal(SampleHash()(selected, 3), SampleHash()(inputs)[index])


@needs_fake_cuda
def test_samples_of_inputs_on_two_devices() -> None:
    """Lengths may stay on the CPU. Fake tensors check devices as a GPU does."""
    with FakeTensorMode():
        ids, lengths = torch.zeros(4, 3, device="cuda"), torch.zeros(4, dtype=torch.long)
        for index in (torch.tensor([2, 0]), torch.tensor([2, 0], device="cuda")):
            (words, counts), _ = select_samples(((ids, lengths), {}), index, 4)
            assert (words.device.type, words.shape) == ("cuda", (2, 3))
            assert (counts.device.type, counts.shape) == ("cpu", (2,))


def test_many_tensors() -> None:
    tensors = [torch.randn(2, 3) for _ in range(BLOCK)]
    turned = tensors[::-1]
    assert distinct(keys(*tensors), keys(*turned), keys(tensors)) == 6


def test_an_axis_of_samples_is_needed() -> None:
    with pytest.raises(ValueError, match="no tensor with an axis of samples"):
        keys(torch.tensor(1.0), 3)
    with pytest.raises(ValueError, match="has 7 samples"):
        SampleHash()(((torch.zeros(3),), {}), 7)
    assert batch_size_of(((torch.tensor(1.0), {"a": torch.zeros(5, 2)}), {})) == 5


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), r"inputs\[0\]\[1\] is of type object"),
        ({"a": np.zeros(3)}, r"inputs\[0\]\[1\]\['a'\] is of type ndarray"),
        (torch.zeros(3).to_sparse(), "layout torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "layout torch.jagged"),
        ({1, 2}, "of type set"),
    ],
)
def test_what_cannot_be_read_is_refused(value: Any, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        keys(torch.zeros(3, 2), value)


def test_empty_batch() -> None:
    assert keys(torch.zeros(0, 3, 4)).shape == (0, 2)


def test_copies_and_pickles() -> None:
    first = SampleHash()
    inputs: Any = ((torch.randn(3, 4),), OrderedDict())
    expected = first(inputs)
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert not other._tables
        assert torch.equal(other(inputs), expected)


def test_autograd_and_inference_mode() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    found = keys(x, 2 * x)
    assert not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(keys(x, 2 * x), found)


@needs_fake_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
def test_does_not_wait_for_a_device(dtype: torch.dtype) -> None:
    """Fake tensors on a GPU raise where a value is read."""
    with FakeTensorMode():
        images = torch.zeros(4, 3, 65, 65, device="cuda").to(dtype)
        mask = torch.ones(4, 9, dtype=torch.bool, device="cuda")
        found = SampleHash()(((images, {"mask": mask, "scale": 2}), {"table": torch.zeros(7, device="cuda")}))
    assert (found.shape, found.dtype, found.device.type) == ((4, 2), torch.int64, "cuda")


@needs_fake_cuda
@pytest.mark.parametrize("order", [1, -1])
def test_tensors_of_two_devices_are_joined_on_the_gpu(order: int) -> None:
    """A copy to the host that nobody waits for may not be complete when it is read."""
    with FakeTensorMode():
        tensors = [torch.zeros(4, dtype=torch.int64), torch.zeros(4, 3, device="cuda")][::order]
        assert SampleHash()((tuple(tensors), {})).device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_same_on_a_gpu(dtype: torch.dtype) -> None:
    x = (100 * torch.rand(16, 3, 65, 65)).to(dtype)
    assert torch.equal(keys(x.cuda(), x[:, 0].cuda()).cpu(), keys(x, x[:, 0]))


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    """Hashing 64 MiB takes less than 16 MiB more."""
    code = (
        "import resource, torch; from lightning_otrt.teacher.cache.sample_hash import SampleHash;"
        "h = SampleHash(); x = torch.zeros(64, 2**18); h(((x[:1],), {}));"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; h(((x,), {}));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 16 * 1024
