"""Values that are not finite: seen by gradient scalers and anomaly detection, and kept out of plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    Task,
    hooks,
    make_data,
    make_task,
    make_teacher,
    make_trainer,
    weights,
)
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader
from trainer.contexts import EXACT

from lightning_otrt import OTRTCallback, RepresentationTransfer


def some_batches(*chosen: int) -> DataLoader[Any]:
    """Batches of the shared data, of which the second has infinite inputs."""
    x, y = make_data().tensors
    x[8:16] = float("inf")
    return DataLoader([[x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]] for i in chosen], batch_size=None)


def fit_some(task: Task, batches: DataLoader[Any], **options: Any) -> RepresentationTransfer:
    callback = OTRTCallback(make_teacher(), **EXACT, teacher_inputs=lambda x: torch.nan_to_num(x, posinf=0.0))
    make_trainer(callbacks=[callback], max_epochs=1, **options).fit(task, batches)
    return callback.transfer


def test_steps_of_a_student_that_is_not_finite_are_skipped_by_the_scaler():
    """The term is not finite then, is told once, and leaves nothing behind in weights and plans."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    task = make_task(norm=False)
    with pytest.warns(UserWarning, match="NaN or infinite") as told:
        transfer = fit_some(
            task, some_batches(0, 1, 2, 1, 3), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        )
    assert sum("NaN or infinite" in str(warning.message) for warning in told) == 1
    assert scaler.get_scale() == 1.0
    assert all(state["plan"].isfinite().all() for state in transfer.state_dict()["engine"]["pairs"])
    without_them = make_task(norm=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fit_some(without_them, some_batches(0, 2, 3), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    for name, value in weights(without_them).items():
        torch.testing.assert_close(weights(task)[name], value)


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_anomalies_in_the_student_are_detected():
    task = make_task(norm=False)
    with (
        pytest.warns(UserWarning, match="NaN or infinite"),
        pytest.raises(RuntimeError, match="returned nan values in its"),
    ):
        fit_some(task, some_batches(0, 1), detect_anomaly=True)
    assert not hooks(task)
