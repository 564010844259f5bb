"""Inputs that hold what the student kept of an earlier forward: the teacher cannot go on from these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_otrt.reading.containers import map_inputs, tensors_in
from lightning_otrt.reading.neurons.outputs import describe
from lightning_otrt.reading.traced.arguments import positional_names
from lightning_otrt.reading.traced.states import StateShapes
from lightning_otrt.teacher.frozen.zero_states import ZeroStates, zeros_for

__all__ = ["PastStates"]

#: Names of such arguments in the networks of Hugging Face.
_NAMES = ("past_key_values", "past_key_value", "past", "mems", "cache_params")
#: Words in the names of arguments that hold recurrent states.
_WORDS = {"state", "states", "hidden", "hiddens", "hx", "hc", "h0", "c0", "carry", "cache", "caches", "mems"}
#: In the networks of Hugging Face these are sequences, their own or that of an encoder.
_SEQUENCES = ("hidden_states", "last_hidden_state")


class PastStates:
    """Checks that the inputs of the student hold no state that it goes on from.

    Such are filled caches of keys and values; tensors with the shape of a state of the student's recurrent modules;
    tuples and objects of tensors that are named as states are; and tensors of such a name that the first batch did not
    have. One of zeros is the state of a new sequence, and the teacher gets zeros, too, of the shape of its own states.

    Args:
        root: The module of the student that gets the inputs; None where it is not known.
        method: Its method that is called.
        args: Positional inputs of the first forward.
        kwargs: Keyword inputs of the first forward.
        teacher: The module of the teacher that runs. None where it is not known, or where later values are not looked
            at, as in compiled code: states of zeros are refused, too.

    Example:
        >>> PastStates().without((), {"past_key_values": None})
        ((), {'past_key_values': None})
    """

    def __init__(
        self,
        root: nn.Module | None = None,
        method: str = "forward",
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self._where = "the student" if root is None else f"{type(root).__name__}.{method} of the student"
        self._names = [] if root is None else positional_names(root, method)
        self._shapes = StateShapes() if root is None else StateShapes.of(root)
        self._is_recurrent = bool(self._shapes.layers or self._shapes.cells)
        self._of_teacher = None if teacher is None else StateShapes.of(teacher)
        #: Whose ``may_wait`` says whether values are looked at in the step itself.
        self.zeros = ZeroStates(may_wait=True)
        self._first: set[str] | None = None
        if root is not None:
            self._first = {name for name, value in self._named(args, kwargs or {}) if _floats(value)}

    def without(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs with None in place of empty caches, and zeros of the teacher's shape in place of those of a state.

        Args:
            args: Positional inputs of the student's root.
            kwargs: Keyword inputs.

        Raises:
            ValueError: If one of them is a state of the student, or was one in the last step.
        """
        self.zeros.check_earlier()
        named = list(self._named(args, kwargs))
        suspects = [(name, value) for name, value in named if self._may_be_state(name, value)]
        if not suspects:
            return args, dict(kwargs)
        new: set[int] = set()
        for name, value in suspects:
            others = [tensor for other, item in named if other != name for tensor in tensors_in(item)]
            if not self._is_state(name, value, others):
                continue
            error = ValueError(
                f"The inputs of {self._where} hold a state that it goes on from: {name} ({describe(value)}). The "
                "teacher cannot go on from the states of another network, even where the widths are equal. Give "
                "both the whole sequence in one call; run the calls that go on from a state inside "
                "`transfer.paused()`; or make the teacher's inputs with `teacher_inputs`, a function of the "
                "student's: without the state the teacher starts each batch from its own first one."
            )
            # Attention looks at keys of zeros, too.
            if self._of_teacher is None or _is_filled(value) or name in _NAMES:
                raise error
            self.zeros.check(_floats(value), error)
            new.update(map(id, _floats(value)))
        if self._of_teacher is not None and new:
            shapes = self._shapes, self._of_teacher
            args, kwargs = map_inputs(
                (args, kwargs), lambda tensor: zeros_for(tensor, *shapes) if id(tensor) in new else tensor
            )
        if not any(_is_filled(value) is False for _, value in suspects):
            return args, dict(kwargs)
        return tuple(map(_without_empty, args)), {name: _without_empty(value) for name, value in kwargs.items()}

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The inputs with their names; those in a mapping that is a whole batch have its keys."""
        names = (*self._names, *(f"argument {place}" for place in range(len(self._names), len(args))))
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            if isinstance(value, Mapping) and _WORDS.isdisjoint(name.split("_")):
                yield from ((str(key), item) for key, item in value.items())
            else:
                yield name, value

    def _may_be_state(self, name: str, value: Any) -> bool:
        """Whether to look closer. A tensor with an ordinary name can only be a state of a recurrent network."""
        if value is None:
            return False
        return not isinstance(value, Tensor) or name in _NAMES or _is_named(name) or self._is_recurrent

    def _is_state(self, name: str, value: Any, others: list[Tensor]) -> bool:
        if (is_filled := _is_filled(value)) is not None:
            return is_filled
        if name in _NAMES:
            return next(tensors_in(value), None) is not None
        floats = _floats(value)
        if not floats:
            return False
        is_named = _is_named(name)
        is_plain = isinstance(value, Tensor)
        if self._shapes.are_states(floats, others):
            return True
        if self._shapes.are_cell_states(floats, others) and (is_named or not is_plain):
            return True
        is_new = self._first is not None and name not in self._first
        return is_named and bool(others) and (is_new or not is_plain)


def _is_named(name: str) -> bool:
    """Whether an argument is called as states are."""
    return not (_WORDS.isdisjoint(name.lower().split("_")) or name.endswith(_SEQUENCES))


def _floats(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def _is_filled(value: Any) -> bool | None:
    """Whether a cache of Hugging Face holds anything of an earlier forward; None for anything else."""
    if getattr(type(value), "get_seq_length", None) is None:
        return None
    # One of keys and values has a length; one of state-space models tells whether it has a state. Either raises for a
    # question that is not its own.
    return any(_answer(value, question) for question in ("get_seq_length", "has_previous_state"))


def _answer(value: Any, question: str) -> bool:
    try:
        return bool(getattr(value, question)())
    except (AttributeError, ValueError, TypeError):
        return False


def _without_empty(value: Any) -> Any:
    return None if _is_filled(value) is False else value
