"""Why a teacher that YAML gives by its ``class_path`` could not be made."""

from __future__ import annotations

import ast
from typing import Any

from lightning_otrt.teacher.loading.checkpoint import imported

__all__ = ["check_class_path"]


def check_class_path(source: str) -> None:
    """Raise the error of a ``class_path`` whose text is taken for the name of a model.

    jsonargparse tries the forms of a teacher one after the other, the text last, and shows the error of that alone.

    Args:
        source: A name, or the text of a mapping with ``class_path``.

    Raises:
        ValueError: If it is such a text; with the error that the class or function raises.

    Example:
        >>> check_class_path("resnet18")
        >>> check_class_path("{'class_path': 'torch.nn.Linear', 'init_args': {'in_feature': 3}}")
        Traceback (most recent call last):
            ...
        ValueError: The teacher 'torch.nn.Linear' cannot be made with {'in_feature': 3}: TypeError: ...
    """
    if not source.startswith(("{", "Namespace(")):
        return
    try:
        given = _value(ast.parse(source, mode="eval").body)
    except (SyntaxError, ValueError):
        return
    if not isinstance(given, dict) or not isinstance(given.get("class_path"), str):
        return
    name, arguments = given["class_path"], _arguments(given)
    try:
        made = imported(name)(**{key: _made(key, value) for key, value in arguments.items()})
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"The teacher {name!r} cannot be made with {arguments}: {reason}") from error
    raise ValueError(
        f"The teacher {name!r} was refused with {arguments}, although Python makes a {type(made).__name__} with "
        "them: compare the types of the arguments with those that it declares."
    )


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    return {**(given.get("init_args") or {}), **(given.get("dict_kwargs") or {})}


def _made(key: str, value: Any) -> Any:
    """An argument; where it has a ``class_path`` itself, what that makes, or the class of a checkpoint."""
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    found = imported(value["class_path"])
    return found if key == "model_class" else found(**_arguments(value))


def _value(node: ast.expr) -> Any:
    """The value of a literal, in which mappings may be written as ``Namespace(name=value)``."""
    if isinstance(node, ast.Call):
        return {each.arg: _value(each.value) for each in node.keywords}
    if isinstance(node, ast.Dict):
        keys = (None if key is None else ast.literal_eval(key) for key in node.keys)
        return {key: _value(value) for key, value in zip(keys, node.values, strict=True)}
    return ast.literal_eval(node)
