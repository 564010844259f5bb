"""Inputs that hold what the student kept of an earlier forward: the teacher cannot go on from these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_otrt.reading.input_guard import tensors_in

__all__ = ["check_no_past_states"]

#: Names of such arguments in the networks of Hugging Face.
_NAMES = ("past_key_values", "past_key_value", "past", "mems", "cache_params")


def check_no_past_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check that no input is a filled cache of keys and values, or another memory of the student.

    Args:
        args: Positional inputs of the student's root.
        kwargs: Keyword inputs.

    Raises:
        ValueError: If one is.

    Example:
        >>> check_no_past_states((), {"past_key_values": None})
    """
    for name, value in [*((f"argument {place}", value) for place, value in enumerate(args)), *kwargs.items()]:
        length = getattr(type(value), "get_seq_length", None)
        if name not in _NAMES and length is None:
            continue
        if length(value) if length is not None else next(tensors_in(value), None) is not None:
            raise ValueError(
                f"The inputs of the student hold what it kept of an earlier forward: {name} ({type(value).__name__}). "
                "The teacher cannot go on from the states of another network. Give both the whole sequence in one "
                "call, run the calls that go on from a cache inside `transfer.paused()`, or make the teacher's inputs "
                "with `teacher_inputs`."
            )
