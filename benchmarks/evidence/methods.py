"""The methods that are compared, with the grids that tune them: nine candidates each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from benchmarks.evidence import couplings, losses
from benchmarks.evidence.networks import Features

ALL = ("1", "1x", "2", "3")
COPIED = ("1", "1x")

#: Learning rate and weight decay. From scratch: that of the examples, and larger ones; from another network: gentle.
OPTIMISERS = {
    "scratch": ((3e-2, 1.0), (3e-1, 0.3), (1.0, 0.03)),
    "copied": ((1e-2, 0.1), (3e-3, 1e-2), (1e-3, 1e-2)),
    "transformer": ((3e-2, 0.1), (1e-2, 0.1), (3e-3, 0.1)),
}
#: Methods without a weight choose among more optimisers, so that each method has as many candidates.
WIDE_OPTIMISERS = {
    "scratch": (
        (3e-2, 1.0),
        (1e-1, 1.0),
        *((3e-1, decay) for decay in (0.1, 0.3)),
        *((1.0, decay) for decay in (0.01, 0.03, 0.1)),
        *((3.0, decay) for decay in (0.003, 0.01)),
    ),
    "copied": tuple((lr, decay) for lr in (1e-2, 3e-3, 1e-3) for decay in (1e-2, 1e-1, 1.0)),
    "transformer": tuple((lr, decay) for lr in (3e-2, 1e-2, 3e-3) for decay in (1e-2, 1e-1, 1.0)),
}


@dataclass(frozen=True)
class Method:
    """A way to train a student.

    Attributes:
        label: Its name in tables.
        loss: Makes the loss of a rival from the representations of one batch.
        transfer: Options of :class:`lightning_otrt.RepresentationTransfer`, beside its weight.
        weights: Candidates for the weight of the loss or, where there is none, of the transfer term.
        settings: Where it is defined.
        l2_sp: Penalise the distance to the starting point.
        freeze: Train the head alone.
        hints: Weight of hints on pooled blocks, beside the loss.
        distillation: Whether the weight is that of the library's distillation of logits, beside the transfer term.
        ours: Whether it uses this library with a plan that is solved.
        control: Whether its plan is drawn at random, to tell whether the matching matters.
    """

    label: str
    loss: Callable[[Features, Features], nn.Module] | None = None
    transfer: Mapping[str, Any] | None = None
    weights: tuple[float, ...] = ()
    settings: tuple[str, ...] = ALL
    l2_sp: bool = False
    freeze: bool = False
    hints: float = 0.0
    distillation: bool = False
    ours: bool = False
    control: bool = False

    @property
    def uses_teacher(self) -> bool:
        """Whether a term compares the student with a teacher."""
        return self.loss is not None or self.transfer is not None


BLOCKS = {"layers": "blocks"}
PENULTIMATE = {"layers": "penultimate", "cost": "euclidean"}
#: Candidates of all transport terms; 32 is the default of the library.
TRANSPORT = (2.0, 8.0, 32.0)
DEFAULT = "ot-blocks"

METHODS = {
    "plain": Method("plain"),
    "l2-sp": Method("L2-SP", l2_sp=True, weights=(0.01, 0.1, 1.0), settings=COPIED),
    "frozen": Method("frozen features", freeze=True, settings=COPIED),
    "kd": Method("KD on logits", losses.SoftTargets, weights=(0.25, 1.0, 4.0), settings=("2",)),
    "lwf": Method(
        "KD on logits (LwF)",
        losses.LearningWithoutForgetting,
        weights=(0.25, 1.0, 4.0),
        settings=("1", "1x", "3"),
    ),
    "fitnets": Method("FitNets, penultimate", losses.HintPenultimate, weights=(1.0, 4.0, 16.0)),
    "fitnets-blocks": Method("FitNets, blocks", losses.HintBlocks, weights=(1.0, 4.0, 16.0)),
    "fitnets-pooled": Method(
        "FitNets, blocks pooled to 4×4", partial(losses.HintBlocks, grid=4), weights=(1.0, 4.0, 16.0)
    ),
    "fitnets+kd": Method(
        "FitNets, blocks pooled to 4×4, with KD on logits",
        losses.SoftTargets,
        weights=(0.25, 1.0, 4.0),
        settings=("2",),
        hints=16.0,
    ),
    "fitnets+lwf": Method(
        "FitNets, blocks pooled to 4×4, with KD on logits (LwF)",
        losses.LearningWithoutForgetting,
        weights=(0.25, 1.0, 4.0),
        settings=("1", "1x", "3"),
        hints=16.0,
    ),
    "attention": Method("attention transfer", losses.AttentionTransfer, weights=(250.0, 1000.0, 4000.0)),
    "similarity": Method("similarity-preserving", losses.SimilarityPreserving, weights=(750.0, 3000.0, 12000.0)),
    "relational": Method("relational KD", losses.RelationalDistillation, weights=(6.0, 25.0, 100.0)),
    "cka": Method("CKA, blocks", losses.CenteredKernelAlignment, weights=(2.0, 8.0, 32.0)),
    "crd": Method("CRD", losses.ContrastiveDistillation, weights=(0.25, 1.0, 4.0)),
    "identity": Method(
        "identity matching", transfer={**BLOCKS, "plan": "identity"}, weights=TRANSPORT, settings=COPIED
    ),
    "random": Method("random fixed assignment", transfer={**BLOCKS, "plan": "random"}, weights=TRANSPORT, control=True),
    "ot-penultimate": Method(
        "OT, penultimate, Euclidean (the paper)", transfer={**PENULTIMATE, "memory": 0.0}, weights=TRANSPORT, ours=True
    ),
    "ot-penultimate-memory": Method(
        "OT, penultimate, running cost", transfer={**PENULTIMATE, "memory": 0.98}, weights=TRANSPORT, ours=True
    ),
    DEFAULT: Method("OT, blocks (default)", transfer=BLOCKS, weights=TRANSPORT, ours=True),
    "ot-later": Method(
        "OT, later blocks + penultimate",
        transfer={"layers": ["later blocks", "penultimate"]},
        weights=TRANSPORT,
        ours=True,
    ),
    "ot-blocks+kd": Method(
        "OT, blocks, with KD on logits",
        losses.SoftTargets,
        transfer={**BLOCKS, "weight": 8.0},
        weights=(0.25, 1.0, 4.0),
        settings=("2",),
        ours=True,
    ),
    "ot-blocks+lwf": Method(
        "OT, blocks, with KD on logits (LwF)",
        losses.LearningWithoutForgetting,
        transfer={**BLOCKS, "weight": 8.0},
        weights=(0.25, 1.0, 4.0),
        settings=("1", "1x", "3"),
        ours=True,
    ),
    "rotation": Method("orthogonal, blocks", transfer={**BLOCKS, "plan": "orthogonal"}, weights=TRANSPORT, ours=True),
    "rotation-random": Method(
        "random projection, blocks", transfer={**BLOCKS, "plan": "random_orthogonal"}, weights=TRANSPORT, control=True
    ),
    # The recipes in one argument, and their controls: `distillation` of the library, beside a term of weight 8.
    **{
        f"{name}+distillation": Method(
            f"{label}, with distillation",
            transfer={**BLOCKS, "plan": plan, "weight": 8.0},
            weights=(0.25, 1.0, 4.0),
            distillation=True,
            ours=not plan.startswith("random"),
            control=plan.startswith("random"),
        )
        for name, label, plan in (
            (DEFAULT, "OT, blocks", "sinkhorn"),
            ("random", "random fixed assignment", "random"),
            ("rotation", "orthogonal, blocks", "orthogonal"),
            ("rotation-random", "random projection, blocks", "random_orthogonal"),
        )
    },
    # Prototypes, which `couplings` compares on validation fonts; they are in no table of fresh targets.
    "orthogonal": Method("orthogonal, standardised", couplings.Orthogonal, weights=TRANSPORT, settings=()),
    "orthogonal-half": Method(
        "orthogonal, power ½", partial(couplings.Orthogonal, power=0.5), weights=TRANSPORT, settings=()
    ),
    "orthogonal-raw": Method(
        "orthogonal, raw", partial(couplings.Orthogonal, power=0.0), weights=TRANSPORT, settings=()
    ),
    "projection": Method("random fixed projection", couplings.RandomProjection, weights=TRANSPORT, settings=()),
    "projection-raw": Method(
        "random fixed projection, raw", partial(couplings.RandomProjection, power=0.0), weights=TRANSPORT, settings=()
    ),
    "correlated": Method(
        "cross-correlation, standardised (CKA as a coupling)", couplings.Correlated, weights=TRANSPORT, settings=()
    ),
    "correlated-raw": Method(
        "cross-correlation, raw (CKA as a coupling)",
        partial(couplings.Correlated, power=0.0),
        weights=TRANSPORT,
        settings=(),
    ),
    "linear": Method("linear regression", couplings.LinearRegression, weights=TRANSPORT, settings=()),
}


def methods_of(setting: str) -> list[str]:
    """Names of the methods that a setting defines."""
    return [name for name, method in METHODS.items() if setting in method.settings]


def candidates(name: str, setting: str, pair: str = "conv") -> list[tuple[float, float, float]]:
    """Learning rate, weight decay and weight of each candidate, nine for every method."""
    start = "transformer" if pair == "transformer" else "copied" if setting in COPIED else "scratch"
    weights = METHODS[name].weights
    if not weights:
        return [(*optimiser, 0.0) for optimiser in WIDE_OPTIMISERS[start]]
    return [(*optimiser, weight) for optimiser in OPTIMISERS[start] for weight in weights]
