"""The page ``results/transfer.md``: protocol, goals, tables, figures, and what was not run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.evidence import figures
from benchmarks.evidence.default_plan import default_plan
from benchmarks.evidence.experiments import EXPERIMENTS, Experiment
from benchmarks.evidence.goals import goals, goals_table
from benchmarks.evidence.methods import DEFAULT
from benchmarks.evidence.report import (
    NAMES,
    Accuracies,
    Found,
    choices_table,
    command,
    comparison_table,
    curve_table,
    gather,
    label,
    signed,
    variant_table,
)
from benchmarks.evidence.runs import Results
from benchmarks.evidence.statistics import compare

_PROTOCOL = """\
Teachers learn A–Z and 0–9 (or the student's own task, in compression) from 200 images per class; students learn few
labelled images, distorted and noisy. No font file is in two of train, validation and test. Widths: teacher 16-32-64,
student 8-16-32, unless a heading says otherwise.

- *Paired*: within a seed all methods have the same images, initial weights and order of batches; three teachers
  alternate over seeds. Intervals are 95 % of Student's t over seeds; p values are those of paired t tests of the
  default against each method of a table, corrected by Holm's procedure over that table. A goal about another method
  has its p value from the tests of that method against all others of the table, corrected in the same way.
- *Tuned alike*: nine candidates for each method (three optimiser settings × three weights; nine optimiser settings
  where there is no weight), the best two again on a second seed, on the validation fonts of a–z (compression of
  digits: on digits that serve nothing else), with seeds and a teacher used for nothing else. A star marks a chosen
  weight at the edge of its candidates.
- *Rivals*: their losses are in `benchmarks/evidence/losses.py`. Their projections decay less than the student, which
  helps them; CRD takes its negatives from the batch; hints are relative to the variance of the teacher.
- Experiments that vary a condition (labels per class, widths, architecture, steps, domain) keep what was chosen for the
  main table, for all methods alike, unless they list choices of their own.
- AdamW, one-cycle learning rate, 400 steps of 64 images (digits: 300, students that start with features: 200). The
  transport term is that of `RepresentationTransfer`, unmodified; the outputs of the frozen teacher on the fixed images
  are computed once."""

_TRIED = """\
Where a goal fails, this was tried to reach it, on the validation fonts of a–z and on no target; the tables are below.

- *Couplings*: rotations of raw and of half standardised neurons, a linear regression of the teacher in closed form, and
  CKA as a coupling. The regression is level with the rotation, which is in the library; the others are behind.
- *Ablations of the default*: three costs, ε from 0.003 to 0.3, exact plans, plans that are solved at every call or kept
  for ever, other layers, grids, batch sizes and memories. None is ahead of the default by two points.
- *Weight of the term*: from 0.5 to 64 for students from scratch, and from 2 to 512 for those that start with features.
- *Does the matching matter for transformers?*: other layers and plans there. None makes it matter for certain.
- Together with distillation the term is always that of weight 8, and no other layers or plans were tried.\
"""


def section(results: Results, folder: Path, experiments: Mapping[str, Experiment] = EXPERIMENTS) -> str:
    """The Markdown of everything found so far.

    Args:
        results: The rows.
        folder: Where figures go; the page is in the same folder.
        experiments: What was planned.
    """
    found = gather(results, experiments)
    drawn = figures.draw(found, folder)
    seconds = sum(row["seconds"] for row in results.rows.values())
    lines = [
        "# Transfer",
        "",
        f"`python -m benchmarks.transfer` on {platform.machine()}, torch {torch.__version__.partition('+')[0]}, one "
        f"thread: {len(results.rows)} runs, {seconds / 3600:.1f} hours. Each run is a line of "
        f"`{results.path.name}`; the command continues where it was stopped.",
        "",
        _PROTOCOL,
        "",
    ]
    if reached := goals(found):
        lines += ["## Goals", "", *goals_table(reached), _TRIED, ""]
    if table := default_plan(found):
        lines += ["## Which plan should be the default?", "", *table]
    if claims := paper_claims(found):
        lines += [
            "## What the paper claims: gains over training alone and over distillation, in three uses",
            "",
            *claims,
        ]
    for name, (caption, made_by) in drawn.items():
        lines += [f"![{caption}]({name})", "", f"*{caption}.* {made_by}", ""]
    for one in found.values():
        lines += _experiment(one)
    missing = [name for name in experiments if name not in found]
    if missing:
        lines += [
            "## Not run yet",
            "",
            f"Implemented, but without results here: {', '.join(f'`{name}`' for name in missing)}. {command(*missing)}",
            "",
        ]
    return "\n".join(lines)


def _experiment(found: Found) -> list[str]:
    experiment = found.experiment
    if experiment.changes.get("keep_plans"):
        return []
    lines = [f"## {experiment.title}", "", command(found.name), ""]
    for target in filter(found.columns, experiment.targets):
        if experiment.variants:
            lines += variant_table(found, target, experiment.per_class[0])
        elif len(experiment.per_class) > 1:
            lines += curve_table(found, target)
        else:
            lines += comparison_table(found, target, experiment.per_class[0])
    if not experiment.variants and len(experiment.per_class) == 1:
        lines += ["<details><summary>What tuning chose</summary>", "", *choices_table(found), "</details>", ""]
    return lines


def paper_claims(found: Mapping[str, Found]) -> list[str]:
    """The paper's three uses beside what was measured here; its claim for each is a gain over the baselines."""
    uses = (
        ("copied", "1. inductive transfer, same network"),
        ("compression", "2. compression, same task"),
        ("digits", "2. compression, same task"),
        ("main", "3. smaller student, new task"),
    )
    lines = []
    for name, use in uses:
        if name not in found:
            continue
        experiment = found[name].experiment
        for target in experiment.targets:
            accuracies = found[name].accuracies(target, experiment.per_class[0])
            for ours in ("ot-penultimate", DEFAULT):
                lines.append(f"| {use} | {NAMES[target]} | {label(ours)} | {_against(accuracies, ours)} |")
    if not lines:
        return []
    return ["| use | on | transport | gain in points, paired |", "|---|---|---|---|", *lines, ""]


def _against(accuracies: Accuracies, ours: str) -> str:
    """Gains of one method against the baselines of the paper."""
    if ours not in accuracies:
        return ""
    baselines = ("plain", "l2-sp", "kd", "lwf", "fitnets")
    comparisons = compare(accuracies[ours], {name: accuracies[name] for name in baselines if name in accuracies})
    return "; ".join(f"{signed(one.gain)} against {label(name)}" for name, one in comparisons.items())
