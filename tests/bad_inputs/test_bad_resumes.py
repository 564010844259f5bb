"""Resuming with something else than what was saved."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
from bad_inputs.fits import KEPT, Error, Fit, assert_nothing_left
from bad_inputs.messages import assert_message, collected_warnings
from helpers import loader, make_task, make_teacher, make_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_otrt import OTRTCallback

RESUMES: list[tuple[str, Fit | None, Fit | None, Error | None, tuple[str, ...]]] = [
    ("the same", Fit(""), Fit(""), None, ()),
    (
        "another weight, epsilon and rate of solving",
        Fit(""),
        Fit("", options={"weight": 9.0, "epsilon": 0.02, "solve_every": 1}),
        None,
        (),
    ),
    (
        "another plan",
        Fit(""),
        Fit("", options={"plan": "exact"}),
        MisconfigurationException,
        ("'plan': 'sinkhorn'", "this run has", "'plan': 'exact'", ": `plan` changed, so that", "the same ones"),
    ),
    (
        "another cost",
        Fit(""),
        Fit("", options={"cost": "euclidean"}),
        MisconfigurationException,
        ("changed, so that its", "plans and statistics cannot be used", "load the weights alone"),
    ),
    ("from a run without the term", None, Fit(""), None, ()),
    (
        "in a run without the term",
        Fit(""),
        None,
        None,
        ("callbacks used to create the checkpoint need to be provided",),
    ),
    (
        "other layers",
        Fit(""),
        Fit("", layers="penultimate"),
        MisconfigurationException,
        (
            "'net.block1",
            "this run has",
            "'penultimate'",
            "plans and statistics cannot be used",
            "load the weights alone",
        ),
    ),
    (
        "layers that are others by their order",
        Fit("", layers=[("net.block1", "block1"), ("net.block2", "block2")]),
        Fit("", layers=[("net.block2", "block2"), ("net.block1", "block1")]),
        MisconfigurationException,
        (": `layers` changed, so that", "Resume with the same ones"),
    ),
    (
        "a teacher of other widths",
        Fit(""),
        Fit("", teacher=lambda _: make_teacher(7)),
        MisconfigurationException,
        (": the teacher changed, so that", "load the weights alone"),
    ),
    (
        "another plan and another root",
        Fit(""),
        Fit("", options={"plan": "orthogonal", "student_root": "net"}),
        MisconfigurationException,
        (": `student_root` and `plan` changed, so that", "load the weights alone"),
    ),
]


@pytest.mark.parametrize(
    ("first", "then", "error", "words"), [case[1:] for case in RESUMES], ids=[c[0] for c in RESUMES]
)
def test_resumes(
    first: Fit | None, then: Fit | None, error: Error | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    def fit(case: Fit | None, steps: int, path: Path | None = None) -> pl.Trainer:
        added = [OTRTCallback(case.teacher(task), case.layers, **{"weight": 2.0, **case.options})] if case else []
        KEPT.extend(one.transfer for one in added)
        trainer = make_trainer(callbacks=added, max_steps=steps)
        trainer.fit(task, loader(16), ckpt_path=path, weights_only=True if path else None)
        return trainer

    task = make_task()
    fit(first, 2).save_checkpoint(tmp_path / "a.ckpt")
    task = make_task()
    if error is not None:
        with collected_warnings(), pytest.raises(error) as raised:
            fit(then, 4, tmp_path / "a.ckpt")
        assert_message(raised.value, words)
    else:
        with collected_warnings() as messages:
            assert fit(then, 4, tmp_path / "a.ckpt").global_step == 4
        assert len(messages) == len(words), messages
        assert_message("".join(messages), words)
    assert_nothing_left(task, make_teacher())
