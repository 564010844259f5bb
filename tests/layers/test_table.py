"""The table of pairs for the log."""

from __future__ import annotations

from lightning_otrt.layers.resolve import resolve_layers
from lightning_otrt.layers.table import format_pairs


def test_format_pairs(student, teacher):
    pairs = resolve_layers(["layer1", "layer4:input"], student, teacher)
    table = format_pairs(pairs, student, teacher).splitlines()
    assert len(table) == 3
    assert table[1].split("  ")[0] == "net.layer1 (Conv2d)"
    assert table[1].split()[-1] == "0.5"
    assert "(2, 4, 16, 16)     1  layer1 (Conv2d)" in table[1]
    assert table[2].startswith("net.layer4:input (Conv2d)")
    assert table[2].endswith("0.5")
    assert len({len(line) for line in table}) == 1
