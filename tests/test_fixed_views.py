"""Views of items repeat over epochs, workers and processes, and nothing else notices."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import make_trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

from lightning_otrt import FixedViews

#: By name: a transform of an image (3, 8, 8), each of which draws in its own way.
TRANSFORMS: dict[str, Callable[[Any], Tensor]] = {
    "v1": v1.Compose([v1.RandomResizedCrop(8, antialias=True), v1.RandomHorizontalFlip(), v1.ColorJitter(0.5, 0.5)]),
    "v1, Python's generator": v1.RandomOrder([v1.RandomErasing(1.0), partial(torch.roll, shifts=1, dims=2)]),
    "v2": v2.Compose([v2.RandomResizedCrop(8, antialias=True), v2.RandomHorizontalFlip(), v2.GaussianNoise(sigma=0.1)]),
    "v2, many": v2.Compose([v2.RandAugment(), v2.RandomRotation(90), v2.RandomPerspective(p=1.0)]),
    "torch": lambda image: image + torch.rand(()),
    "NumPy": lambda image: image + np.random.rand(),
    "Python": lambda image: image + random.random(),
}


class Pictures(Dataset[tuple[Tensor, int]]):
    def __init__(self, transform: Any = None, count: int = 10) -> None:
        self.images = torch.randint(
            256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        self.transform = transform or TRANSFORMS["v2"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        is_float = not isinstance(self.transform, v2.Compose) or not isinstance(
            self.transform.transforms[0], v2.RandAugment
        )
        return self.transform(image / 255 if is_float else image).float(), int(index)


class Draws(Dataset[float]):
    """A number from each generator, which tell views apart exactly."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, torch.rand((), dtype=torch.float64).item(), float(np.random.rand()), random.random()


def views_of(loader: DataLoader[Any], epochs: int) -> dict[int, set[bytes]]:
    seen: dict[int, set[bytes]] = {}
    for _ in range(epochs):
        for images, indices in loader:
            for image, index in zip(images, indices.tolist(), strict=True):
                seen.setdefault(index, set()).add(image.numpy().tobytes())
    return seen


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_each_item_has_its_views(transform: str) -> None:
    seen = views_of(DataLoader(FixedViews(Pictures(TRANSFORMS[transform], count=5), 3), 4, shuffle=True), 30)
    assert [len(seen[index]) for index in range(5)] == [3] * 5
    endless = views_of(DataLoader(Pictures(TRANSFORMS[transform], count=5), 4), 10)
    assert all(len(images) > 3 for images in endless.values())


@pytest.mark.parametrize(
    ("transform", "persistent"), [("v1, Python's generator", False), ("v2", False), ("v2", True), ("NumPy", False)]
)
def test_the_same_views_in_worker_processes(transform: str, persistent: bool) -> None:
    views = FixedViews(Pictures(TRANSFORMS[transform]), 2)
    alone = views_of(DataLoader(views, 4), 20)
    # Forked: lambdas cannot be sent, and the point here is the generators.
    options: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": persistent}
    seen = views_of(DataLoader(views, 4, shuffle=True, **options), 4)
    assert all(seen[index] <= alone[index] for index in range(10))
    # Workers do not all draw the same, nor each epoch again.
    assert sum(map(len, seen.values())) > 15


@pytest.mark.slow
def test_the_same_views_in_spawned_workers() -> None:
    views = FixedViews(Draws(), 2)
    alone = {views[index] for _ in range(60) for index in range(5)}
    loader = DataLoader(views, None, num_workers=1, multiprocessing_context="forkserver")
    assert set(map(tuple, loader)) <= alone


def test_epochs_draw_among_the_views() -> None:
    """In epoch e a share of 1 - (1 - 1/views)^e was seen before."""
    views, seen, before = FixedViews(Pictures(TRANSFORMS["torch"], count=500), 4), set(), []
    for _ in range(4):
        epoch = {(index, image.numpy().tobytes()) for image, index in (views[i] for i in range(500))}
        before.append(len(epoch & seen) / 500)
        seen |= epoch
    assert before == pytest.approx([1 - 0.75**epoch for epoch in range(4)], abs=0.07)


def test_views_differ_from_item_to_item_and_generator_to_generator() -> None:
    views = FixedViews(Draws(), 3)
    drawn = {views[index] for _ in range(100) for index in range(5)}
    assert len(drawn) == 15
    assert len({number for item in drawn for number in item[1:]}) == 45


def test_seeds() -> None:
    def drawn(seed: int) -> set[Any]:
        views = FixedViews(Draws(), 3, seed)
        return {views[index] for _ in range(100) for index in range(5)}

    assert drawn(0) == drawn(0)
    assert not drawn(0) & drawn(1)
    assert not drawn(0) & drawn(-1)


def test_more_views_keep_the_first_ones() -> None:
    few = {FixedViews(Draws(), 1)[index] for index in range(5)}
    views = FixedViews(Draws(), 4)
    assert few <= {views[index] for _ in range(200) for index in range(5)}


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_generators_are_put_back() -> None:
    views = FixedViews(Draws())
    views[0]
    torch.manual_seed(0)
    torch.randint(8, ())
    expected = states()
    torch.manual_seed(0)
    views[1]
    assert states() == expected


def test_generators_are_put_back_after_an_error() -> None:
    class Broken(Draws):
        def __getitem__(self, index: int) -> Any:
            torch.rand(5), np.random.rand(5), random.random()
            raise KeyError(index)

    torch.manual_seed(0)
    torch.randint(8, ())
    expected = states()
    torch.manual_seed(0)
    with pytest.raises(KeyError):
        FixedViews(Broken())[2]
    assert states() == expected


@pytest.mark.parametrize("index", [2, np.int64(2), torch.tensor(2), True + 1])
def test_all_integers_are_one(index: Any) -> None:
    views = FixedViews(Draws(), 1)
    assert views[index][1:] == views[2][1:]


def test_integers_and_strings_of_numpy_in_a_tuple() -> None:
    class Pairs(Draws):
        def __getitem__(self, index: Any) -> Any:
            return random.random()

    views = FixedViews(Pairs(), 1)
    assert views[np.int64(3), np.str_("a")] == views[3, "a"]
    assert views["film", np.float64(1.5)] == views["film", 1.5] != views["film", None]


def test_other_indices() -> None:
    class ByName(dict[Any, Any]):
        def __getitem__(self, key: Any) -> Any:
            return key, random.random()

    views = FixedViews(ByName(a=1), 2)
    assert len(views) == 1
    assert len({views[key] for key in ("a", "b", ("a", 1)) for _ in range(30)}) == 6
    for several in ([0, 1], slice(2), torch.tensor([0, 1]), np.array([0, 1]), None, 1.0):
        with pytest.raises(TypeError, match="Expected the index of one item"):
            views[several]


def test_inside_and_around_other_data_sets() -> None:
    inside = FixedViews(Subset(Draws(), [3, 4]), 2)
    around = Subset(FixedViews(Draws(), 2), [3, 4])
    for dataset in (inside, around):
        assert {dataset[0][0], dataset[1][0]} == {3, 4}
        assert len({dataset[index] for _ in range(40) for index in range(2)}) == 4


class Own(Dataset[Tensor]):
    """Draws from a generator of its own, in the nesting that is asked for."""

    def __init__(self, nest: Callable[[Tensor], Any]) -> None:
        self.generator, self.nest = torch.Generator().manual_seed(0), nest

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return self.nest(torch.rand(2, generator=self.generator))


@dataclass
class Item:
    image: Any
    label: int = 0


NESTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "number": lambda x: x[0].item(),
    "tuple": lambda x: (1, x),
    "dictionary": lambda x: {"a": "b", "x": [x]},
    "dataclass": lambda x: Item(x),
    "string": str,
    "picture": lambda x: Image.fromarray((255 * x[None].numpy()).astype(np.uint8)),
}


@pytest.mark.parametrize("nest", NESTS)
def test_generators_of_their_own_are_noticed(nest: str) -> None:
    views = FixedViews(Own(NESTS[nest]))
    with pytest.raises(RuntimeError, match=r"Own made two different items for view \d of index 1"):
        views[1]


def test_a_flip_by_another_generator_is_noticed_within_a_few_items() -> None:
    """Of one item it would look the same in half of the cases."""
    views = FixedViews(Own(lambda x: bool(x[0] < 0.5)))
    with pytest.raises(RuntimeError, match="Own made two different items"):
        list(map(views.__getitem__, [0, 1, 2] * 3))


@pytest.mark.parametrize("nest", NESTS)
def test_what_repeats_is_not_taken_for_it(nest: str) -> None:
    class Fixed(Own):
        def __getitem__(self, index: int) -> Any:
            return self.nest(torch.tensor([torch.nan, 1.0]) if nest != "picture" else torch.ones(2))

    assert FixedViews(Fixed(NESTS[nest]))[1] is not None


@dataclass
class Unset:
    """A field is not set by its constructor."""

    x: int
    y: int = field(init=False)


ODD = [object(), None, np.array([None, object()]), {1, 2}, torch.eye(3).to_sparse()]
ODD += [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), Unset(1), Unset]


@pytest.mark.parametrize("item", ODD)
def test_items_that_cannot_be_compared(item: Any) -> None:
    class Odd(Own):
        def __getitem__(self, index: int) -> Any:
            return item

    assert FixedViews(Odd(NESTS["tensor"]))[0] is item


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize("dataset", [Stream(), object(), iter([1])])
def test_data_without_an_index(dataset: Any) -> None:
    with pytest.raises(TypeError, match="map-style"):
        FixedViews(dataset)


@pytest.mark.parametrize(
    ("views", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("8", TypeError)]
)
def test_bad_views(views: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`views`"):
        FixedViews(Draws(), views)


@pytest.mark.parametrize("seed", [1.0, "a", None, True])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(TypeError, match="`seed`"):
        FixedViews(Draws(), 2, seed)


def test_repr() -> None:
    assert repr(FixedViews([1, 2], 3)) == "FixedViews([1, 2], views=3, seed=0)"


class Watching(pl.LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3 * 8 * 8, 2)
        self.seen: list[set[tuple[int, bytes]]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append(set())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, indices = batch
        self.seen[-1] |= {
            (index, image.numpy().tobytes()) for image, index in zip(images, indices.tolist(), strict=True)
        }
        return self.net(images.flatten(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-9)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*persistent_workers=True")
def test_under_a_trainer(workers: int) -> None:
    """Lightning seeds workers anew and sets samplers of its own."""
    dataset = FixedViews(Pictures(count=20), 2)
    options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    task = Watching()
    make_trainer(max_epochs=8, limit_train_batches=1.0).fit(
        task, DataLoader(dataset, 5, sampler=RandomSampler(dataset), **options)
    )
    assert [len(epoch) for epoch in task.seen] == [20] * 8
    assert len(set().union(*task.seen)) in range(37, 41)
    assert task.seen[0] != task.seen[1]


def test_under_distributed_samplers() -> None:
    """A Trainer puts the sampler in; the shares of two processes are views of the same items."""
    dataset = FixedViews(Draws(), 2)
    alone = {dataset[index] for _ in range(60) for index in range(5)}
    for rank in range(2):
        sampler = torch.utils.data.DistributedSampler(dataset, 2, rank)
        assert set(map(tuple, DataLoader(dataset, None, sampler=sampler))) <= alone
