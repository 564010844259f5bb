"""Figures show what they say, fit on their page and change nothing global."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from lightning_otrt import transport_distance
from lightning_otrt.analysis.neuron_order import diagonal_mass, matched_order
from lightning_otrt.analysis.plot_curves import plot_history, plot_singular_values
from lightning_otrt.analysis.plot_layers import plot_distances
from lightning_otrt.analysis.plot_plans import plot_cost, plot_plan
from lightning_otrt.analysis.plot_style import plan_colours
from lightning_otrt.transport.plans import random_plan, uniform_plan

LONG_NAME = "student.backbone.encoder.layers.encoder_layer_11.mlp.3"
LAYERS = [f"encoder.layers.encoder_layer_{index}.mlp" for index in range(12)]

DRAWINGS: dict[str, Callable[..., tuple[Figure, Axes]]] = {
    "plan": lambda **kwargs: plot_plan(random_plan(64, 64, 0), **kwargs),
    "cost": lambda **kwargs: plot_cost(torch.rand(8, 12), **kwargs),
    "distances": lambda **kwargs: plot_distances(torch.rand(3, 3), LAYERS[:3], LAYERS[:3], **kwargs),
    "singular values": lambda **kwargs: plot_singular_values({"layer4": torch.rand(9).sort().values.flip(0)}, **kwargs),
    "history": lambda **kwargs: plot_history({"loss": [2.0, 1.0]}, **kwargs),
}


@pytest.fixture(autouse=True)
def _no_windows() -> Iterator[None]:
    backend = matplotlib.get_backend()
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")
    pyplot.switch_backend(backend)


def shown(axes: Axes) -> Tensor:
    return torch.as_tensor(axes.images[0].get_array().filled(math.nan))


def assert_fits(figure: Figure) -> None:
    """Nothing is cut off at the edges of the page, and drawing it raises no warning."""
    figure.canvas.draw()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 > -0.01
    assert box.y0 > -0.01
    assert box.x1 < width + 0.01
    assert box.y1 < height + 0.01


@pytest.mark.parametrize("name", DRAWINGS)
def test_without_matplotlib(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [*sys.modules]:
        if module.partition(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"^Figures need matplotlib: pip install matplotlib\.$"):
        DRAWINGS[name]()


@pytest.mark.parametrize("name", DRAWINGS)
def test_returns_figure_and_axes_and_leaves_the_rest_alone(name: str) -> None:
    before = dict(matplotlib.rcParams)
    figure, axes = DRAWINGS[name]()
    assert isinstance(figure, Figure)
    assert isinstance(axes, Axes)
    assert axes.figure is figure
    assert_fits(figure)
    assert dict(matplotlib.rcParams) == before
    for kind in ("png", "pdf", "svg"):
        file = io.BytesIO()
        figure.savefig(file, format=kind)
        assert file.tell() > 1000


@pytest.mark.parametrize("name", DRAWINGS)
def test_draws_on_given_axes(name: str) -> None:
    figure, (left, right) = pyplot.subplots(1, 2)
    result = DRAWINGS[name](ax=right)
    assert result == (figure, right)
    assert not left.has_data()
    assert right.has_data()
    assert len(pyplot.get_fignums()) == 1


@pytest.mark.parametrize("shape", [(64, 64), (512, 256), (16, 256), (300, 4), (1, 1), (1500, 1500)])
def test_plans_of_every_shape_fit(shape: tuple[int, int]) -> None:
    figure, _ = plot_plan(random_plan(*shape, 0), student_label=LONG_NAME, teacher_label=LONG_NAME)
    assert_fits(figure)


def test_plans_are_shown_in_matched_order_unless_it_is_switched_off() -> None:
    plan = random_plan(48, 24, 0)
    rows, columns = matched_order(plan)
    assert torch.equal(shown(plot_plan(plan)[1]), plan[rows][:, columns] * 48)
    assert torch.equal(shown(plot_plan(plan, order=False)[1]), plan * 48)


def test_the_label_tells_which_side_is_ordered() -> None:
    wide_teacher, wide_student = (plot_plan(random_plan(*shape, 0))[1] for shape in ((4, 8), (8, 4)))
    assert wide_teacher.get_ylabel() == "student neuron"
    assert wide_teacher.get_xlabel() == "teacher neuron\n(ordered by match)"
    assert wide_student.get_ylabel() == "student neuron\n(ordered by match)"
    assert wide_student.get_xlabel() == "teacher neuron"


@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_plan_colours_are_shares_of_a_neuron(shape: tuple[int, int]) -> None:
    _, axes = plot_plan(random_plan(*shape, 0))
    side = "student" if shape[0] > shape[1] else "teacher"
    assert shown(axes).max() == pytest.approx(1)
    assert axes.images[0].get_clim()[0] == 0
    assert axes.images[0].colorbar.ax.get_ylabel() == f"share of the {side} neuron's mass"
    assert torch.allclose(shown(plot_plan(uniform_plan(*shape))[1]), torch.tensor(1 / min(shape)))


def test_single_entries_of_large_plans_stay_visible() -> None:
    plan = torch.eye(2048) / 2048
    _, axes = plot_plan(plan)
    assert shown(axes).shape == (128, 128)
    assert torch.equal(shown(axes).diagonal(), torch.ones(128))
    assert axes.images[0].colorbar.ax.get_ylabel().endswith("(largest of 16 × 16)")
    assert axes.get_xlim() == (-0.5, 2047.5)


def test_cost_is_ordered_as_its_plan() -> None:
    teacher = torch.randn(12, 400)
    result = transport_distance(teacher[torch.randperm(12)], teacher, plan="exact")
    _, plain = plot_cost(result.cost)
    _, ordered = plot_cost(result.cost, plan=result.plan)
    assert torch.equal(shown(plain), result.cost)
    assert shown(ordered).diagonal().max() < 1e-5
    assert shown(ordered).argmin(1).tolist() == list(range(12))
    assert plain.images[0].colorbar.ax.get_ylabel() == "cost"


def test_layer_names_and_pairing() -> None:
    distances = torch.rand(12, 12)
    distances[3, 4] = math.nan
    figure, axes = plot_distances(distances, LAYERS, LAYERS[::-1], pairing=zip(LAYERS[:2], LAYERS[5:7], strict=True))
    assert_fits(figure)
    assert [label.get_text() for label in axes.get_yticklabels()] == LAYERS
    assert [label.get_text() for label in axes.get_xticklabels()] == LAYERS[::-1]
    # The frames are drawn twice, white below black.
    assert [patch.get_xy() for patch in axes.patches[::2]] == [(5.56, -0.44), (4.56, 0.56)]
    assert axes.get_legend().get_texts()[0].get_text() == "paired"
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == 143
    assert texts[0] == f"{distances[0, 0].item():.2f}"


def test_many_layers_have_no_numbers() -> None:
    names = [f"features.{index}" for index in range(40)]
    figure, axes = plot_distances(torch.rand(40, 40), names, names, pairing={name: name for name in names})
    assert_fits(figure)
    assert not axes.texts


@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (1, 1), (3, 5)])
def test_distances_of_every_shape_fit(shape: tuple[int, int]) -> None:
    names = [f"{LONG_NAME}.{index}" for index in range(12)]
    figure, _ = plot_distances(torch.rand(shape), names[: shape[0]], names[: shape[1]], pairing={names[0]: names[0]})
    assert_fits(figure)


def test_long_names_are_shortened_unless_they_become_the_same() -> None:
    apart = [f"{LONG_NAME}.{index}" for index in range(2)]
    alike = [f"encoder.layer.{index}.attention.output.dense.LayerNorm" for index in range(2)]
    _, axes = plot_distances(torch.rand(2, 2), apart, alike)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "student.back…ncoder_layer_11.mlp.3.0",
        "student.back…ncoder_layer_11.mlp.3.1",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == alike


def test_history_curves_differ_in_colour_and_line() -> None:
    history = {f"curve {index}": [float(index), index + 1.0] for index in range(28)}
    _, axes = plot_history(history, steps=[0, 100])
    lines = axes.get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 28
    assert all(a.get_linestyle() != b.get_linestyle() for a, b in pairwise(lines))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(history)
    assert lines[3].get_xydata().tolist() == [[0, 3], [100, 4]]
    luminances = [
        sum(part * weight for part, weight in zip(to_rgb(line.get_color()), (0.21, 0.72, 0.07), strict=True))
        for line in lines
    ]
    assert max(luminances) < 0.75, "a curve would be lost on white"


def test_history_numbers_its_steps_and_shows_single_points() -> None:
    figure, axes = plot_history({"loss": [3.0, math.nan, 1.0], "one": [2.0]})
    assert_fits(figure)
    assert axes.get_lines()[0].get_xdata().tolist() == [0, 1, 2]
    assert axes.get_lines()[0].get_marker() == "None"
    assert axes.get_lines()[1].get_marker() == "o"


@pytest.mark.parametrize("values", [torch.eye(4, dtype=torch.bfloat16, requires_grad=True), torch.eye(4).tolist()])
def test_accepts_whatever_holds_numbers(values: Any) -> None:
    assert torch.equal(shown(plot_cost(values)[1]), torch.eye(4))


@pytest.mark.parametrize(
    ("draw", "match"),
    [
        (lambda: plot_plan(torch.rand(2, 4, 4)), r"`plan` to be .* matrix, but got \(2, 4, 4\).*plan\[0\]"),
        (lambda: plot_plan(torch.rand(4, 0)), r"`plan` to be a non-empty matrix, but got \(4, 0\)"),
        (lambda: plot_cost(torch.rand(4)), r"`cost` to be a non-empty matrix, but got \(4,\)"),
        (
            lambda: plot_cost(torch.rand(4, 4), plan=torch.rand(4, 5)),
            r"`cost` \(4, 4\) and `plan` \(4, 5\)",
        ),
        (lambda: plot_distances(torch.rand(2, 2), ["a"], ["b", "c"]), r"shape \(1, 2\) .* but got \(2, 2\)"),
        (
            lambda: plot_distances(torch.rand(1, 1), ["a"], ["b"], pairing={"a": "c"}),
            r"names the teacher layer 'c', which is none of \['b'\]",
        ),
        (
            lambda: plot_distances(torch.rand(1, 1), ["a"], ["b"], pairing=[("d", "b")]),
            r"names the student layer 'd', which is none of \['a'\]",
        ),
        (lambda: plot_history({}), "`history` to contain at least one curve"),
        (lambda: plot_history({"loss": [1.0]}, steps=[0, 1]), "curve 'loss' .* to have 2 values, .* but got 1"),
    ],
)
def test_bad_arguments(draw: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        draw()
    assert not pyplot.get_fignums(), "no empty figure is left"


def test_singular_values_of_several_layers() -> None:
    """Each from the first direction on, and the values that would spread evenly over all of its own."""
    wide, narrow = torch.tensor([0.4, 0.2, 0.1, 0.05]), torch.tensor([0.6, 0.3])
    _, axes = plot_singular_values({"wide": wide, "narrow": narrow})
    first, second, *even = axes.get_lines()
    assert first.get_xdata().tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(torch.tensor(first.get_ydata().tolist()), wide)
    assert [math.isnan(value) for value in second.get_ydata()] == [False, False, True, True]
    assert [list(line.get_ydata()) for line in even] == [[0.5, 0.5], [0.25, 0.25]]
    assert axes.get_ylim()[0] == 0


ROTATION = transport_distance(torch.randn(6, 50), torch.randn(9, 50), plan="orthogonal")


@pytest.mark.parametrize(("draw", "error", "message"), [
    (lambda: plot_singular_values({}), ValueError, "at least one curve"),
    (lambda: plot_singular_values(ROTATION.singular_values), TypeError, "mapping from the name.*got a Tensor"),
    (lambda: plot_singular_values({"a": torch.rand(2, 3)}), ValueError, r"'a' to be a non-empty vector, .* \(2, 3\)"),
    (lambda: plot_singular_values({"a": None}), ValueError, "'a' are None, as those of a transport plan"),
    (lambda: plot_plan(ROTATION.rotation), ValueError, "no negative entries.*`plot_singular_values`"),
    (lambda: plot_cost(ROTATION.cost, plan=ROTATION.rotation), ValueError, "no negative entries"),
])  # fmt: skip
def test_rotations_are_no_plans(draw: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw()


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_carries_its_title(name: str) -> None:
    figure, axes = DRAWINGS[name](title="layer4 and layer4, step 400")
    assert_fits(figure)
    assert "layer4 and layer4, step 400" in axes.get_title() + axes.get_title(loc="right")


def test_a_plan_says_its_distance_and_what_a_random_order_would_show() -> None:
    """Ordered by match even a random assignment is a diagonal."""
    _, axes = plot_plan(random_plan(64, 64, 0), distance=torch.tensor(0.25))
    assert axes.get_title() == ("Transport plan\ndistance 0.250, 100% of the mass on the diagonal, in random order 5%")
    assert "100%" not in plot_plan(random_plan(64, 64, 0), order=False)[1].get_title()


@pytest.mark.parametrize("shape", [(40, 40), (40, 80), (90, 30)])
def test_the_share_of_a_random_order_is_that_of_orders_that_were_drawn(shape: tuple[int, int]) -> None:
    plan = torch.rand(shape) ** 8
    drawn = [diagonal_mass(plan[torch.randperm(shape[0])][:, torch.randperm(shape[1])])[0] for _ in range(200)]
    assert sum(drawn) / len(drawn) == pytest.approx(diagonal_mass(plan)[1], rel=0.05)
    assert diagonal_mass(uniform_plan(*shape))[0] == pytest.approx(diagonal_mass(plan)[1], rel=1e-4)


def test_no_mass_is_white_and_more_is_darker() -> None:
    colours = plan_colours()
    assert colours(0.0) == (1, 1, 1, 1)
    shades = [colours(value)[:3] for value in torch.linspace(0, 1, 30).tolist()]
    luminances = [0.21 * red + 0.72 * green + 0.07 * blue for red, green, blue in shades]
    assert all(a > b for a, b in pairwise(luminances))
    assert plot_plan(torch.eye(8) / 8)[1].images[0].get_cmap().name == "plan"
