"""Which tensors of a teacher's inputs have an entry for each sample, for each form that inputs have."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Form", "Forms"]


@dataclass
class Form:
    """Inputs with tensors in the same places.

    Attributes:
        size: Samples of the batch that showed which tensors belong to them.
        own: Places of these tensors, among all tensors of the inputs; none where nothing of the form can be kept.
        is_first: Whether the layers showed how many samples that batch had, as in the first batch of a run.
        checked: Of how many samples a batch has been checked: 1 shows that the teacher is not random, 2 all.
        has_entries: Whether lists of texts or numbers that are as long as the batch have an entry for each sample. True
            until a check shows that the teacher takes them as a whole, such as the names of classes.
    """

    size: int
    own: list[int]
    is_first: bool
    checked: int = 0
    has_entries: bool = True


class Forms:
    """The forms that the inputs of one teacher have had.

    Example:
        >>> import torch
        >>> forms, one, two = Forms(), torch.zeros(1, 3), torch.zeros(2, 3)
        >>> forms.first([("x", one), ("positions", one)], 1).own
        [0, 1]
        >>> form, size = forms.of([("x", two), ("positions", one)])
        >>> form.own, size
        ([0], 2)
        >>> form, size = forms.of([("x", two), ("positions", one), ("mask", two)])
        >>> form.own, size
        ([0, 2], 2)
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Form] = {}
        # Whether the tensor of a path has an entry for each sample, as far as a batch has shown.
        self._owns: dict[str, bool] = {}

    def first(self, named: list[tuple[str, Tensor]], size: int) -> Form:
        """The form of the first batch of a run.

        Args:
            named: The tensors of the inputs, with their paths.
            size: Samples of the batch.
        """
        own = [place for place, (_, tensor) in enumerate(named) if tensor.shape[:1] == (size,)]
        return self._note(named, Form(size, own, is_first=True))

    def of(self, named: list[tuple[str, Tensor]]) -> tuple[Form | None, int]:
        """The form of a later batch, and its samples; 0 where it cannot be told which tensors belong to them.

        A new form is decided by tensors that another one has, too.
        """
        form = self._known.get(_paths(named)) or self._new(named)
        if form is None:
            return None, 0
        sizes = _sizes(named, form.own)
        if len(sizes) > 1 and form.size == 1:
            # In a batch of one sample, what is common to all samples may have a first axis of that length, too.
            own = [place for place in form.own if named[place][1].shape[0] != 1]
            form, sizes = self._note(named, Form(1, own, is_first=False)), _sizes(named, own)
        common = [tensor for place, (_, tensor) in enumerate(named) if place not in form.own]
        # A tensor that is common to all samples, such as a matrix (T, T), may have as many rows by chance.
        if len(sizes) != 1 or any(tensor.shape[:1] == (size,) for tensor in common for size in sizes):
            return form, 0
        return form, sizes.pop()

    def _new(self, named: list[tuple[str, Tensor]]) -> Form | None:
        sizes = _sizes(named, [place for place, (path, _) in enumerate(named) if self._owns.get(path)])
        if len(sizes) != 1:
            return None
        size = sizes.pop()
        own = [
            place
            for place, (path, tensor) in enumerate(named)
            if tensor.shape[:1] == (size,) and self._owns.get(path, True)
        ]
        return self._note(named, Form(size, own, is_first=False))

    def _note(self, named: list[tuple[str, Tensor]], form: Form) -> Form:
        known = self._known.get(_paths(named))
        if known is not None and known.own == form.own:
            return known
        self._known[_paths(named)] = form
        self._owns.update({path: place in form.own for place, (path, _) in enumerate(named)})
        return form


def _paths(named: list[tuple[str, Tensor]]) -> tuple[str, ...]:
    return tuple(path for path, _ in named)


def _sizes(named: list[tuple[str, Tensor]], places: list[int]) -> set[int]:
    return {named[place][1].shape[0] if named[place][1].dim() else -1 for place in places}
