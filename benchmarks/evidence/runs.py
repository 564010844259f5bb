"""Runs as plain data: one JSON line each, appended as they end, so that a killed benchmark continues."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything a result depends on, but the processor: another one rounds otherwise, and a run may end points away.

    Attributes:
        setting: ``"1"`` copied, ``"1x"`` from another network, ``"2"`` compression, ``"3"`` smaller, new task.
        target: The student's task.
        method: A key of ``METHODS``.
        lr: Highest learning rate of the student.
        weight_decay: Its weight decay.
        weight: Weight of the transfer term.
        seed: Decides labelled images, initial weights and order of batches: the same for all methods.
        teacher_seed: Decides the teacher.
        split: ``"validation"`` or ``"test"``.
        per_class: Labelled images of each class.
        pool: Whether the transfer term runs on unlabelled images, in a second forward.
        pair: A key of ``PAIRS``.
        steps: Steps of the student.
        teacher_steps: Steps of the teacher.
        batch_size: Images of a batch.
        source: The teacher's task, "" for the usual one of the setting.
        options: Changed options of the transport term, as ``(name, value)``.
        keep_plans: Whether to keep plans over training.
    """

    setting: str
    target: str
    method: str
    lr: float
    weight_decay: float
    weight: float
    seed: int
    teacher_seed: int = 0
    split: str = "test"
    per_class: int = 10
    pool: bool = False
    pair: str = "conv"
    steps: int = 400
    teacher_steps: int = 800
    batch_size: int = 64
    source: str = ""
    options: tuple[tuple[str, Any], ...] = field(default=())
    keep_plans: bool = False

    @property
    def key(self) -> str:
        """The same text for the same run, in every version that knows its fields."""
        return json.dumps(self.settings, sort_keys=True)

    @property
    def settings(self) -> Row:
        """Its fields, without those at their defaults: a new field leaves old results valid."""
        return {name: value for name, value in asdict(self).items() if name in _REQUIRED or value != _DEFAULTS[name]}

    @classmethod
    def of(cls, row: Row) -> Run:
        """The run behind a row of results."""
        settings = {name: value for name, value in row.items() if name in {f.name for f in fields(cls)}}
        options = tuple((name, _hashable(value)) for name, value in settings.pop("options", ()))
        return cls(**settings, options=options)


_DEFAULTS = {f.name: f.default for f in fields(Run)}
_REQUIRED = ("setting", "target", "method", "lr", "weight_decay", "weight", "seed", "teacher_seed")


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


class Results:
    """Rows of a JSON-lines file, by run.

    Args:
        path: The file; a last line that a killed process left incomplete is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if not path.exists():
            return
        whole, _, torn = path.read_text().rpartition("\n")
        for line in whole.splitlines():
            row = json.loads(line)
            self.rows[Run.of(row).key] = row
        if torn:
            path.write_text(f"{whole}\n" if whole else "")

    def add(self, run: Run, found: Row) -> None:
        """Keep a result, on disk at once.

        Raises:
            ValueError: If what was found goes by the name of a setting: the row would be another run's.
        """
        if shared := _DEFAULTS.keys() & found.keys():
            raise ValueError(f"These are names of settings: {sorted(shared)}.")
        row = {**run.settings, **found}
        self.rows[run.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def __contains__(self, run: Run) -> bool:
        return run.key in self.rows

    def __getitem__(self, run: Run) -> Row:
        return self.rows[run.key]

    def get(self, run: Run) -> Row | None:
        """The row of a run, None where it is missing."""
        return self.rows.get(run.key)


def complete(
    runs: Iterable[Run], results: Results, execute: Callable[[Run], Row], *, processes: int = 1, title: str = ""
) -> None:
    """Execute what is missing, in order, and report progress.

    Args:
        runs: All runs that are wanted.
        results: What is there already, and where new rows go.
        execute: From a run to what it found; picklable where there are several processes.
        processes: Number of processes.
        title: Shown with the progress.
    """
    missing = list(dict.fromkeys(run for run in runs if run not in results))
    start = time.monotonic()
    for done, (run, found) in enumerate(_execute(missing, execute, processes), start=1):
        results.add(run, found)
        _show(title, done, len(missing), time.monotonic() - start)


def _execute(runs: list[Run], execute: Callable[[Run], Row], processes: int) -> Iterator[tuple[Run, Row]]:
    if processes <= 1:
        yield from ((run, execute(run)) for run in runs)
        return
    # Spawned: forked children of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as executor:
        futures = {executor.submit(execute, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _show(title: str, done: int, total: int, seconds: float) -> None:
    """One line, rewritten on a terminal; in a log, twenty lines in all."""
    left = seconds / done * (total - done) / 60
    line = f"{title}: {done}/{total} runs, {seconds / done:.1f} s each, {left:.0f} min left"
    if sys.stderr.isatty():
        print(f"\r{line}  ", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 20) == 0:
        print(line, file=sys.stderr, flush=True)
