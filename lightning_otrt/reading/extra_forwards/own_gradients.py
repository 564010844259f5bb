"""The error of a forward that takes a gradient itself, such as forces from an energy, and runs without gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["own_gradients_explained"]


@contextmanager
def own_gradients_explained(model: nn.Module) -> Iterator[None]:
    """Raise an error that says what to do where a forward without gradient fails for lack of one.

    Args:
        model: What runs in the block.

    Raises:
        RuntimeError: In place of the one of ``torch.autograd.grad``.
    """
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError(
            f"The forward of {type(model).__name__} takes a gradient itself (`torch.autograd.grad`), as for forces. "
            "But the teacher, the first look at each network, and the validation of a Trainer run without gradient. "
            "Take it inside `with torch.enable_grad():` in that forward, or name the network in front of the gradient "
            f"as `student_root`. torch said: {error}"
        ) from error
