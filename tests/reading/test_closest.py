"""The pairs of "matched"."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same, hooks, make_task, make_teacher, seeded, weights
from torch import nn

from lightning_otrt import RepresentationTransfer


class Reader(nn.Module):
    """Layers that work on each token alone."""

    def __init__(self, depth=4):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth))

    def encode(self, ids, attention_mask):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, ids, attention_mask):
        return self.head((self.encode(ids, attention_mask) * attention_mask[..., None]).sum(1))


class TestMatched:
    def pairs(self, student, teacher, layers="matched", x=None):
        transfer = RepresentationTransfer(teacher, layers)
        with transfer.attached(student):
            student(torch.randn(16, 1, 8, 8) if x is None else x)
            transfer.loss()
        assert hooks(student, transfer.teacher.module) == []
        return [(pair.student, pair.teacher) for pair in transfer.pairs]

    def test_follows_distance_rather_than_depth(self):
        """The student has the first and the last of three equal maps of its teacher, but not the one in the middle."""
        teacher = nn.Sequential(*(seeded(i, conv_block, 4 if i else 1) for i in range(3)), nn.AvgPool2d(2), Head(64))
        student = nn.Sequential(copy.deepcopy(teacher[0]), nn.AvgPool2d(2), Head(64))
        assert self.pairs(student, teacher, "auto")[0][1] == "2"
        assert self.pairs(student, teacher)[0] == ("0", "0")

    def test_follows_what_samples_share_and_not_what_all_maps_share(self):
        """The second map of the teacher is the same for every image, and so is most of the student's first one."""
        frame = torch.zeros(1, 4, 8, 8)
        frame[:, :, 0], frame[:, :, -1] = 3, -3
        teacher = nn.Sequential(seeded(0, conv_block, 1), Plus(frame, keep=0.0), nn.AvgPool2d(2), Head(64))
        student = nn.Sequential(nn.Sequential(copy.deepcopy(teacher[0]), Plus(frame)), Head(256))
        assert self.pairs(student, teacher) == [("0", "0")]

    def test_padding_is_left_out_where_a_method_is_the_root(self):
        """No hook of the module sees the arguments of its method."""
        ids, valid = seeded(0, torch.randint, 1, 20, (12, 7)), torch.arange(7) < seeded(1, torch.randint, 2, 8, (12, 1))
        teacher, found = seeded(2, Reader), []
        for filling in (0, 19):
            student = seeded(3, Reader, depth=3)
            transfer = RepresentationTransfer(teacher, "matched", student_root=":encode")
            with transfer.attached(student):
                student.encode(ids.masked_fill(~valid, filling), valid)
                found.append((transfer.loss().item(), [pair.teacher for pair in transfer.pairs]))
        assert found[0][1] == found[1][1]
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)

    def test_one_sample_has_no_chance(self):
        with pytest.raises(ValueError, match="single sample: their distance by chance"):
            self.pairs(make_task().net, make_teacher(), x=torch.randn(1, 1, 8, 8))

    def test_does_not_change_the_student(self):
        task = make_task(dropout=0.5)
        before, state = weights(task), torch.get_rng_state()
        x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        transfer = RepresentationTransfer(make_teacher(), "matched")
        with transfer.attached(task.eval()):
            task(x)
            transfer.loss()
        assert_same(weights(task), before)
        assert torch.equal(torch.get_rng_state(), state)

    def test_mixes_with_other_words(self):
        found = self.pairs(make_task().net, make_teacher(), ["matched", "penultimate"])
        assert found == [("block1", "block1"), ("block2", "block2"), ("dropout:input", "dropout:input")]

    def test_is_penultimate_where_there_are_no_blocks(self):
        nets = [nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)) for width in (3, 5)]
        assert self.pairs(*nets, x=torch.randn(8, 4)) == [("2:input", "2:input")]

    def test_nothing_to_compare(self):
        with pytest.raises(ValueError, match='"matched" found no pair'):
            self.pairs(Maps(), Tokens())

    def test_on_one_side(self):
        with pytest.raises(ValueError, match='Use "matched" by itself'):
            RepresentationTransfer(make_teacher(), {"matched": "block1"}).attach(make_task())


def conv_block(channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh())


class Plus(nn.Module):
    """Adds the same map to that of each sample."""

    def __init__(self, frame, keep=1.0) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("frame", frame.clone())

    def forward(self, x):
        return self.keep * x + self.frame


class Head(nn.Linear):
    def __init__(self, features) -> None:
        super().__init__(features, 3)

    def forward(self, x):
        return super().forward(x.flatten(1))


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.last = nn.Conv2d(4, 2, 1)  # makes the output, and is no block

    def forward(self, x):
        return self.last(self.conv(x).tanh()).mean((1, 2, 3))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.blocks(x[:, 0, :6])).mean((1, 2))
