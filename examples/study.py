"""What the examples with real checkpoints share: their command line, and runs that go on where they were stopped."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, RandomSampler

from examples import report
from examples.files import whole

#: A run saves itself at the end of each of so many epochs, whatever the size of the data.
EPOCHS = 5
QUICK_STEPS = 10
#: What a run is measured by: from the trained module and the test set to a number.
Measure = Callable[[pl.LightningModule, Dataset[Any]], float]


@dataclass(frozen=True)
class Study:
    """The command line, and the runs behind it.

    Attributes:
        data: What the user named, or None.
        output: Folder of results, checkpoints and the figure.
        per_class: Labelled samples of each class; 0 takes all.
        seeds: Number of paired runs.
        steps: Steps of a run.
        batch_size: Samples of a step.
        workers: Processes that load data.
        quick: Whether to take a few steps of one seed only.
    """

    data: Path | None
    output: Path
    per_class: int
    seeds: int
    steps: int
    batch_size: int
    workers: int
    quick: bool

    @property
    def figure(self) -> Path:
        """Where the figure goes."""
        return self.output / "figure.png"

    def compare(
        self,
        data: Path,
        build: Callable[[], pl.LightningModule],
        draw: Callable[[int], tuple[Dataset[Any], Dataset[Any]]],
        methods: Mapping[str, Callable[[], list[pl.Callback]]],
        measures: Mapping[str, Measure],
    ) -> dict[str, report.Accuracies]:
        """Trains with each method on the same samples and from the same initial weights.

        Args:
            data: Where the data are; it tells results apart.
            build: Makes the module that is trained.
            draw: Makes the training set and the test set of a seed.
            methods: Makes the callbacks of a run, by the name of the method.
            measures: What is measured behind each run, by name.

        Returns:
            For each measure the values of each method, one a seed.
        """
        found: dict[str, report.Accuracies] = {name: {method: [] for method in methods} for name in measures}
        for seed in range(self.seeds):
            train, test = draw(seed)
            for method, callbacks in methods.items():
                values = self._run(seed, method, data, build, train, test, callbacks, measures)
                for name in measures:
                    found[name][method].append(values[name])
        return found

    def _run(
        self,
        seed: int,
        method: str,
        data: Path,
        build: Callable[[], pl.LightningModule],
        train: Dataset[Any],
        test: Dataset[Any],
        callbacks: Callable[[], list[pl.Callback]],
        measures: Mapping[str, Measure],
    ) -> dict[str, float]:
        # All that decides about the result is part of the name: runs with other settings are other runs.
        size = f"{self.per_class} a class, {self.steps} steps of {self.batch_size}"
        name = f"{data.resolve()}, {size}, {method}, seed {seed}"
        path = self.output / "results.json"
        results: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
        if name in results:
            print(f"Seed {seed + 1}, {method}: taken from {path}. Delete that file where data or code have changed.")
            return results[name]
        folder = self.output / "runs" / hashlib.sha256(name.encode()).hexdigest()[:16]
        pl.seed_everything(seed, verbose=False)
        module = build()
        trainer = pl.Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=EPOCHS,
            logger=False,
            enable_model_summary=False,
            callbacks=[
                report.LabelledProgressBar(f"seed {seed + 1}/{self.seeds}, {method}", leave=False),
                ModelCheckpoint(folder, filename="last", enable_version_counter=False),
                _RandomNumbers(),
                *callbacks(),
            ],
        )
        last = folder / "last.ckpt"
        trainer.fit(module, self._batches(train), ckpt_path=last if last.exists() else None)
        results[name] = {name: measure(module, test) for name, measure in measures.items()}
        with whole(path) as part:
            part.write_text(json.dumps(results, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # else a later run of that name would go on with it, at its end
        return results[name]

    def _batches(self, data: Dataset[Any]) -> DataLoader[Any]:
        # Epochs of equally many steps, in which each sample is seen equally often.
        sampler = RandomSampler(data, num_samples=self.batch_size * max(1, self.steps // EPOCHS))  # type: ignore[arg-type]
        return DataLoader(data, self.batch_size, sampler=sampler, num_workers=self.workers)


class _RandomNumbers(pl.Callback):
    """A run that goes on draws what it would have drawn, so that all methods have the same batches."""

    def state_dict(self) -> dict[str, Any]:
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "devices": devices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["cpu"])
        if state_dict["devices"]:
            torch.cuda.set_rng_state_all(state_dict["devices"])


def study(description: str | None, name: str, data: str, *, steps: int) -> Study:
    """Reads the command line, and silences what would disturb the progress bars.

    Args:
        description: What the example does.
        name: Its name, and that of its folder under ``outputs``.
        data: What ``--data`` names.
        steps: Steps of a run, unless the command line says otherwise.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--output", type=Path, default=Path("outputs") / name, help="folder of results and the figure")
    parser.add_argument("--per-class", type=int, default=20, help="labelled samples of each class, 0 for all")
    parser.add_argument("--seeds", type=int, default=3, help="number of paired runs")
    parser.add_argument("--steps", type=int, default=steps, help="steps of a run")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of a step")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, to see that everything runs")
    found = vars(parser.parse_args())
    for name, least in {"per_class": 0, "seeds": 1, "steps": EPOCHS, "batch_size": 2, "workers": 0}.items():
        if found[name] < least:
            parser.error(f"--{name.replace('_', '-')} {found[name]}: at least {least}.")
    if found["data"] and not found["data"].exists():
        parser.error(f"There is no {found['data']}.")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*LeafSpec.*is deprecated", ".*exists and is not empty"):
        warnings.filterwarnings("ignore", message=message)
    if found["quick"]:
        found |= {"steps": QUICK_STEPS, "seeds": 1}
    found["output"].mkdir(parents=True, exist_ok=True)
    return Study(**found)


def installed(load: Callable[[], Any]) -> Any:
    """What a loader gives; where a package is missing, the program ends with what to install."""
    try:
        return load()
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from None


def accuracy(module: pl.LightningModule, test: Dataset[Any]) -> float:
    """Test accuracy in percent."""
    trainer = pl.Trainer(
        accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    return 100 * trainer.test(module, DataLoader(test, 128), verbose=False)[0]["test/accuracy"]


def show(options: Study, title: str, results: Mapping[str, report.Accuracies]) -> None:
    """Prints a table for each measure, and saves a figure with a panel for each."""
    title = f"{title}, {options.per_class or 'all'} labels per class"
    for measure, values in results.items():
        report.print_table(title, values, measure)
    panels = {title if measure == next(iter(results)) else measure: values for measure, values in results.items()}
    report.save_figure(options.figure, panels, measures=dict(zip(panels, results, strict=True)))
