"""What is run: each experiment is a tuning problem, its methods, and the runs that its claims rest on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.evidence.methods import DEFAULT, methods_of
from benchmarks.evidence.runs import Run
from benchmarks.evidence.tuning import Tuning

#: Targets that never decided anything.
FRESH = ("greek", "cyrillic")
SEEDS = 10
#: Of experiments that vary a condition: enough to see an ordering.
FEW_SEEDS = 4
TEACHERS = 3
CURVE = (2, 10, 50, 200)


@dataclass(frozen=True)
class Experiment:
    """A part of the benchmark that can be selected by name.

    Attributes:
        title: Heading of its table.
        tuning: Where hyperparameters are chosen; experiments with equal tuning share it.
        targets: Tasks of the student.
        methods: Their names, in the order of tables.
        per_class: Labelled images of each class; several make a curve.
        seeds: Number of paired runs.
        variants: Named changes of the default's transport options, instead of other methods.
        batch_size: Images of a batch.
        changes: Other fields of all its runs.
    """

    title: str
    tuning: Tuning
    targets: tuple[str, ...]
    methods: tuple[str, ...]
    per_class: tuple[int, ...] = (10,)
    seeds: int = SEEDS
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    def tuned_methods(self) -> list[str]:
        """The methods that need a choice."""
        return list(dict.fromkeys([*self.methods, *([DEFAULT] if self.variants else [])]))

    def run(self, method: str, choice: Run, target: str, per_class: int, seed: int) -> Run:
        """One run with the hyperparameters that were chosen."""
        settings: dict[str, Any] = {
            "method": method,
            "target": target,
            "per_class": per_class,
            "seed": seed,
            "teacher_seed": seed % TEACHERS,
            "split": "test",
        }
        return replace(choice, **(settings | dict(self.changes)))

    def variant(self, name: str, choice: Run, target: str, per_class: int, seed: int) -> Run:
        """One run of the default with changed options; ``run.<field>`` changes the run itself."""
        changed = self.variants[name]
        fields = {key.removeprefix("run."): value for key, value in changed.items() if key.startswith("run.")}
        options = tuple(sorted((key, value) for key, value in changed.items() if not key.startswith("run.")))
        return replace(self.run(DEFAULT, choice, target, per_class, seed), options=options, **fields)

    def runs(self, choices: Mapping[str, Run]) -> list[Run]:
        """All runs, seed by seed: a benchmark that is stopped has whole pairs."""
        return [
            run
            for seed in range(self.seeds)
            for target in self.targets
            for per_class in self.per_class
            for run in (
                *(self.run(method, choices[method], target, per_class, seed) for method in self.methods),
                *(self.variant(name, choices[DEFAULT], target, per_class, seed) for name in self.variants),
            )
        ]


def _methods(setting: str, *, without: Iterable[str] = ()) -> tuple[str, ...]:
    return tuple(name for name in methods_of(setting) if name not in without)


_NEW = Tuning("3")
_SAME = Tuning("2")
#: Transformers learn slowly from few images: with 400 steps all methods, and with 800 a teacher, end half trained. With
#: 1600 the teacher has learnt its images and reaches some 71 % on other fonts, where a convolutional one reaches 95.
_TRANSFORMER = Tuning("3", per_class=48, pair="transformer", steps=800, teacher_steps=1600)
_DIGITS = Tuning("2", target="digits", per_class=5, steps=300, teacher_steps=300)
#: Enough to see an ordering: the baseline, the strongest rivals, the paper's recipe, the default alone and with KD;
#: then the recommended rotation and the default with distillation. Each plan has its control.
_FEW = (
    *("plain", "lwf", "fitnets-blocks", "cka", "random", "ot-penultimate", DEFAULT, "ot-blocks+lwf"),
    *("rotation+distillation", "rotation-random+distillation", f"{DEFAULT}+distillation", "random+distillation"),
)
_FEW_SAME = tuple(name.replace("lwf", "kd") for name in _FEW)
#: The rotation and its control alone, too.
_ROTATION = ("rotation", "rotation-random")
#: Variants of a method that stands beside them, and what is not made for a student that starts with features.
_COPIED = ("fitnets-pooled", "fitnets+lwf", "relational", "crd", "ot-penultimate-memory", "ot-later", "ot-blocks+lwf")
_VALIDATION = {"split": "validation"}
_COUPLINGS = (
    *("orthogonal", "orthogonal-half", "orthogonal-raw", "projection", "projection-raw"),
    *("correlated", "correlated-raw", "linear"),
)

_ABLATIONS: dict[str, dict[str, Any]] = {
    "cost euclidean": {"cost": "euclidean"},
    "cost sqeuclidean": {"cost": "sqeuclidean"},
    **{f"epsilon {epsilon}": {"epsilon": epsilon} for epsilon in (0.003, 0.03, 0.1, 0.3)},
    "exact plan": {"plan": "exact"},
    "uniform plan": {"plan": "uniform"},
    "random plan": {"plan": "random"},
    "static plan": {"plan": "static"},
    **{f"block {block} alone": {"layers": (block,)} for block in range(3)},
    "later blocks": {"layers": ("later blocks",)},
    "penultimate alone": {"layers": "penultimate"},
    "later blocks + penultimate": {"layers": ("later blocks", "penultimate")},
    "blocks + penultimate": {"layers": ("blocks", "penultimate")},
    **{f"grid {grid}": {"grid": grid} for grid in (1, 2, 8, None)},
    **{f"batch {size}": {"run.batch_size": size} for size in (8, 16, 32)},
    **{f"memory {memory}": {"memory": memory} for memory in (0.0, 0.9, 0.98)},
    **{f"solve every {calls}": {"solve_every": calls} for calls in (1, 5, 50)},
}

#: Where the matching of a transformer might matter, each beside a random assignment.
_PLACES: dict[str, dict[str, Any]] = {
    "last block alone": {"layers": (3,)},
    "penultimate alone": {"layers": "penultimate"},
    "attention outputs": {"run.pair": "transformer-attention"},
    "layer norms": {"run.pair": "transformer-norm"},
    "hidden neurons of the MLP": {"run.pair": "transformer-mlp"},
    # Students as wide as the teacher that come with features; gentle, as in settings 1 and 1x.
    "student copied, 400 steps": {"run.setting": "1", "run.steps": 400, "run.lr": 3e-3},
    "student from another network, 400 steps": {"run.setting": "1x", "run.steps": 400, "run.lr": 3e-3},
}
_MATCHING: dict[str, dict[str, Any]] = {
    "random plan": {"plan": "random"},
    "exact plan": {"plan": "exact"},
    "uniform plan": {"plan": "uniform"},
    "static plan": {"plan": "static"},
    "cost euclidean": {"cost": "euclidean"},
    "memory 0.98": {"memory": 0.98},
    **{
        f"{place}{control}": {**change, **options}
        for place, change in _PLACES.items()
        for control, options in {"": {}, ", random plan": {"plan": "random"}}.items()
    },
    **{f"{place}, identity": {**_PLACES[place], "plan": "identity"} for place in list(_PLACES)[-2:]},
}

EXPERIMENTS: dict[str, Experiment] = {
    "main": Experiment("Setting 3: smaller student, new task, 10 labels per class", _NEW, FRESH, _methods("3")),
    "digits": Experiment(
        "Setting 2: compression, handwritten digits, 5 labels per class", _DIGITS, ("digits",), _methods("2"), (5,)
    ),
    "compression": Experiment(
        "Setting 2: compression, A–Z and 0–9, 10 labels per class", _SAME, ("source",), _methods("2")
    ),
    "curve": Experiment("Labels per class, setting 3", _NEW, FRESH, (*_FEW, *_ROTATION), CURVE, FEW_SEEDS),
    "curve-compression": Experiment(
        "Labels per class, setting 2", _SAME, ("source",), (*_FEW_SAME, *_ROTATION), CURVE, FEW_SEEDS
    ),
    "copied": Experiment(
        "Setting 1: student copied from the teacher, 10 labels per class, 200 steps",
        Tuning("1", steps=200),
        FRESH,
        _methods("1", without=_COPIED),
        seeds=6,
    ),
    "other": Experiment(
        "Setting 1x: student copied from another network, 10 labels per class, 200 steps",
        Tuning("1x", steps=200),
        FRESH,
        _methods("1x", without=_COPIED),
        seeds=6,
    ),
    "pool": Experiment(
        "Setting 3 with an unlabelled pool, 5 labels per class",
        Tuning("3", per_class=5, pool=True),
        ("greek",),
        (*_FEW, *_ROTATION, "ot-later"),
        (5,),
        FEW_SEEDS,
    ),
    "pool-digits": Experiment(
        "Setting 2 with an unlabelled pool, handwritten digits, 5 labels per class",
        replace(_DIGITS, pool=True),
        ("digits",),
        (*_FEW_SAME, "ot-later"),
        (5,),
    ),
    "full": Experiment(
        "Setting 3, all labels (200 per class), 800 steps",
        Tuning("3", per_class=200, steps=800),
        ("greek",),
        _FEW,
        (200,),
        FEW_SEEDS,
    ),
    "weight": Experiment(
        "Weight of the term, a–z validation",
        _NEW,
        ("lowercase",),
        (),
        variants={f"{weight:g}": {"run.weight": weight} for weight in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)},
        changes=_VALIDATION,
    ),
    **{
        f"weight-{name}": Experiment(
            f"Weight of the term where the student starts with features of {whose}, a–z validation",
            Tuning(setting, steps=200),
            ("lowercase",),
            (),
            seeds=FEW_SEEDS,
            variants={f"{weight:g}": {"run.weight": weight} for weight in (2.0, 8.0, 32.0, 128.0, 512.0)},
            changes=_VALIDATION,
        )
        for name, setting, whose in (("copied", "1", "its teacher"), ("other", "1x", "another network"))
    },
    "couplings": Experiment(
        "Couplings, a–z validation",
        _NEW,
        ("lowercase",),
        (*_COUPLINGS, "random", "fitnets-pooled", "cka", DEFAULT),
        seeds=FEW_SEEDS,
        changes=_VALIDATION,
    ),
    "ablations": Experiment(
        "Ablations of the default, a–z validation",
        _NEW,
        ("lowercase",),
        (DEFAULT,),
        variants=_ABLATIONS,
        changes=_VALIDATION,
    ),
    "wide": Experiment(
        "A wider pair, 64-128-256 → 16-32-64",
        _NEW,
        ("greek",),
        (*_FEW, *_ROTATION),
        seeds=FEW_SEEDS,
        changes={"pair": "wide"},
    ),
    "residual": Experiment(
        "A residual pair, ResNet-20 → ResNet-8",
        _NEW,
        ("greek",),
        (*_FEW, *_ROTATION),
        seeds=FEW_SEEDS,
        changes={"pair": "residual"},
    ),
    "transformer": Experiment(
        "A small transformer pair, 48 labels per class, 800 steps",
        _TRANSFORMER,
        ("greek",),
        (*_FEW, *_ROTATION),
        (48,),
        FEW_SEEDS,
    ),
    # Chosen by `transformer-matching`, on a–z; each method matches these layers instead of the blocks.
    "transformer-mlp": Experiment(
        "The transformer pair, compared at the hidden neurons of each MLP, 48 labels per class, 800 steps",
        _TRANSFORMER,
        ("greek",),
        ("fitnets-blocks", "cka", "random", DEFAULT, "ot-blocks+lwf"),
        (48,),
        FEW_SEEDS,
        changes={"pair": "transformer-mlp"},
    ),
    "transformer-matching": Experiment(
        "Does the matching matter for transformers? a–z validation, 48 labels per class, 800 steps",
        _TRANSFORMER,
        ("lowercase",),
        (DEFAULT,),
        (48,),
        FEW_SEEDS,
        variants=_MATCHING,
        changes=_VALIDATION,
    ),
    "longer": Experiment("Four times as many steps", _NEW, ("greek",), _FEW, seeds=FEW_SEEDS, changes={"steps": 1600}),
    "distance": Experiment("Other domains", _NEW, ("armenian", "georgian", "digits"), _FEW, seeds=FEW_SEEDS),
    **{
        f"plans-{setting}": Experiment(
            f"Plans over training, setting {setting}",
            Tuning(setting, steps=200 if setting == "1x" else 400),
            ("greek",),
            (DEFAULT,),
            seeds=1,
            changes={"keep_plans": True},
        )
        for setting in ("1", "1x", "3")
    },
}


def quick(experiment: Experiment) -> Experiment:
    """A tenth of the steps, two seeds, few methods: to see that everything runs, not to claim anything."""
    tuning = experiment.tuning
    short = replace(tuning, steps=tuning.steps // 10, teacher_steps=tuning.teacher_steps // 10)
    chosen = tuple(name for name in experiment.methods if name in ("plain", "fitnets", "random", DEFAULT))
    return replace(experiment, tuning=short, methods=chosen, seeds=min(2, experiment.seeds))


#: What ``--quick`` runs.
QUICK = ("main", "digits", "copied", "pool", "plans-1")
