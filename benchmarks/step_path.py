"""The path of one training step: which functions of the package run, in which modules, and who calls whom.

``python -m benchmarks.step_path`` trains a small network with :class:`lightning_otrt.OTRTCallback` in a Trainer and
counts two of its steps, one between two solves of the transport plans and one with a solve. ``--tree`` also prints the
calls of the first of them as a tree. It counts the ``lightning_otrt`` that comes first in ``PYTHONPATH``, so two
versions can be compared.

What is counted, from the start of ``on_train_batch_start`` to the end of ``on_train_batch_end`` of the callback:

- *functions*: distinct functions of the package that run. In brackets also comprehensions and generator expressions,
  where Python runs them as functions (from Python 3.12 on only the latter).
- *modules*: the files of the package that these functions are in.
- *moves*: calls from one file to another, each time they happen. The caller of a function is the innermost function of
  the package that is running, also where code of torch or Lightning lies in between, as for a hook.
- *between floors*: those moves that go from one folder of the package to another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lightning_otrt
from lightning_otrt import OTRTCallback

PACKAGE = Path(lightning_otrt.__file__).parent
#: Calls of the term after which plans are solved: 0, 1, 2, 4, 8, then every tenth.
STEPS = {5: "between two solves", 8: "with a solve"}
WIDTHS = {"student": 8, "teacher": 16}


@dataclass
class Call:
    """A function of the package that runs, with the functions of the package that it calls, in order."""

    code: CodeType
    calls: list[Call] = field(default_factory=list)

    @property
    def module(self) -> str:
        """The module, relative to the package."""
        return ".".join(Path(self.code.co_filename).relative_to(PACKAGE).with_suffix("").parts)

    @property
    def floor(self) -> str:
        """The folder that the module is in; a module outside of folders is its own."""
        return self.module.partition(".")[0]

    @property
    def is_comprehension(self) -> bool:
        """Whether it is a comprehension or a generator expression."""
        return self.code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")

    @property
    def title(self) -> str:
        """Module and name, with the classes that the function is defined in (from Python 3.11 on)."""
        return f"{self.module}: {getattr(self.code, 'co_qualname', self.code.co_name)}"

    def walk(self) -> Iterator[Call]:
        """This call and all below it."""
        yield self
        for call in self.calls:
            yield from call.walk()

    def moves(self) -> Iterator[tuple[Call, Call]]:
        """Callers with what they call in another file."""
        for caller in self.walk():
            yield from ((caller, call) for call in caller.calls if call.module != caller.module)

    def lines(self, depth: int = 0) -> list[str]:
        """The tree of calls. Comprehensions are left out, and what they call is shown below their function."""
        below = depth if self.is_comprehension else depth + 1
        own = [] if self.is_comprehension else [f"{'  ' * depth}{self.title}"]
        return own + joined([call.lines(below) for call in self.calls])


def joined(trees: list[list[str]]) -> list[str]:
    """The lines of all trees; those that are equal and follow each other are shown once."""
    found: list[tuple[list[str], int]] = []
    for lines in trees:
        if found and found[-1][0] == lines:
            found[-1] = lines, found[-1][1] + 1
        elif lines:
            found.append((lines, 1))
    return [
        f"{line} ({count} times)" if count > 1 and not index else line
        for lines, count in found
        for index, line in enumerate(lines)
    ]


class Profiler:
    """Builds the trees of calls between :meth:`start` and :meth:`stop`, in this thread."""

    def __init__(self) -> None:
        #: What code outside of the package calls.
        self.calls: list[Call] = []
        self._running: list[tuple[FrameType, Call]] = []
        self._known: dict[FrameType, Call] = {}

    def start(self) -> None:
        """Begin."""
        sys.setprofile(self._on_event)

    def stop(self) -> None:
        """End, and let go of all frames."""
        sys.setprofile(None)
        self._running, self._known = [], {}

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and self._running and self._running[-1][0] is frame:
            self._running.pop()
        if event != "call" or PACKAGE not in Path(frame.f_code.co_filename).parents:
            return
        call = self._known.get(frame)
        if call is None:
            call = self._known[frame] = Call(frame.f_code)
            (self._running[-1][1].calls if self._running else self.calls).append(call)
        # Else a generator is resumed, such as a context manager at the end of its block: no new call.
        self._running.append((frame, call))


class Task(pl.LightningModule):
    """Classification, as in the README."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(WIDTHS["student"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def network(width: int) -> nn.Sequential:
    """Two blocks of convolutions, which make two pairs of layers, and a head."""
    blocks = [
        nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
        for inputs, outputs in ((3, width), (width, 2 * width))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


class Start(pl.Callback):
    """The first callback: begins to profile."""

    def __init__(self, steps: dict[int, Profiler]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the hook of the callback that is counted."""
        if batch_idx in self.steps:
            self.steps[batch_idx].start()


class Stop(Start):
    """The last callback: ends it."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the hook of the callback that is counted."""
        if batch_idx in self.steps:
            self.steps[batch_idx].stop()


def profiled_steps() -> dict[int, list[Call]]:
    """The calls of each of :data:`STEPS` in a fit, by the index of the step."""
    torch.manual_seed(0)
    steps = {index: Profiler() for index in STEPS}
    data = TensorDataset(torch.randn(320, 3, 32, 32), torch.randint(10, (320,)))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max(STEPS) + 1,
        callbacks=[Start(steps), OTRTCallback(network(WIDTHS["teacher"])), Stop(steps)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(), DataLoader(data, batch_size=32))
    return {index: profiler.calls for index, profiler in steps.items()}


def counts(step: list[Call]) -> list[str]:
    """The cells of a row of the table."""
    calls = [call for top in step for call in top.walk()]
    functions = {call.code for call in calls}
    own = {call.code for call in calls if not call.is_comprehension}
    moves = [move for top in step for move in top.moves()]
    floors = sum(caller.floor != call.floor for caller, call in moves)
    modules = {call.module for call in calls}
    return [f"{len(own)} ({len(functions)})", str(len(modules)), str(len(moves)), str(floors)]


def main() -> None:
    """Print the table, and the tree where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tree", action="store_true", help="print the calls of the step between two solves")
    arguments = parser.parse_args()
    steps = profiled_steps()
    print("| one training step | functions | modules | moves | between floors |\n|---|---|---|---|---|")
    for index, name in STEPS.items():
        print(f"| {name} | {' | '.join(counts(steps[index]))} |")
    if arguments.tree:
        first = min(STEPS)
        print(f"\nOne training step {STEPS[first]}:\n", *joined([call.lines() for call in steps[first]]), sep="\n")


if __name__ == "__main__":
    main()
