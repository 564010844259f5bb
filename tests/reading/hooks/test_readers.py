"""How a layer is read, from its trace: batch axis, prefix tokens and the grid of the others."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_otrt.layers.mask_sources import LayerMasks
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.hooks.readers import TracedRead, layer_reader, token_layout
from lightning_otrt.reading.neurons.reader import NeuronReader


def reader_of(*read: Any, **options: Any) -> NeuronReader:
    found = TracedRead(*read, **options)
    return layer_reader(found, token_layout(found, LayerMasks()), 4)


def tokens(count: int, patches: tuple[int, int] | None, declared: int = 0, batch_axis: int = 0) -> Trace:
    """A layer of so many tokens, after a patch embedding that gives a map of ``patches``."""
    shape = (2, count, 8) if batch_axis == 0 else (count, 2, 8)
    tensor = TracedTensor(shape, neuron_axis=2, batch_axis=batch_axis)
    layers = [TracedLayer("", order=2, calls=1), TracedLayer("layer", order=1, calls=1, input=tensor, output=tensor)]
    if patches is not None:
        layers.append(TracedLayer("patch", order=0, calls=1, output=TracedTensor((2, 8, *patches), neuron_axis=1)))
    return Trace(tuple(layers), batch_size=2, prefix_tokens=declared)


@pytest.mark.parametrize(
    ("count", "patches", "declared", "prefix", "grid"),
    [
        (16, (4, 4), 0, 0, (4, 4)),
        (17, (4, 4), 1, 1, (4, 4)),
        (16, (4, 4), 1, 0, (4, 4)),
        (8, (2, 4), 0, 0, (2, 4)),
        (21, (4, 4), 5, 5, (4, 4)),
        (18, (4, 4), 1, 1, None),
        (1, (1, 1), 1, 0, (1, 1)),
        # A square number of tokens is no grid without a map of patches.
        (16, None, 0, 0, None),
        (17, None, 1, 0, None),
    ],
)
@pytest.mark.parametrize("batch_axis", [0, 1])
def test_tokens_of_patches(
    count: int,
    patches: tuple[int, int] | None,
    declared: int,
    prefix: int,
    grid: tuple[int, int] | None,
    batch_axis: int,
) -> None:
    reader = reader_of("student", tokens(count, patches, declared, batch_axis), "layer", 2)
    assert (reader.prefix_tokens, reader.token_grid, reader.batch_axis) == (prefix, grid, batch_axis)
    assert (reader.neuron_axis, reader.grid, reader.layer) == (2, 4, "student layer 'layer'")


@pytest.mark.parametrize("declared", [0, 1])
def test_a_part_of_the_patches_is_a_sequence(declared: int) -> None:
    """16 of the 64 patches of a masked autoencoder are no 4 x 4 grid."""
    with pytest.warns(UserWarning, match=r"16 tokens, but the patches before it are a grid of 8 x 8"):
        reader = reader_of("student", tokens(16 + declared, (8, 8), declared), "layer", 2)
    assert (reader.prefix_tokens, reader.token_grid) == (declared, None)


def test_patches_of_another_tower_are_no_grid() -> None:
    tensor = TracedTensor((2, 16, 8), neuron_axis=2)
    layers = (
        TracedLayer("", order=4, calls=1, is_container=True, takes_model_input=True),
        TracedLayer("vision", order=1, calls=1, is_container=True, takes_model_input=True),
        TracedLayer("vision.patch", order=0, calls=1, output=TracedTensor((2, 8, 4, 4), neuron_axis=1)),
        TracedLayer("text", order=3, calls=1, is_container=True, takes_model_input=True),
        TracedLayer("text.layer", order=2, calls=1, output=tensor),
    )
    assert reader_of("student", Trace(layers, batch_size=2), "text.layer", 2).token_grid is None


def test_channels_first_sequences_have_no_token_grid() -> None:
    assert reader_of("student", tokens(16, (4, 4)), "layer", 1).token_grid is None


def test_the_input_of_a_layer_is_not_selected_from() -> None:
    assert reader_of("teacher", tokens(16, None), "layer", 2, select="hidden").select == "hidden"
    assert reader_of("teacher", tokens(16, None), "layer:input", 2, select="hidden").select is None
