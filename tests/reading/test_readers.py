"""How a layer is read, from its trace: batch axis, prefix tokens and the grid of the others."""

from __future__ import annotations

import pytest

from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.readers import layer_reader


def tokens(count: int, image: tuple[int, int] | None, declared: int = 0, batch_axis: int = 0) -> Trace:
    shape = (2, count, 8) if batch_axis == 0 else (count, 2, 8)
    tensor = TracedTensor(shape, neuron_axis=2, batch_axis=batch_axis)
    layer = TracedLayer("layer", calls=1, input=tensor, output=tensor)
    return Trace((layer,), batch_size=2, image_size=image, prefix_tokens=declared)


@pytest.mark.parametrize(
    ("count", "image", "declared", "prefix", "grid"),
    [
        (16, (32, 32), 0, 0, (4, 4)),
        (17, (32, 32), 1, 1, (4, 4)),
        (16, (32, 32), 1, 0, (4, 4)),
        (8, (16, 32), 0, 0, (2, 4)),
        (21, (32, 32), 5, 5, (4, 4)),
        (18, (32, 32), 1, 1, None),
        (1, (32, 32), 1, 0, (1, 1)),
        (16, None, 0, 0, None),
        (17, None, 1, 0, None),
    ],
)
@pytest.mark.parametrize("batch_axis", [0, 1])
def test_tokens_of_an_image(
    count: int,
    image: tuple[int, int] | None,
    declared: int,
    prefix: int,
    grid: tuple[int, int] | None,
    batch_axis: int,
) -> None:
    reader = layer_reader("student", tokens(count, image, declared, batch_axis), "layer", 2, 4)
    assert (reader.prefix_tokens, reader.token_grid, reader.batch_axis) == (prefix, grid, batch_axis)
    assert (reader.neuron_axis, reader.grid, reader.layer) == (2, 4, "student layer 'layer'")


def test_channels_first_sequences_have_no_token_grid() -> None:
    assert layer_reader("student", tokens(16, (32, 32)), "layer", 1, 4).token_grid is None


def test_the_input_of_a_layer_is_not_selected_from() -> None:
    assert layer_reader("teacher", tokens(16, None), "layer", 2, 4, select="hidden").select == "hidden"
    assert layer_reader("teacher", tokens(16, None), "layer:input", 2, 4, select="hidden").select is None
