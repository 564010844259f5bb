"""The root of a student, whose inputs the teacher gets too, and the part of the teacher that runs on them."""

from __future__ import annotations

from torch import nn

from lightning_otrt.layers.grammar import only_words
from lightning_otrt.layers.lookup import LayerNames, check_names
from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import LayerSpec

__all__ = ["can_be_root", "find_teacher_root", "split_root"]


def can_be_root(name: str, layers: LayerSpec, student: nn.Module, teacher: nn.Module) -> bool:
    """Whether the teacher may get the inputs of this module: it is trained and holds all layers that are named."""
    modules = named_layers(student)
    module = modules[name]
    if not any(parameter.requires_grad for parameter in module.parameters()) or next(module.children(), None) is None:
        return False
    # By the modules themselves, since one that is registered twice has two names.
    held = {id(inner) for inner in module.modules()}
    inside = LayerNames("student", tuple(known for known, inner in modules.items() if id(inner) in held), name)
    try:
        check_names(layers, inside, LayerNames("teacher", tuple(named_layers(teacher))))
    except ValueError:
        return False
    return True


def split_root(root: str | None) -> tuple[str, str]:
    """Module and method of a ``student_root``; the method is ``""`` where the module itself is called.

    Example:
        >>> split_root("net:forward_features"), split_root("net"), split_root(None)
        (('net', 'forward_features'), ('net', ''), ('', ''))
    """
    name, _, method = (root or "").partition(":")
    return name, method


def find_teacher_root(layers: LayerSpec, student: nn.Module, root: str, teacher: nn.Module) -> str:
    """The submodule of the teacher that corresponds to a root which is a part of the student; ``""`` for the whole.

    An encoder learns from the teacher's encoder, not from its decoder. Only where layers are words: names may point
    anywhere in the teacher. The submodule has the name of the root, and it or the module around it the same type.
    """
    modules, found = named_layers(student), named_layers(teacher)
    if not root or not only_words(layers) or type(modules[root]) is type(teacher):
        return ""
    parts = root.split(".")
    for start in range(len(parts)):
        name = ".".join(parts[start:])
        around = ".".join(parts[:start])
        is_alike = name in found and (
            type(found[name]) is type(modules[root]) or type(teacher) is type(modules.get(around))
        )
        if is_alike:
            return name
    return ""
