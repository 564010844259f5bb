"""The methods that are compared on real checkpoints, with the grids that tune them: twelve candidates each."""

from __future__ import annotations

from functools import partial

from benchmarks.evidence import couplings, losses
from benchmarks.evidence.methods import TRANSPORT, Method

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
#: The first is that of all methods; methods without a weight of their own choose between three.
WEIGHT_DECAYS = {"images": (0.05, 0.5, 0.005), "texts": (0.01, 0.1, 0.001), "fine-tuning": (0.01, 0.1, 0.001)}
#: Penalties of a ridge head on frozen features, relative to the number of samples.
RIDGE = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)

#: Weights of distillation alone, and the weight that it has beside another term.
DISTILLATION, BESIDE = (0.25, 1.0, 4.0), 1.0
#: What the references in tables are: plain training, and the method with which each other one is compared.
PLAIN, DEFAULT, ORTHOGONAL = "plain", "transport", "orthogonal"
#: Controls of our methods: the same with a coupling that no solve decides.
CONTROLS = {
    "transport": "random",
    "orthogonal": "random-orthogonal",
    "transport+kd": "random+kd",
    "orthogonal+kd": "random-orthogonal+kd",
}


_BOTH = ("scratch", "copied")


def _ours(label: str, plan: str, *, distils: bool, control: bool = False) -> Method:
    """Transfer with the library's own layers. Its weight is tuned, also where distillation stands beside it."""
    return Method(
        f"{label} + distillation" if distils else label,
        transfer={"plan": plan, "distillation": BESIDE} if distils else {"plan": plan},
        weights=TRANSPORT,
        settings=_BOTH,
        ours=not control,
        control=control,
    )


METHODS = {
    PLAIN: Method("plain", settings=_BOTH),
    "kd": Method(
        "distillation of logits alone",
        transfer={"weight": 0.0},
        weights=DISTILLATION,
        settings=_BOTH,
        distillation=True,
    ),
    "fitnets": Method("FitNets, blocks", losses.HintBlocks, weights=(1.0, 4.0, 16.0), settings=_BOTH),
    "cka": Method("CKA, blocks", losses.CenteredKernelAlignment, weights=TRANSPORT, settings=_BOTH),
    "attention": Method("attention transfer", losses.AttentionTransfer, weights=(25.0, 100.0, 400.0), settings=_BOTH),
    "l2-sp": Method("L2-SP", l2_sp=True, weights=(0.01, 0.1, 1.0), settings=("copied",)),
    DEFAULT: _ours("transport (default)", "sinkhorn", distils=False),
    ORTHOGONAL: _ours("orthogonal", "orthogonal", distils=False),
    "random": _ours("random assignment", "random", distils=False, control=True),
    "random-orthogonal": _ours("random rotation", "random_orthogonal", distils=False, control=True),
    "transport+kd": _ours("transport", "sinkhorn", distils=True),
    "orthogonal+kd": _ours("orthogonal", "orthogonal", distils=True),
    "random+kd": _ours("random assignment", "random", distils=True, control=True),
    "random-orthogonal+kd": _ours("random rotation", "random_orthogonal", distils=True, control=True),
    "frozen": Method("frozen teacher, ridge head", freeze=True, weights=RIDGE, settings=_BOTH),
    # What CKA may owe its lead on texts to: `benchmarks.real.variants` compares them; they are in no cell.
    "correlated": Method("CKA as a coupling, standardised", couplings.Correlated, weights=TRANSPORT, settings=()),
    "correlated-raw": Method(
        "CKA as a coupling, raw", partial(couplings.Correlated, power=0.0), weights=TRANSPORT, settings=()
    ),
    "rotated": Method("orthogonal, raw", partial(couplings.Orthogonal, power=0.0), weights=TRANSPORT, settings=()),
    "linear": Method("linear regression of the teacher", couplings.LinearRegression, weights=TRANSPORT, settings=()),
}


def methods_of(setting: str) -> tuple[str, ...]:
    """Names of the methods that a setting defines, in the order of tables."""
    return tuple(name for name, method in METHODS.items() if setting in method.settings)


def candidates(name: str, kind: str) -> list[tuple[float, float, float]]:
    """Learning rate, weight decay and weight of each candidate, twelve for every student."""
    method, decays = METHODS[name], WEIGHT_DECAYS[kind]
    if method.freeze:
        return [(0.0, 0.0, penalty) for penalty in method.weights]
    if not method.weights:
        return [(rate, decay, 0.0) for rate in LEARNING_RATES for decay in decays]
    return [(rate, decays[0], weight) for rate in LEARNING_RATES for weight in method.weights]
