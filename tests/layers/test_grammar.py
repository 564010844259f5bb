"""The forms that ``layers=`` accepts, and the errors of those that it does not."""

from __future__ import annotations

import jsonargparse
import pytest

from lightning_otrt.layers.grammar import parse_layers
from lightning_otrt.layers.pairs import LayerPair, LayerSpec

# Its name until 4.37; the newer versions deprecate that.
auto_cli = jsonargparse.auto_cli if hasattr(jsonargparse, "auto_cli") else jsonargparse.CLI


def with_all_forms(layers: LayerSpec = "auto") -> object:
    return layers


def test_yaml_gives_a_layer_pair():
    def command(layers: list[LayerPair] | dict[str, str] | str) -> object:
        return layers

    assert auto_cli(with_all_forms, args=["--layers=-1"], as_positional=False) == -1
    given = ['--layers=[{"student": "a", "teacher": "b", "weight": 2, "neuron_axis": [1, 2]}]']
    assert auto_cli(command, args=given, as_positional=False) == [LayerPair("a", "b", 2.0, (1, 2))]
    assert LayerPair("a", "b", neuron_axis=[1, -1]).neuron_axis == (1, -1)
    assert parse_layers([{"student": "a", "teacher": "b", "select": 0}])[0].select == 0


FORM_ERRORS = [
    (3.5, TypeError, "3.5 of type float"),
    (None, TypeError, "None of type NoneType"),
    (True, TypeError, "True of type bool"),
    ([("a", "b", "c")], TypeError, "('a', 'b', 'c') of type tuple"),
    ([("a", 1.5)], TypeError, "1.5 of type float"),
    ({"a": None}, TypeError, "None of type NoneType"),
    ([{"student": "a", "teacher": "b", "wieght": 1}], TypeError, "['wieght']"),
    ([{"student": "a", "teacher": "b", "weight": -1}], ValueError, "`weight` of layer pair 'a' -> 'b' to be positive"),
    ([{"student": "a", "teacher": "b", "weight": "1"}], TypeError, "to be a number, but got '1'"),
]


@pytest.mark.parametrize(("spec", "error", "words"), FORM_ERRORS)
def test_wrong_forms(spec, error, words):
    with pytest.raises(error) as raised:
        parse_layers(spec)
    assert words in str(raised.value)
