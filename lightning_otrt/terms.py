"""The terms of one call: from recorded forwards to the weighted sum of transport and distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_otrt.reading.hooks.views import NoTermError, View
from lightning_otrt.run_state import RunState
from lightning_otrt.steps.term_engine import PairDistance
from lightning_otrt.teacher.attachment import Attachment
from lightning_otrt.weights import Weights

__all__ = ["CallTerms", "make_terms"]

_ELSEWHERE = "Another process of the global batch could form no transfer term."


@dataclass(frozen=True)
class CallTerms:
    """The terms of one call.

    Attributes:
        total: The weighted sum, differentiable.
        transport: The unweighted transport term, detached; None where its weight is 0.
        distillation: The same of the distillation of logits.
        distances: The distance of each pair of layers.
        constant: Names of the student layers that get no gradient.
    """

    total: Tensor
    transport: Tensor | None = None
    distillation: Tensor | None = None
    distances: list[PairDistance] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)


def make_terms(
    attachment: Attachment, run: RunState, views: list[View], samples: int, weights: Weights, reevaluation: bool
) -> CallTerms:
    """The terms of one call. Where processes share a batch they all come here.

    Args:
        attachment: What recorded the forwards.
        run: The plans and statistics of the run. If its settings are not ``strict``, processes tell each other whether
            they have a term before they exchange sums.
        views: The recorded forwards.
        samples: The number of samples in them.
        weights: The weights, not both of them 0.
        reevaluation: See :meth:`RepresentationTransfer.loss`.

    Raises:
        NoTermError: If no term can be formed, on this process or, unless ``strict``, on another one.
    """
    matched = logits = problem = None
    try:
        attachment.check_views(views)
        matched = attachment.neurons(views) if weights.transport else None
        logits = attachment.logits(views) if weights.distillation else None
    except NoTermError as error:
        problem = error
    if not run.settings.strict and (ranks := run.processes.of_batch) is not None:
        device = attachment.device or torch.device("cpu")
        # Else the other processes would wait for this one in the exchange of the term.
        if ranks.any(problem is not None, device):
            problem = problem or NoTermError(_ELSEWHERE)
    if problem is not None:
        raise problem
    terms: list[Tensor] = []
    transport = distillation = None
    distances: list[PairDistance] = []
    if matched is not None:
        assert run.engine is not None
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
            terms.append(weights.distillation * distillation.to(terms[0].device if terms else distillation.device))
    return CallTerms(
        sum(terms[1:], terms[0]) if terms else torch.zeros((), device=attachment.device),
        None if transport is None else transport.detach(),
        None if distillation is None else distillation.detach(),
        distances,
        [] if matched is None else matched.constant,
    )
