"""The root of a student, whose inputs the teacher gets too, and the part of the teacher that runs on them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_otrt.layers.grammar import WORDS, parse_layers
from lightning_otrt.layers.lookup import LayerNames, check_names
from lightning_otrt.layers.names import is_inside, named_layers
from lightning_otrt.layers.pairs import INPUT, LayerPair, LayerSpec
from lightning_otrt.layers.trace import Trace
from lightning_otrt.notices import warn

__all__ = [
    "can_be_root",
    "describe_teacher_root",
    "find_teacher_root",
    "has_names",
    "is_of_same_network",
    "same_part",
    "split_root",
    "warn_of_whole_teacher",
]


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
        check_names(
            layers, inside, LayerNames("teacher", tuple(named_layers(teacher)), same_part(student, name, teacher))
        )
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


def same_part(student: nn.Module, root: str, teacher: nn.Module) -> str:
    """The submodule of the teacher that corresponds to a root which is a part of the student; ``""`` if there is none.

    It has the name of the root, and it or the module around it the same type.

    Example:
        >>> class AutoEncoder(nn.Module):
        ...     def __init__(self, width: int) -> None:
        ...         super().__init__()
        ...         self.encoder, self.decoder = nn.Linear(4, width), nn.Linear(width, 4)
        >>> same_part(AutoEncoder(2), "encoder", AutoEncoder(3))
        'encoder'
    """
    modules, found = named_layers(student), named_layers(teacher)
    kind = type(found[""])  # without what wraps the teacher
    if not root or type(modules[root]) is kind:
        return ""
    parts = root.split(".")
    for start in range(len(parts)):
        name = ".".join(parts[start:])
        around = ".".join(parts[:start])
        is_alike = name in found and (type(found[name]) is type(modules[root]) or kind is type(modules.get(around)))
        if is_alike:
            return name
    return ""


def is_of_same_network(student: nn.Module, root: str, part: str, teacher: nn.Module) -> bool:
    """Whether the module of the student around its root, of which the teacher has this part, is of the teacher's type.

    Example:
        >>> student, teacher = nn.ModuleDict({"net": nn.Linear(2, 2)}), nn.ModuleDict({"net": nn.Linear(2, 3)})
        >>> is_of_same_network(student, "net", "net", teacher)
        True
    """
    around = root.removesuffix(part).removesuffix(".")
    return type(named_layers(student)[around]) is type(named_layers(teacher)[""])


def has_names(layers: LayerSpec, teacher: nn.Module) -> bool:
    """Whether the layers of the teacher are named as the whole teacher names them, or not at all.

    Example:
        >>> teacher = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2))})
        >>> has_names("blocks", teacher), has_names({"0": "net.0"}, teacher), has_names({"0": "0"}, teacher)
        (True, True, False)
    """
    names, no_names = LayerNames("teacher", tuple(named_layers(teacher)), ""), LayerNames("student", ())
    try:
        for selector in {entry.teacher for entry in parse_layers(layers)}:
            if isinstance(selector, str) and selector not in WORDS:
                names.find(selector, no_names)
    except ValueError:
        return False
    return True


def find_teacher_root(layers: LayerSpec, student: nn.Module, root: str, teacher: nn.Module) -> str:
    """The submodule of the teacher that runs on the inputs of the student's root; ``""`` for the whole.

    An encoder learns from the teacher's encoder alone: the whole teacher would encode a second time what is encoded
    already. Where a layer is named that lies outside of that part, the whole teacher has to run.
    """
    part = same_part(student, root, teacher)
    if not part:
        return ""
    modules = named_layers(teacher)
    held = {id(inner) for inner in modules[part].modules()}  # one that is registered twice has two names
    names, no_names = LayerNames("teacher", tuple(modules), part), LayerNames("student", ())
    selectors = {entry.teacher for entry in parse_layers(layers)}
    found = (
        name.removesuffix(INPUT)
        for selector in selectors
        if isinstance(selector, str) and selector not in WORDS
        for name in names.find(selector, no_names)
    )
    return part if all(id(modules[name]) in held for name in found) else ""


def same_method(teacher: nn.Module, method: str) -> str:
    """The method of the teacher's root that runs in place of its forward: the student's, where the teacher has it.

    Another one may compute something else: the inverse of a flow, or a decoder alone.

    Example:
        >>> same_method(nn.MultiheadAttention(4, 2), "merge_masks"), same_method(nn.Linear(4, 2), "decode")
        ('merge_masks', '')
    """
    return method if method and callable(getattr(teacher, method, None)) else ""


def describe_teacher_root(root: str, teacher_root: str, method: str, part: str) -> str:
    """Which part or method of the teacher runs, for the log; empty for the forward of a teacher without such a part.

    Args:
        root: Name of the student's root.
        teacher_root: Name of the teacher's submodule that runs, ``""`` for the whole.
        method: Name of its method that runs, ``""`` for the forward.
        part: Name of its submodule that corresponds to the root, ``""`` if there is none.

    Example:
        >>> describe_teacher_root("net.encoder", "encoder", "", "encoder")
        "teacher: its part 'encoder' runs alone, on what enters 'net.encoder' of the student"
        >>> describe_teacher_root("net", "", "decode", "")
        "teacher: its method 'decode' runs, on what enters that of the student"
        >>> print(describe_teacher_root("net", "", "", "net"))
        teacher: all of it runs, on what enters 'net' of the student; to run 'net' of the teacher alone, pass that as \
the teacher
    """
    if method:
        of_part = f" of its part {teacher_root!r}" if teacher_root else ""
        return f"teacher: its method {method!r}{of_part} runs, on what enters that of the student"
    if teacher_root:
        return f"teacher: its part {teacher_root!r} runs alone, on what enters {root!r} of the student"
    if part:
        return (
            f"teacher: all of it runs, on what enters {root!r} of the student; to run {part!r} of the teacher alone, "
            "pass that as the teacher"
        )
    return ""


def warn_of_whole_teacher(part: str, pairs: Sequence[LayerPair], root: str, teacher: Trace) -> None:
    """Warn where the whole teacher runs on the inputs of a part of the student, and has the same part further inside.

    Args:
        part: The teacher's submodule that corresponds to the student's root, ``""`` if there is none.
        pairs: The resolved pairs.
        root: Name of the student's root.
        teacher: Trace of the teacher.
    """
    inside = [layer for layer in teacher.layers if is_inside(layer.name, part)]
    if not part or teacher.root or any(layer.takes_model_input for layer in inside):
        return
    outside = list(dict.fromkeys(pair.teacher for pair in pairs if not is_inside(pair.teacher, part)))
    if not outside:  # it runs for what it does before and after that part
        return
    warn(
        f"The whole teacher ({teacher.layer('').kind}) runs on what enters {root!r} of the student, because its layers "
        f"{outside} lie outside of its own {part!r}. Its {part!r} gets something else, such as inputs that are "
        f"normalised or encoded a second time. Name layers inside {part!r}, which then runs alone; name the module of "
        "the student that gets what the whole teacher takes as `student_root`; or make the teacher's inputs with "
        "`teacher_inputs`.",
    )
