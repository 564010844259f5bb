"""The methods that are compared on real checkpoints, with the grids that tune them: six candidates each."""

from __future__ import annotations

from benchmarks.evidence import losses
from benchmarks.evidence.methods import Method

#: Learning rates and weight decay; methods without a weight of their own choose between two decays instead.
LEARNING_RATES = {"images": (1e-3, 3e-3, 1e-2), "texts": (3e-4, 1e-3, 3e-3), "fine-tuning": (3e-4, 1e-3, 3e-3)}
WEIGHT_DECAYS = {"images": (0.05, 0.5), "texts": (0.01, 0.1), "fine-tuning": (0.01, 0.1)}
#: Penalties of a ridge head on frozen features, relative to the number of samples.
RIDGE = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)

TRANSPORT = (2.0, 8.0)
DISTILLATION = (1.0, 4.0)
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
    """Transfer with the library's own layers; with distillation its weight is tuned and that of the term is 8."""
    if distils:
        return Method(
            f"{label} + distillation",
            transfer={"plan": plan, "weight": 8.0},
            weights=DISTILLATION,
            settings=_BOTH,
            distillation=True,
            ours=not control,
            control=control,
        )
    return Method(label, transfer={"plan": plan}, weights=TRANSPORT, settings=_BOTH, ours=not control, control=control)


METHODS = {
    PLAIN: Method("plain", settings=_BOTH),
    "kd": Method(
        "distillation of logits alone",
        transfer={"weight": 0.0},
        weights=DISTILLATION,
        settings=_BOTH,
        distillation=True,
    ),
    "fitnets": Method("FitNets, blocks", losses.HintBlocks, weights=(4.0, 16.0), settings=_BOTH),
    "cka": Method("CKA, blocks", losses.CenteredKernelAlignment, weights=(2.0, 8.0), settings=_BOTH),
    "attention": Method("attention transfer", losses.AttentionTransfer, weights=(25.0, 100.0), settings=_BOTH),
    "l2-sp": Method("L2-SP", l2_sp=True, weights=(0.01, 0.1), settings=("copied",)),
    DEFAULT: _ours("transport (default)", "sinkhorn", distils=False),
    ORTHOGONAL: _ours("orthogonal", "orthogonal", distils=False),
    "random": _ours("random assignment", "random", distils=False, control=True),
    "random-orthogonal": _ours("random rotation", "random_orthogonal", distils=False, control=True),
    "transport+kd": _ours("transport", "sinkhorn", distils=True),
    "orthogonal+kd": _ours("orthogonal", "orthogonal", distils=True),
    "random+kd": _ours("random assignment", "random", distils=True, control=True),
    "random-orthogonal+kd": _ours("random rotation", "random_orthogonal", distils=True, control=True),
    "frozen": Method("frozen teacher, ridge head", freeze=True, weights=RIDGE, settings=_BOTH),
}


def methods_of(setting: str) -> tuple[str, ...]:
    """Names of the methods that a setting defines, in the order of tables."""
    return tuple(name for name, method in METHODS.items() if setting in method.settings)


def candidates(name: str, kind: str) -> list[tuple[float, float, float]]:
    """Learning rate, weight decay and weight of each candidate, six for every method."""
    method, rates, decays = METHODS[name], LEARNING_RATES[kind], WEIGHT_DECAYS[kind]
    if method.freeze:
        return [(0.0, 0.0, penalty) for penalty in method.weights]
    if not method.weights:
        return [(rate, decay, 0.0) for rate in rates for decay in decays]
    return [(rate, decays[0], weight) for rate in rates for weight in method.weights]
