"""Records the neurons of student and teacher through forward hooks, one view for each forward of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.reading.hooks.layer_hooks import ReadInput, ReadOutput
from lightning_otrt.reading.hooks.note_hooks import NoteGrid, NoteMask, grid_key
from lightning_otrt.reading.hooks.view_hooks import CloseView, OpenView, ViewAroundMethod
from lightning_otrt.reading.hooks.views import View
from lightning_otrt.reading.neurons.reader import NeuronReader
from lightning_otrt.reading.torch_internals import add_forward_hook, add_forward_pre_hook

__all__ = ["PatchMap", "Readers", "RecordedLayer", "Recorder"]


#: Where masks may come from, with the modules that get them.
Masks: TypeAlias = tuple[tuple[MaskSource, nn.Module], ...]


class PatchMap(NamedTuple):
    """The layer whose map the tokens of a recorded layer come from. Each batch may have images of another size.

    Attributes:
        name: Its name.
        module: The module.
        axes: The axes of the rows and of the columns in its output, and of the times of a video.
        merged: The side of the square of its positions that each token holds.
    """

    name: str
    module: nn.Module
    axes: tuple[int, ...]
    merged: int = 1


class RecordedLayer(NamedTuple):
    """What to record of one layer.

    Attributes:
        name: Its name, with ``":input"`` for what enters it.
        module: The module.
        reader: Reads its output.
        masks: Where its padding masks may come from, the nearest first, with the modules that get them.
        patches: Where its tokens come from, if they lie on a grid.
    """

    name: str
    module: nn.Module
    reader: NeuronReader
    masks: Masks = ()
    patches: PatchMap | None = None


#: What to record of one network, by the number of the pair.
Readers: TypeAlias = Mapping[int, RecordedLayer]


class Recorder:
    """Records views while it is :attr:`enabled`, and holds the handles of its hooks.

    Args:
        on_forward: Called when a candidate for the student's root starts a training forward, with its name and inputs.
            It may install readers, and it runs the teacher. Returns whether the forward is recorded.
        read_output: Called with what the student's root returned and the view of that forward.

    Attributes:
        enabled: Whether the root's hooks open and close views.
        views: The finished views since the last :meth:`take`.
        current: The view of the forward that is running.
        nested: Number of running forwards of the root inside the recorded one. Another recorder of the same student
            traces its layers there.
        runs_teacher: Whether this recorder runs the teacher now. Another one may run the same module.
        reads_pairs: Whether the student's layers of pairs are read.
        teacher_output: What the teacher returned in the newest forward of the student's root, in a tuple; None where it
            did not run in that forward.
    """

    def __init__(
        self,
        on_forward: Callable[[str, tuple[Any, ...], dict[str, Any]], bool],
        read_output: Callable[[Any, View], None] | None = None,
    ) -> None:
        self.on_forward, self.read_output = on_forward, read_output
        self.enabled = False
        self.views: list[View] = []
        self.current: View | None = None
        self.nested = 0
        self.runs_teacher = False
        self.reads_pairs = True
        self.teacher_output: tuple[Any] | None = None
        self._root_handles: list[RemovableHandle | ViewAroundMethod] = []
        self._student_handles: list[RemovableHandle] = []
        self._teacher_handles: list[RemovableHandle] = []
        self._student_masks: list[tuple[nn.Module, NoteMask]] = []
        self._teacher_masks: list[tuple[nn.Module, NoteMask]] = []

    def watch_roots(self, candidates: Iterable[tuple[str, nn.Module]], method: str = "") -> None:
        """Call ``on_forward`` at each training forward of these modules, given outermost first.

        Args:
            candidates: Names and modules, each module once.
            method: Name of the method that counts as their forward.
        """
        self._remove(self._root_handles)
        for name, module in candidates:
            if method:
                view = OpenView(self, name), CloseView(self, name)
                self._root_handles.append(ViewAroundMethod(module, method, *view))
                continue
            self._root_handles.append(add_forward_pre_hook(module, OpenView(self, name), with_kwargs=True))
            # `always_call`: a view left open by an exception would keep the next forward from being recorded.
            self._root_handles.append(add_forward_hook(module, CloseView(self, name), always_call=True))

    def watch_student(self, readers: Readers, masks: Masks = (), features: RecordedLayer | None = None) -> None:
        """Record these layers of the student.

        Args:
            readers: The layers of the pairs.
            masks: What is noted beside the masks of the layers.
            features: The layer on which the teacher's logits are regressed.
        """
        layers: list[tuple[int | None, RecordedLayer]] = [*readers.items()]
        if features is not None:
            layers.append((None, features))
        self._install(self._student_handles, "student", layers, masks)

    def watch_teacher(self, readers: Readers, masks: Masks = ()) -> None:
        """The same for the teacher."""
        self._install(self._teacher_handles, "teacher", list(readers.items()), masks)

    def switch(self, on: bool, *, pairs: bool = True) -> None:
        """Record forwards or not.

        Args:
            on: Whether forwards are recorded.
            pairs: Whether the student's layers of pairs are read.
        """
        self.enabled, self.reads_pairs = on, pairs
        if not on:
            self.teacher_output = None

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Open no view inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def note_masks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the masks that a module gets whose hooks do not: the view was opened later, or a method is called."""
        for known, note in (*self._student_masks, *self._teacher_masks):
            if known is module:
                note(module, args, kwargs)

    def open(self, root: str = "") -> View:
        """Let the hooks fill a new view.

        Args:
            root: Name of the module whose forward it is.
        """
        self.current = view = View(root, reads_pairs=self.reads_pairs)
        return view

    def close(self) -> View | None:
        """The view that the hooks filled, if one was open."""
        view, self.current = self.current, None
        return view

    def leave(self) -> None:
        """Forget the view of a forward that is running no more although no hook has closed it."""
        self.current, self.nested = None, 0

    def run_teacher(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        method_of: nn.Module | None = None,
    ) -> Any:
        """Run the teacher. What its layers give and its masks go to the current view.

        Args:
            run: Runs it on ``args`` and ``kwargs``.
            args: Positional inputs.
            kwargs: Keyword inputs.
            method_of: Where a method of a module runs, whose call no hook sees: that module.
        """
        self.runs_teacher = True
        try:
            if method_of is not None:
                self.note_masks(method_of, args, dict(kwargs))
            return run(args, kwargs)
        finally:
            self.runs_teacher = False

    def keep_output(self, output: Any) -> None:
        """Keep what the teacher returned until the next forward, or until the views are taken."""
        self.teacher_output = (output,)

    def take(self) -> list[View]:
        """The finished views since the last call."""
        views, self.views, self.teacher_output = self.views, [], None
        return views

    def remove(self) -> None:
        """Remove all hooks and forget what was recorded."""
        self._remove(self._root_handles)
        self._remove(self._student_handles)
        self._remove(self._teacher_handles)
        self._student_masks, self._teacher_masks = [], []
        self.views, self.current, self.enabled = [], None, False
        self.teacher_output = None
        self.nested, self.runs_teacher = 0, False

    def __getstate__(self) -> dict[str, Any]:
        """Without what is recorded, and without handles: copies of the modules lose their hooks by themselves."""
        handles: dict[str, Any] = {name: [] for name in ("_root_handles", "_student_handles", "_teacher_handles")}
        lost: dict[str, Any] = {
            "views": [],
            "current": None,
            "teacher_output": None,
            "_student_masks": [],
            "_teacher_masks": [],
            "nested": 0,
        }
        return {**self.__dict__, **handles, **lost}

    def _install(
        self,
        handles: list[RemovableHandle],
        side: str,
        layers: Sequence[tuple[int | None, RecordedLayer]],
        masks: Masks,
    ) -> None:
        self._remove(handles)
        sources = dict([*masks, *(mask for _, layer in layers for mask in layer.masks)])
        notes = [(module, NoteMask(self, side, source, module)) for source, module in sources.items()]
        if side == "student":
            self._student_masks = notes
        else:
            self._teacher_masks = [(module, note) for module, note in notes if note.source.method != "forward"]
        # Before the readers: a layer may get its own mask, and be read where it starts.
        for module, note in notes:
            if note.source.method != "forward":  # the root's: noted where its view is opened
                continue
            handles.append(add_forward_pre_hook(module, note, with_kwargs=True))
        for patches in dict.fromkeys(layer.patches for _, layer in layers):
            if patches is not None:
                note_grid = NoteGrid(self, side, patches)
                handles.append(add_forward_hook(patches.module, note_grid))
        for index, (name, module, reader, own_masks, patches) in layers:
            grid = None if patches is None else grid_key(side, patches)
            if name.endswith(INPUT):
                hook = ReadInput(self, side, index, reader, own_masks, grid)
                handles.append(add_forward_pre_hook(module, hook, with_kwargs=True))
            else:
                handles.append(add_forward_hook(module, ReadOutput(self, side, index, reader, own_masks, grid)))

    @staticmethod
    def _remove(handles: list[Any]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()
