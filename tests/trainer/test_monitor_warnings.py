"""Warnings of the monitor: each where its reason is, and none where all is well."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import (
    LAYERS,
    make_task,
    make_teacher,
)
from torch import nn
from trainer.monitored import fit

from lightning_otrt import LinearWarmup, OTRTCallback, TransferWarning
from lightning_otrt.trainer.monitor import OTRTMonitor


class TestWarnings:
    def told(self, task, callback, **options) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(task, callback, OTRTMonitor(1, figures=False), **options)
        return [str(warning.message) for warning in caught if issubclass(warning.category, TransferWarning)]

    def test_nothing_where_all_is_well(self):
        assert self.told(make_task(), OTRTCallback(make_teacher(), LAYERS, weight=2.0), max_steps=8) == []

    def test_few_observations(self):
        callback = OTRTCallback(make_teacher(), {"net.dropout": "dropout"}, memory=0.0, weight=0.1)
        [message] = self.told(make_task(), callback)
        assert "8 observations of 8 and 12 neurons and without memory" in message
        assert 'memory="auto"' in message
        callback = OTRTCallback(make_teacher(), {"net.dropout": "dropout"}, weight=0.1)
        assert self.told(make_task(), callback) == []

    def test_copied_student_with_batch_norm(self):
        task = make_task()
        teacher = copy.deepcopy(task.net)
        [message] = [text for text in self.told(task, OTRTCallback(teacher, LAYERS)) if "BatchNorm" in text]
        assert "its 2 BatchNorm layers (such as 'block1.1') are in train mode" in message
        task = make_task(norm=False)
        assert self.told(task, OTRTCallback(copy.deepcopy(task.net), LAYERS), max_steps=1) == []

    def test_copied_student_with_another_head(self):
        task = make_task()
        teacher = copy.deepcopy(task.net)
        task.net.head = nn.Linear(8, 3)
        assert any("weights of its teacher" in text for text in self.told(task, OTRTCallback(teacher, LAYERS)))

    def test_uniform_plan(self):
        def flat(y, x):
            return 1 + 1e-4 * torch.cdist(y, x)

        callback = OTRTCallback(make_teacher(), LAYERS, cost=flat, weight=1.0)
        [message] = [text for text in self.told(make_task(), callback) if "uniform" in text]
        assert "of 4 student and 6 teacher neurons" in message
        for plan in ("uniform", "random"):
            callback = OTRTCallback(make_teacher(), LAYERS, plan=plan, weight=1.0)
            assert not [text for text in self.told(make_task(), callback) if "uniform" in text]

    def test_the_default_weight_on_a_small_network(self):
        assert self.told(make_task(), OTRTCallback(make_teacher(), LAYERS), max_steps=8) == []

    @pytest.mark.parametrize(("weight", "text"), [(1e-4, "changes next to nothing"), (1e4, "task hardly counts")])
    def test_weight_out_of_range(self, weight, text):
        [message] = self.told(make_task(lr=1e-6), OTRTCallback(make_teacher(), LAYERS, weight=weight), max_steps=8)
        assert text in message
        assert "suggest_weight" in message

    def test_a_warm_up_is_meant_to_be_weak(self):
        callback = OTRTCallback(make_teacher(), LAYERS, weight=1.0, schedule=LinearWarmup(10_000))
        assert self.told(make_task(lr=1e-3), callback, max_steps=8) == []
