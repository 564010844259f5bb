"""Adds terms to the loss of a LightningModule by replacing its ``training_step`` on the instance, for one fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

__all__ = ["ExtraTerm", "add_term", "remove_term"]

_PATCHED = ("training_step", "manual_backward")


class ExtraTerm:
    """A term of the loss. This base class adds nothing; subclasses override what they need."""

    @property
    def is_training(self) -> bool:
        """Whether a training step that is called now is one of training, not of validation."""
        return True

    def training_step(self) -> AbstractContextManager[None]:
        """A context that is entered around the user's ``training_step``."""
        return nullcontext()

    def term(self, position: int) -> Tensor | None:
        """The term of the forwards since the last call; None if there is none.

        Args:
            position: Number of this term among those of the module.
        """
        return None

    def discard(self) -> None:
        """Forget the forwards since the last call of :meth:`term`."""

    def skip(self) -> None:
        """The user skips this step."""

    def has_term(self) -> bool:
        """Whether there was a forward since the last call of :meth:`term`."""
        return False

    def belongs_to(self, loss: Tensor) -> bool:
        """Whether a loss may train what the term trains; one of a critic does not train the generator."""
        return True


def add_term(module: pl.LightningModule, term: ExtraTerm) -> None:
    """Add ``term`` to the loss of every training step of ``module`` until :func:`remove_term`."""
    step = module.__dict__.get("training_step")
    if not isinstance(step, _Step):
        step = _Step(module)
        # On the instance: its class and other instances are not changed.
        module.__dict__["training_step"] = step
        module.__dict__["manual_backward"] = _ManualBackward(module, step)
    step.terms.append(term)


def remove_term(module: pl.LightningModule, term: ExtraTerm) -> None:
    """Undo :func:`add_term`; does nothing where it was not called."""
    # Looked up through either method: something else may have replaced one of them since.
    step, backward = (module.__dict__.get(name) for name in _PATCHED)
    if not isinstance(step, _Step):
        step = backward.step if isinstance(backward, _ManualBackward) else None
    if step is not None and term in step.terms:
        step.terms.remove(term)
        if not step.terms:
            for name in _PATCHED:
                patch = module.__dict__.get(name)
                if isinstance(patch, _Patch):
                    patch.restore()


class _Patch:
    """A method replaced on one instance.

    Copies and pickles of the module (weight averaging, ``torch.save`` during a fit) get the plain method back.
    """

    name: str

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.shadowed = module.__dict__.get(self.name)
        self.inner: Callable[..., Any] = getattr(module, self.name)
        # Lightning unwraps one level to read the signature, and to see whether the method is overridden.
        self.__wrapped__ = getattr(self.inner, "__wrapped__", self.inner)

    def restore(self) -> None:
        """Restore what the instance had."""
        if self.shadowed is None:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.shadowed

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the name of the method: `types.MethodType` itself cannot be pickled.
        return getattr, (self.module, self.name)


class _Step(_Patch):
    name = "training_step"

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__(module)
        self.terms: list[ExtraTerm] = []
        #: Whether a step runs now. It may call `self.training_step` for the parts of its batch.
        self._is_running = False
        #: Whether a backward pass of this step had the terms, and whether one was of other parameters, under manual
        #: optimization.
        self.is_added = self.is_left_out = False
        #: How errors name the loss of an automatic step.
        self._returned = f"returned by the training_step of {type(module).__name__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_running or not self.is_training():
            return self.inner(*args, **kwargs)
        self._is_running, self.is_added, self.is_left_out = True, False, False
        try:
            with ExitStack() as stack:
                for term in self.terms:
                    stack.enter_context(term.training_step())
                output = self.inner(*args, **kwargs)
            if not self.module.automatic_optimization:
                self._check_manual()
                return output
            return self.with_terms(output, self._returned) if isinstance(output, Tensor) else self._add(output)
        finally:
            self._is_running = False
            # Whatever came back: what is kept holds its graph, and would be taken for a part of the next step.
            for term in self.terms:
                term.discard()

    def is_training(self) -> bool:
        """Whether terms are added. A ``validation_step`` may call ``self.training_step`` for the loss of the task."""
        return all(term.is_training for term in self.terms)

    def with_terms(self, loss: Tensor, what: str, without: Sequence[ExtraTerm] = ()) -> Tensor:
        """A loss plus all terms but some; the loss itself if there are none.

        Without a term torch would raise in the backward pass of a loss without gradient. With it, the term alone would
        be trained unnoticed. So this raises.

        Args:
            loss: The loss of the task.
            what: How the error names it.
            without: Terms that are left out.
        """
        found = [term.term(position) for position, term in enumerate(self.terms) if term not in without]
        present = [value for value in found if value is not None]
        if not present:
            return loss
        total = sum(present[1:], present[0])
        if total.requires_grad and not loss.requires_grad:
            raise MisconfigurationException(
                f"The loss {what} has no gradient, so that the transfer term alone would be trained. Look for "
                "`detach`, `item` or `no_grad` on its way. To train on the transfer term alone, use "
                "`torch.zeros((), requires_grad=True)` as the loss."
            )
        return loss + total.to(loss.device)

    def _add(self, output: Any) -> Any:
        """The output of an automatic step, other than a tensor, with all terms in its loss."""
        if output is None:
            for term in self.terms:
                term.skip()
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if isinstance(loss, Tensor):
            total = self.with_terms(loss, self._returned)
            return output if total is loss else _with_loss(output, total)
        if isinstance(output, Mapping) and loss is None:
            return output  # Lightning's own error says that there has to be a loss
        if any(term.has_term() for term in self.terms):
            where, found = "", output
            if isinstance(output, Mapping):
                where, found = f"a {type(output).__name__} whose 'loss' is ", loss
            raise MisconfigurationException(
                f"The training_step of {type(self.module).__name__} returned {where}a {type(found).__name__}, to which "
                "no transfer term can be added. Return the loss as a tensor, a mapping with the key 'loss', or None to "
                "skip the step; or use manual optimization with `self.manual_backward(loss)`."
            )
        return output

    def _check_manual(self) -> None:
        # Where a backward pass left the term out, the step may be that of a critic.
        if self.is_left_out or not any(term.has_term() for term in self.terms):
            return
        raise MisconfigurationException(
            f"{type(self.module).__name__} uses manual optimization, but its training_step ended without "
            "`self.manual_backward(loss)` after the student ran, so the transfer term was never added. Call "
            "`self.manual_backward(loss)` instead of `loss.backward()`; run forwards that are not trained on inside "
            "`torch.no_grad()` or `transfer.paused()`."
        )


def _with_loss(output: Mapping[str, Any], loss: Tensor) -> Mapping[str, Any]:
    """A copy of the same type with another loss; a dictionary where the type cannot be copied or changed."""
    try:
        copied: Any = copy.copy(output)
        if copied is not output:
            copied["loss"] = loss
            if copied["loss"] is loss:
                return cast(Mapping[str, Any], copied)
    except Exception:
        pass
    return {**output, "loss": loss}


class _ManualBackward(_Patch):
    name = "manual_backward"

    def __init__(self, module: pl.LightningModule, step: _Step) -> None:
        super().__init__(module)
        self.step = step

    def __call__(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self.step.is_training():
            self.inner(loss, *args, **kwargs)
            return
        explained = _second_pass_explained() if self.step.is_added else nullcontext()
        # Only the first backward after a forward gets the term, so two losses of one forward count it once. One that
        # trains other parameters would have it in gradients that the step of another optimizer sets to zero.
        pending = [term for term in self.step.terms if term.has_term()]
        left_out = [term for term in pending if not term.belongs_to(loss)]
        self.step.is_left_out = self.step.is_left_out or bool(left_out)
        taken = [term for term in pending if term not in left_out]
        if taken:
            # Another term may be that of a network that runs later in the step, as of the other player of a GAN.
            others = [term for term in self.step.terms if term not in taken]
            total = self.step.with_terms(loss, "passed to `self.manual_backward`", without=others)
            self.step.is_added = self.step.is_added or total is not loss
            loss = total
        with explained:
            self.inner(loss, *args, **kwargs)


@contextmanager
def _second_pass_explained() -> Iterator[None]:
    """Say why the graph of the student's forward may be freed in a later backward pass of a step."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "The transfer term was added to an earlier `self.manual_backward` of this step, and that pass freed the "
            "graph of the student's forward, which this one needs. Pass `retain_graph=True` to the earlier one; or run "
            "the student once for each of them, inside `callback.transfer.paused()` where the term is not meant."
        ) from error
