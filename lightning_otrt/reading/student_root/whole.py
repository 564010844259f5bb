"""Whether a teacher runs as a whole although a part of it has the name and the type of the student's root."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import LayerSpec
from lightning_otrt.notices import warn
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.student_root.caller import holders, running_holder
from lightning_otrt.reading.student_root.rules import has_names, is_of_same_network
from lightning_otrt.reading.torch_internals import add_forward_hook, add_forward_pre_hook
from lightning_otrt.reading.traced.network_call import NetworkCall

__all__ = ["does_more_than_its_part", "may_run_whole"]


def may_run_whole(layers: LayerSpec, student: NetworkCall, teacher: nn.Module, part: str) -> bool:
    """Whether the inputs of the student's root may be meant for the whole teacher, and not for its part alone.

    They are those of a part where the network around the root runs now, or is of the teacher's type.

    Args:
        layers: What the user passed. Names that only the part has ask for the part.
        student: The call of the root.
        teacher: The teacher.
        part: Name of its part that corresponds to the root.
    """
    if is_of_same_network(student.model, student.root, part, teacher) or not has_names(layers, teacher):
        return False
    return running_holder(holders(student.model, student.root)) is None


def does_more_than_its_part(teacher: NetworkCall, part: str, *, distils: bool) -> bool:
    """Whether a network runs on its inputs, and does more than to call its part with them.

    One that is wrapped, to normalise its inputs or to choose some of its classes, does.

    Args:
        teacher: The call of the whole teacher on the inputs of the student's root.
        part: Name of its part.
        distils: Whether its outputs count, too.
    """
    outputs: list[list[Tensor]] = []
    gets_the_same: list[bool] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gets_the_same.append(_are_equal(all_tensors((args, kwargs)), all_tensors(teacher.inputs)))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append([tensor.clone() for tensor in all_tensors(output)])  # the network may go on in place

    module = named_layers(teacher.model)[part]
    hooks = add_forward_pre_hook(module, before, with_kwargs=True), add_forward_hook(module, after)
    try:
        with in_evaluation(teacher.model, all_tensors(teacher.inputs)):
            args, kwargs = InputGuard(clones=True).copied(teacher.inputs)
            output = teacher.model(*args, **kwargs)
        gives_the_same = not distils or len(outputs) != 1 or _are_equal(outputs[0], all_tensors(output))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        warn(
            f"The teacher ({type(teacher.model).__name__}) failed on what enters the root of the student, so that its "
            f"part {part!r} runs alone, and nothing of its own forward. {type(error).__name__}: {error}. If it takes "
            f"other inputs, make them with `teacher_inputs`. If {part!r} is what should run, pass that as the teacher."
        )
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return gets_the_same != [True] or not gives_the_same


def _are_equal(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(map(torch.equal, some, others))
