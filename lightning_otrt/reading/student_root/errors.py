"""What is said where the root of the student was not called, or where trained modules run outside of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from torch import nn

from lightning_otrt.layers.names import listed
from lightning_otrt.layers.pairs import LayerSpec

__all__ = ["check_initialised", "logits_outside", "why_before", "why_inside", "why_no_view", "why_outside"]

_listed = partial(listed, at_most=5)
#: Such code cannot be found from the student.
_COMPILED_BEFORE = (
    " If a function that was compiled and ran before calls it, call `torch.compiler.reset()` before the student is "
    "attached: what is compiled already has no hooks in it."
)
#: For plain PyTorch, where `attach` alone records nothing.
_RECORDED = (
    " In a loop of your own it has to be called inside `with transfer.attached(student):`, or after "
    "`transfer.attach(student)` inside `with transfer.recording():`."
)
#: Then nothing is recorded, and the teacher does not run.
_NO_WEIGHT = " If the weight was 0 while it ran, and was set after it: set it before the forward."
_LOGITS = " The distillation of logits takes what the root returns as logits."


def check_initialised(name: str, module: nn.Module) -> None:
    """Check that a module which may be the root has all of its weights: its layers are chosen before it runs.

    Raises:
        ValueError: If it has lazy parameters or buffers.
    """
    tensors = [*module.named_parameters(prefix=name), *module.named_buffers(prefix=name)]
    lazy = [found for found, tensor in tensors if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"The student has lazy parameters that no forward has initialised: {_listed(lazy)}. Run it once on a batch "
            "before it is attached, inside `torch.no_grad()`, and before the optimizer is made."
        )


def why_no_view(student: nn.Module, root: str | None, student_root: str | None, layers: LayerSpec) -> str:
    """Why no forward of the student was recorded.

    Args:
        student: The student.
        root: Name of the root that was found, None before it is found.
        student_root: What the user passed as ``student_root``.
        layers: What the user passed as ``layers``.
    """
    kind = type(student).__name__
    compiled = _COMPILED_BEFORE if "torch._dynamo" in sys.modules else ""
    if root is not None:
        return (
            f"The student ({kind}) was not called with gradient since the last call, so there is no transfer term: "
            f"no forward of its root {root or 'itself'!r} was recorded. Call the module itself (not "
            f"`.forward`), once per loss, outside `no_grad`; or pass the name of what is called as `student_root`."
            f"{_NO_WEIGHT}{_RECORDED}{compiled}"
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        return (
            f"No parameter of the student ({kind}) requires a gradient, so no transfer term can train it. Unfreeze "
            "what is to be trained before the fit."
        )
    where = f"the root {student_root!r}" if student_root else "a module that holds the layers"
    return (
        f"No forward of {where} of the student ({kind}) was recorded, so there is no transfer term for "
        f"layers={layers!r}. It has to be called as a module (not `.forward`), with gradient. Where its parts are "
        "called one after the other, call them in the `forward` of one module, or pass the one that holds the layers "
        f"as `student_root`, such as 'head', or 'net:encode' for a method.{_NO_WEIGHT}{_RECORDED}"
        f"{compiled}"
    )


def why_outside(root: str, outside: Sequence[str], *, distills: bool = False) -> str:
    """The error for trained modules outside the root that was found.

    Args:
        root: Name of the root.
        outside: Names of the modules.
        distills: Whether logits are distilled.
    """
    return (
        f"Layers were chosen inside {root!r}, the first trained module that was called, but other trained modules ran "
        f"with gradient outside of it: {_listed(outside)}. The teacher got the inputs of {root!r} alone, and the term "
        f"cannot reach the others.{_LOGITS if distills else ''} If you want this, pass student_root={root!r}. If a "
        "method is called, such as net.forward_features(x), pass student_root='net:forward_features'. Otherwise call "
        "the module that holds them all."
    )


def why_before(root: str, before: Sequence[str]) -> str:
    """The warning for trained modules that made what enters the root, before it was called."""
    return (
        f"What enters {root or 'the student'!r}, the module whose inputs the teacher gets too, was made by trained "
        f"modules that ran before it: {_listed(before)}. So the teacher gets what these made, and not the inputs of "
        f"the student. If you want this, pass student_root={root!r}. If a method is called, such as net.encode(x), "
        "pass student_root='net:encode'. Otherwise call the module that holds them all, with what enters these, such "
        "as ids in place of embeddings."
    )


def why_inside(root: str, holder: str) -> str:
    """The error for a root that was called by itself when it was found, and later inside of a module around it.

    Args:
        root: Name of the root.
        holder: Name of the module that called it.
    """
    whole = repr(holder) if holder else "the student"
    return (
        f"The distillation takes what {root!r} returns as logits, because it was called by itself in the first step. "
        f"Now it ran inside of {whole}, whose output may be the logits. If so, pass student_root={holder!r}, and leave "
        f"calls of {root!r} alone out by `transfer.paused()` (in a Trainer: `callback.transfer.paused()`). If the "
        f"outputs of {root!r} are the logits, pass student_root={root!r}."
    )


def logits_outside(root: str, outside: Sequence[str]) -> str:
    """The warning for trained modules outside the root that the user named, where logits are distilled."""
    return (
        f"Other trained modules ran with gradient outside of the root {root!r}: {_listed(outside)}.{_LOGITS} If one "
        "of the others makes the logits, name the module that holds them all as `student_root`, or leave out "
        "`distillation`."
    )
