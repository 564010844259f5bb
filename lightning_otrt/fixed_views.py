"""Random augmentations that repeat: a few fixed views of each sample of a data set."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lightning_otrt.checks import check_count, check_seed
from lightning_otrt.random_numbers import random_numbers_restored

__all__ = ["FixedViews"]

#: Items that are made twice. Of one, a flip by another generator would look the same in half of the cases.
_COMPARED = 8


class FixedViews(Dataset[Any]):
    """A data set whose random augmentations repeat: ``views`` fixed versions of each item.

    Random augmentation makes a new image each time, so a teacher's output for it can never be reused. Here the
    generators of torch, NumPy and Python are seeded by item and view while the data set makes the item, and restored
    afterwards. So a view is the same in every epoch, worker process and run, and the rest of the program draws what it
    would have drawn. Which of its views an item shows is drawn anew each time, from torch's generator, which data
    loaders seed for each worker and epoch: in epoch ``e``, counted from 0, a share of ``1 - (1 - 1 / views) ** e`` of
    the items has been seen before.

    It works with any sampler, any number of workers, persistent or not, and transforms of torchvision, v1 and v2. Only
    the global generators of the CPU are seeded. A transform with a generator of its own (Albumentations 2) gives views
    that do not repeat. So the first eight items are made twice, and it is an error if the two differ. (With
    workers the first one makes eight, each other one a single item; without ``persistent_workers`` in each epoch.)

    Args:
        dataset: A map-style data set with random augmentation.
        views: Versions of each item. With few, outputs of the teacher are soon reused; many are closer to endless
            augmentation: on letters with ten labels a class, 8 views cost 2.2 ± 1.6 points of accuracy and 32 views 0.3
            ± 1.0 (``benchmarks/results/fixed_views.md``); no augmentation at all cost 9.4 ± 3.6.
        seed: Other seeds have other views.

    Raises:
        TypeError: If the data set is iterable, so that its items have no index, or ``views`` or the seed is no integer.
        ValueError: If ``views`` is below 1.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, Dataset
        >>> from lightning_otrt import FixedViews
        >>> class Noise(Dataset):
        ...     def __len__(self):
        ...         return 2
        ...     def __getitem__(self, index):
        ...         return index + torch.rand(()).item()
        >>> loader = DataLoader(FixedViews(Noise(), views=3), batch_size=2)
        >>> seen = {item.item() for epoch in range(100) for batch in loader for item in batch}
        >>> len(seen)
        6
    """

    def __init__(self, dataset: Any, views: int = 8, seed: int = 0) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"Expected argument `dataset` to be map-style, with `__getitem__`, but got {type(dataset).__name__}. "
                "A view belongs to an index, and the items of an iterable have none."
            )
        check_count("views", views)
        check_seed("seed", seed)
        self.dataset, self.views, self.seed = dataset, views, seed
        self._compared = 0

    def __len__(self) -> int:
        """The number of items: that of the data set."""
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """An item in one of its views.

        Raises:
            TypeError: If the index is that of several items.
            RuntimeError: If a view of one of the first items does not repeat.
        """
        key = _as_key(index)
        view = int(torch.randint(self.views, ()))
        item = self._make(index, key, view)
        worker = get_worker_info()
        if self._compared < (_COMPARED if worker is None or worker.id == 0 else 1):
            self._compared += 1
            if not _same(item, self._make(index, key, view)):
                raise RuntimeError(
                    f"The data set {type(self.dataset).__name__} made two different items for view {view} of index "
                    f"{key!r}, so that its views do not repeat. It draws from a generator that is neither torch's, "
                    "NumPy's nor Python's global one, as Albumentations 2 does, or on a device. Use transforms that "
                    "draw from a global generator of the CPU, or leave out FixedViews."
                )
        return item

    def _make(self, index: Any, key: Any, view: int) -> Any:
        digest = hashlib.blake2b(f"{self.seed} {key!r} {view}".encode(), digest_size=32).digest()
        with _seeded(digest):
            return self.dataset[index]

    def __repr__(self) -> str:
        return f"FixedViews({self.dataset!r}, views={self.views}, seed={self.seed})"


@contextmanager
def _seeded(digest: bytes) -> Iterator[None]:
    """Seed the global generators, each by a part of 32 random bytes, and put them back at the end."""
    # Not `torch.manual_seed`: it also seeds the generators of all devices, which would not be restored.
    with random_numbers_restored():
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
        np.random.seed(np.frombuffer(digest[8:16], dtype="<u4"))
        random.seed(digest[16:])
        yield


def _as_key(index: Any) -> Any:
    """An index whose `repr` is the same in every process, and for every type of integer and of string."""
    try:
        return operator.index(index)
    except TypeError:
        pass
    if isinstance(index, str):
        return str(index)
    if isinstance(index, tuple):
        return tuple(map(_as_part, index))
    raise TypeError(
        f"Expected the index of one item, an integer, a string or a tuple of these, but got {type(index).__name__}. "
        "For whole batches wrap the data set of single items, and let the data loader collate them."
    )


def _as_part(part: Any) -> Any:
    """A part of an index, which may also be a number such as the time in a film."""
    if isinstance(part, float):
        return float(part)
    try:
        return _as_key(part)
    except TypeError:
        return part


def _same(a: Any, b: Any) -> bool:
    """Whether two items agree. Values of unknown types count as equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a.layout != torch.strided or a.is_nested:
            return True
        return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.tobytes() == b.tobytes() if a.dtype != object else True
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if is_dataclass(a) and not isinstance(a, type):
        return all(_same(getattr(a, field.name, None), getattr(b, field.name, None)) for field in fields(a))
    if isinstance(a, (bool, int, float, complex, str, bytes)):
        return a == b or a != a
    # Images of PIL have it. Other types cannot be compared.
    return bool(a.tobytes() == b.tobytes()) if hasattr(a, "tobytes") else True
