"""From two networks and their first inputs to pairs."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYERS, make_task, make_teacher
from torch import Tensor, nn

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.reading.pairing import check_layers, pair_layers
from lightning_otrt.reading.traced.network_call import NetworkCall


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 1, 8, 8)


def test_pairs_traces_readers_and_table(x: Tensor) -> None:
    task, teacher = make_task(), make_teacher()
    pairing = pair_layers(LAYERS, NetworkCall(task, ((x,), {}), "net"), NetworkCall(teacher, ((x,), {})))
    assert [(pair.student, pair.teacher, pair.weight) for pair in pairing.pairs] == [
        ("net.block1", "block1", 0.5),
        ("net.block2", "block2", 0.5),
    ]
    assert (pairing.student.root, pairing.teacher.root) == ("net", "")
    readers = pairing.readers("teacher", teacher, grid=2)
    assert {key: (name, module is teacher.get_submodule(name)) for key, (name, module, *_) in readers.items()} == {
        0: ("block1", True),
        1: ("block2", True),
    }
    assert readers[1][2](torch.randn(4, 12, 8, 8)).shape == (4, 12, 2, 2)
    assert pairing.table().startswith("root: 'net'; 8 of 10 trained tensors lie before the recorded layers\nstudent")
    assert pairing.table().count("\n") == 3


def test_readers_of_each_side_have_its_own_axis_and_selector(x: Tensor) -> None:
    pair = LayerPair("0", "0", neuron_axis=(1, -1), select="hidden")
    net = nn.Sequential(nn.Conv2d(1, 2, 1))
    pairing = pair_layers("0", NetworkCall(net, ((x,), {})), NetworkCall(net, ((x,), {})), known=(pair,))
    assert pairing.pairs == (pair,)
    axes = [pairing.readers(side, net, 4)[0][2].neuron_axis for side in ("student", "teacher")]
    assert axes == [1, -1]


def test_a_teacher_that_fails_is_named_with_its_inputs(x: Tensor) -> None:
    with pytest.raises(RuntimeError) as raised:
        pair_layers("auto", NetworkCall(make_task(), ((x,), {}), "net"), NetworkCall(nn.Linear(3, 3), ((x,), {})))
    words = "The teacher (Linear) failed on (float32 (4, 1, 8, 8)), from the inputs of 'net' of the student (Task)."
    assert words in str(raised.value)
    assert "`teacher_inputs`" in str(raised.value)


def test_check_layers() -> None:
    task, teacher = make_task(), make_teacher()
    check_layers(LAYERS, task, teacher, None)
    check_layers("block1", task, teacher, "net")
    with pytest.raises(ValueError, match=r"`student_root` .* \(Task\), but got 'body'. Its children: \['net'\]"):
        check_layers("auto", task, teacher, "body")
    with pytest.raises(ValueError, match=r"No layer 'blok1' in the student \(Task\)"):
        check_layers("blok1", task, teacher, None)
    with pytest.raises(ValueError, match="'block1.0.bias' in the teacher .* is a Parameter"):
        check_layers({"net.block1": "block1.0.bias"}, task, teacher, None)
