"""The terms of one call: from recorded forwards to the weighted sum of transport and distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lightning_otrt.reading.hooks.views import NoTermError, View
from lightning_otrt.run_state import RunState
from lightning_otrt.steps.pair_distance import PairDistance
from lightning_otrt.steps.ranks import Ranks
from lightning_otrt.teacher.attachment import Attachment
from lightning_otrt.weights import Weights

__all__ = ["CallTerms", "make_terms"]

Formed = TypeVar("Formed")

_TRANSPORT, _DISTILLATION = "transport term", "distillation of logits"


@dataclass(frozen=True)
class CallTerms:
    """The terms of one call.

    Attributes:
        total: The weighted sum, differentiable.
        transport: The unweighted transport term, detached; None where its weight is 0.
        distillation: The same of the distillation of logits.
        distances: The distance of each pair of layers.
        constant: Names of the student layers that get no gradient.
        left_out: Why a term is missing that has a weight, while the other one is there.
    """

    total: Tensor
    transport: Tensor | None = None
    distillation: Tensor | None = None
    distances: list[PairDistance] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def make_terms(
    attachment: Attachment, run: RunState, views: list[View], samples: int, weights: Weights, reevaluation: bool
) -> CallTerms:
    """The terms of one call. Where processes share a batch they all come here.

    Args:
        attachment: What recorded the forwards.
        run: The plans and statistics of the run. If its settings are not ``strict``, processes tell each other which
            terms they have before they exchange sums, and a term that cannot be formed leaves the other one alone.
        views: The recorded forwards.
        samples: The number of samples in them.
        weights: The weights, not both of them 0.
        reevaluation: See :meth:`RepresentationTransfer.loss`.

    Raises:
        NoTermError: If no term can be formed, on this process or, unless ``strict``, on another one. If ``strict``,
            also if one of both cannot.
    """
    wanted = [what for what, weight in zip((_TRANSPORT, _DISTILLATION), weights, strict=True) if weight]
    problems = _problems_of_views(attachment, views, wanted)
    matched = _formed(_TRANSPORT, lambda: attachment.neurons(views), wanted, problems)
    logits = _formed(_DISTILLATION, lambda: attachment.logits(views), wanted, problems)
    if run.settings.strict:
        for problem in problems.values():
            raise problem
    elif (ranks := run.processes.of_batch) is not None:
        _agree(ranks, wanted, problems, attachment.device or torch.device("cpu"))
    if len(problems) == len(wanted):
        raise NoTermError(" ".join(dict.fromkeys(map(str, problems.values()))))
    matched, logits = None if _TRANSPORT in problems else matched, None if _DISTILLATION in problems else logits
    terms: list[Tensor] = []
    transport = distillation = None
    distances: list[PairDistance] = []
    if matched is not None:
        assert run.engine is not None
        if not reevaluation or run.engine.calls == 0:
            run.missed.note(matched.absent, is_first=run.engine.calls == 0)
        transport, distances = run.engine.term(
            matched.neurons, samples, absent=matched.absent, reevaluation=reevaluation
        )
        terms.append(weights.transport * transport)
    if logits is not None:
        assert run.distillation is not None
        distillation = run.distillation.term(
            logits.views, run.processes.of_batch, is_regression=logits.is_regression, reevaluation=reevaluation
        )
        if distillation is not None:
            attachment.watch_distillation(distillation)
            terms.append(weights.distillation * distillation.to(terms[0].device if terms else distillation.device))
    return CallTerms(
        sum(terms[1:], terms[0]) if terms else torch.zeros((), device=attachment.device),
        None if transport is None else transport.detach(),
        None if distillation is None else distillation.detach(),
        distances,
        [] if matched is None else matched.constant,
        [f"{problem} (strict=False: the {what} is left out.)" for what, problem in problems.items()],
    )


def _problems_of_views(attachment: Attachment, views: list[View], wanted: list[str]) -> dict[str, NoTermError]:
    """Why the forwards give none of the terms, for each of them; empty if they may give some."""
    try:
        attachment.check_views(views)
    except NoTermError as error:
        return dict.fromkeys(wanted, error)
    return {}


def _formed(
    what: str, form: Callable[[], Formed], wanted: list[str], problems: dict[str, NoTermError]
) -> Formed | None:
    """What a term is made of; None if it is not wanted, or has a problem, which is noted."""
    if what not in wanted or what in problems:
        return None
    try:
        return form()
    except NoTermError as error:
        problems[what] = error
        return None


def _agree(ranks: Ranks, wanted: list[str], problems: dict[str, NoTermError], device: torch.device) -> None:
    """Note the problems of the other processes, too, which would wait for this one in the exchange of a term."""
    for what, has_problem in zip(wanted, ranks.any([each in problems for each in wanted], device), strict=True):
        if has_problem and what not in problems:
            problems[what] = NoTermError(f"Another process of the global batch could form no {what}.")
