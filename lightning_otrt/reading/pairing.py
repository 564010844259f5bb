"""From the first inputs of student and teacher to pairs of layers with the traces of both networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lightning_otrt.layers.lookup import LayerNames, check_names
from lightning_otrt.layers.names import child_names, named_layers, named_tensors
from lightning_otrt.layers.pairs import INPUT, LayerPair, LayerSpec
from lightning_otrt.layers.recordable import recorded_tensor
from lightning_otrt.layers.resolve import fallback_note, output_note, resolve_layers
from lightning_otrt.layers.streams import choose_plans
from lightning_otrt.layers.table import format_pairs
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.closest import match_layers
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.hooks.readers import TracedRead, recorded_layer
from lightning_otrt.reading.hooks.recorder import Readers
from lightning_otrt.reading.hooks.views import NeuronCounts
from lightning_otrt.reading.masks.layer_masks import pair_masks
from lightning_otrt.reading.masks.warnings import warn_of_one_sided_masks, warn_of_unused_masks
from lightning_otrt.reading.probes.mask_length import settle_lengths
from lightning_otrt.reading.probes.mask_owner import settle_masks
from lightning_otrt.reading.probes.row_choice import settle_rows
from lightning_otrt.reading.probes.token_order import settle_token_order
from lightning_otrt.reading.student_root.reach import describe_reach
from lightning_otrt.reading.student_root.rules import (
    can_be_root,
    describe_teacher_root,
    same_part,
    split_root,
    warn_of_whole_teacher,
)
from lightning_otrt.reading.traced.network_call import NetworkCall
from lightning_otrt.reading.tracer import trace
from lightning_otrt.reading.warnings.added_tokens import warn_of_added_tokens
from lightning_otrt.reading.warnings.failed_teacher import teacher_failed
from lightning_otrt.reading.warnings.inside_graphs import warn_of_blocks_in_graphs
from lightning_otrt.reading.warnings.other_orders import OrderedSide, warn_of_other_orders
from lightning_otrt.reading.warnings.picked_positions import warn_of_picked_positions
from lightning_otrt.reading.warnings.samples import warn_of_hidden_grids, warn_of_other_samples
from lightning_otrt.reading.warnings.unclear_axes import warn_of_unclear_axes

__all__ = ["Pairing", "check_layers", "pair_layers"]


@dataclass(frozen=True)
class Pairing:
    """Resolved pairs with what a traced forward showed of both networks.

    Args:
        pairs: The pairs, with full names and weights that sum to 1.
        student: Trace of the student.
        teacher: Trace of the teacher.
        note: What the reader of the table should know about the choice.
        plans: For each pair the kind of plan, where that is chosen pair by pair.
    """

    pairs: tuple[LayerPair, ...]
    student: Trace
    teacher: Trace
    note: str = ""
    plans: tuple[str, ...] = ()

    def readers(self, side: str, model: nn.Module, grid: int | None) -> Readers:
        """What to record of one side, by the number of the pair.

        Args:
            side: ``"student"`` or ``"teacher"``.
            model: The network of that side.
            grid: See :func:`~lightning_otrt.reading.neurons.reader.neurons`.
        """
        modules = named_layers(model)
        found = {}
        for index, pair in enumerate(self.pairs):
            name, place = (pair.student, 0) if side == "student" else (pair.teacher, 1)
            trace_of_side = self.student if side == "student" else self.teacher
            read = TracedRead(side, trace_of_side, name, pair.axes[place], pair.select, pair.masks[place])
            found[index] = recorded_layer(read, modules, grid)
        return found

    def neuron_counts(self) -> list[NeuronCounts]:
        """The neurons of each pair, for steps in which its layers do not run."""
        return [_neuron_counts(self, pair) for pair in self.pairs]

    def rows_of_a_sample(self) -> list[int]:
        """For each pair, how many rows of its student layer belong to a sample, such as frames or windows; else 1."""
        counts, samples = [], self.student.batch_size
        for pair in self.pairs:
            tensor = self.student.tensor(pair.student, pair.select)
            rows = 0 if tensor is None else tensor.shape[tensor.batch_axis]
            counts.append(rows // samples if samples and rows > samples and rows % samples == 0 else 1)
        return counts

    def table(self) -> str:
        """The pairs as a table with types and shapes."""
        masks = [pair_masks(pair, self.student, self.teacher) for pair in self.pairs]
        table = format_pairs(self.pairs, self.student, self.teacher, masks, self.plans)
        return f"{self.note}\n{table}" if self.note else table


def _neuron_counts(pairing: Pairing, pair: LayerPair) -> NeuronCounts:
    found = [pairing.student.tensor(pair.student, pair.select), pairing.teacher.tensor(pair.teacher, pair.select)]
    # A layer that the traced forward did not run is refused before.
    student, teacher = (tensor for tensor in found if tensor is not None)
    types = (torch.promote_types(getattr(torch, tensor.dtype), torch.float32) for tensor in (student, teacher))
    return NeuronCounts(student.shape[pair.axes[0] or 0], teacher.shape[pair.axes[1] or 0], (next(types), next(types)))


def pair_layers(
    layers: LayerSpec,
    student: NetworkCall,
    teacher: NetworkCall,
    known: tuple[LayerPair, ...] | None = None,
    *,
    plan: str = "",
    grid: int | None = None,
) -> Pairing:
    """Trace one forward of each network and choose the pairs.

    Args:
        layers: What the user passed.
        student: What runs of the student.
        teacher: What runs of the teacher.
        known: Pairs that were resolved earlier for both networks, to be used instead of a new choice.
        plan: Kind of plan; ``"auto"`` chooses one for each pair.
        grid: See :func:`~lightning_otrt.reading.neurons.reader.neurons`.

    Raises:
        ValueError: If a layer cannot be recorded, or no pair can be found.
        RuntimeError: If the teacher fails on its inputs.
    """
    looks = plan == "auto"
    given = student, teacher
    # The trace runs on what was given, where a write in place is seen. The forwards after it need what it was before.
    student, teacher = (replace(call, inputs=InputGuard(clones=True).copied(call.inputs)) for call in given)
    traces = _trace(given[0], values=looks), _trace_teacher(given[1], student, values=looks)
    if known is not None and _are_there(known, *traces):
        pairs, notes = known, []
        _check_known(pairs, *traces)
    else:
        pairs = resolve_layers(layers, *traces, lambda: match_layers(traces, (student, teacher)))
        warn_of_unclear_axes(layers, *traces)
        warn_of_blocks_in_graphs(layers, "student", traces[0], [pair.student for pair in pairs])
        warn_of_blocks_in_graphs(layers, "teacher", traces[1], [pair.teacher for pair in pairs])
        notes = [fallback_note(layers, *traces), output_note(layers, *traces)]
    student_trace = _settled(traces[0], student, [pair.student for pair in pairs])
    teacher_trace = _settled(traces[1], teacher, [pair.teacher for pair in pairs])
    warn_of_other_orders(pairs, OrderedSide(student, student_trace), OrderedSide(teacher, teacher_trace), grid)
    warn_of_picked_positions(pairs, student_trace, teacher_trace, grid)
    plans = choose_plans(pairs, student_trace, teacher_trace) if looks else ()
    notes.append(describe_reach(student.model, student_trace, pairs, student.method))
    part = same_part(student.model, student.root, teacher.model)
    notes.append(describe_teacher_root(student.root, teacher.root, teacher.method, part))
    warn_of_whole_teacher(part, pairs, student.root, teacher_trace)
    pairing = Pairing(pairs, student_trace, teacher_trace, "\n".join(filter(None, notes)), plans)
    _warn_of_pairing(pairing)
    return pairing


def _are_there(pairs: Sequence[LayerPair], student: Trace, teacher: Trace) -> bool:
    """Whether both networks have the layers. If not, pairs are chosen anew.

    In a resumed run the check of the checkpoint then names both.
    """
    names = [(pair.student, student) for pair in pairs] + [(pair.teacher, teacher) for pair in pairs]
    return all(name.removesuffix(INPUT) in traced.names() for name, traced in names)


def _check_known(pairs: Sequence[LayerPair], student: Trace, teacher: Trace) -> None:
    """Raise a ValueError if a layer of an earlier choice cannot be recorded any more."""
    try:
        for pair in pairs:
            recorded_tensor("student", student, pair.student, pair.select)
            recorded_tensor("teacher", teacher, pair.teacher, pair.select)
    except ValueError as error:
        raise ValueError(
            f"{error} The pair {pair.student!r} -> {pair.teacher!r} comes from an earlier fit, or from a checkpoint. "
            "`reset()` of the transfer forgets it, with its plans, so that layers are chosen anew; or start without "
            "the checkpoint."
        ) from None


def _settled(traced: Trace, call: NetworkCall, names: Sequence[str]) -> Trace:
    """The trace, corrected by what further forwards of the network show."""
    for settle in (settle_token_order, settle_rows, settle_masks, settle_lengths):
        traced = settle(call.model, traced, names, call.inputs, call.method)
    return traced


def _warn_of_pairing(pairing: Pairing) -> None:
    """Warn where padding is not left out or samples do not match."""
    masks = [pair_masks(pair, pairing.student, pairing.teacher) for pair in pairing.pairs]
    warn_of_unused_masks("student", {pair.student: found[0] for pair, found in zip(pairing.pairs, masks, strict=True)})
    warn_of_unused_masks("teacher", {pair.teacher: found[1] for pair, found in zip(pairing.pairs, masks, strict=True)})
    warn_of_one_sided_masks(pairing.pairs, masks, pairing.student, pairing.teacher)
    warn_of_added_tokens(pairing.pairs, pairing.student, pairing.teacher)
    warn_of_other_samples(pairing.pairs, pairing.student, pairing.teacher)
    warn_of_hidden_grids(pairing.pairs, pairing.student, pairing.teacher)


def check_layers(layers: LayerSpec, student: nn.Module, teacher: nn.Module, root: str | None) -> None:
    """Check what can be checked of ``layers`` before any forward.

    Raises:
        TypeError: If an element of ``layers`` is none of the accepted forms.
        ValueError: If a name does not exist, or ``root`` does not.
    """
    names = named_layers(student)
    name, method = split_root(root)
    if root is not None and name not in names:
        around, _, last = name.rpartition(".")
        child = getattr(names[around], last, None) if around in names else None
        is_method = callable(child) and not isinstance(child, nn.Module)
        hint = (
            f"Write {f'{around}:{last}'!r} for that method." if is_method else f"Its children: {child_names(student)}."
        )
        raise ValueError(
            f"Expected `student_root` to name a module of the student ({type(student).__name__}), but got {root!r}. "
            + hint
        )
    if method and not callable(getattr(names[name], method, None)):
        raise ValueError(
            f"Expected `student_root` to name a method of {name or 'the student'!r} ({type(names[name]).__name__}) "
            f"after the colon, but it has no method {method!r}."
        )
    own = LayerNames(
        "student", tuple(names), name if root is not None else None, type(student).__name__, named_tensors(student)
    )
    part = "" if root is None else same_part(student, name, teacher)
    try:
        check_names(
            layers,
            own,
            LayerNames("teacher", tuple(named_layers(teacher)), part, type(teacher).__name__, named_tensors(teacher)),
        )
    except ValueError:
        # Names of the teacher may be relative to the part of it that corresponds to a root which is not known yet.
        if root is not None or not any(can_be_root(other, layers, student, teacher) for other in names):
            raise


def _trace(call: NetworkCall, *, values: bool) -> Trace:
    return trace(call.model, *call.inputs, root=call.root, method=call.method, values=values)


def _trace_teacher(call: NetworkCall, student: NetworkCall, *, values: bool) -> Trace:
    try:
        return _trace(call, values=values)
    except Exception as error:
        failed = teacher_failed(error, call.model, call.inputs, student.model, student.root)
        if failed is error:
            raise
        raise failed from error
