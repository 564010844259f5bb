"""A user's function as a ground cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_otrt.transport.cost import Cost, Plan, Sums, ValueAndGradient
from lightning_otrt.transport.tensor_checks import check_cost

__all__ = ["CustomCost"]


class CustomCost(Cost):
    """A user's cost: a function of raw neurons ``(N, n)`` and ``(M, n)`` that returns a differentiable ``(N, M)``.

    It need not be a sum over observations, so a running cost averages its matrices, and it has no global batch.

    Args:
        function: The function.

    Example:
        >>> CustomCost(torch.cdist).name
        'cdist'
    """

    additive = can_be_captured = False

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function
        # Not its `repr`, whose address differs from run to run.
        self.name = getattr(function, "__qualname__", type(function).__name__)

    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """Count and the matrix times the count."""
        return [y.new_full(y.shape[:-2], y.shape[-1]), self._matrix(y, x) * y.shape[-1]]

    def matrix(self, sums: Sums, energy: Tensor | None) -> Tensor:
        """The average of the matrices, weighted by their observations."""
        return sums[1] / sums[0][..., None, None]

    def check_matrix(self, matrix: Tensor) -> None:
        """See :func:`check_cost`."""
        check_cost(matrix, self.function)

    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor | None) -> ValueAndGradient:
        """⟨P, M⟩ and its gradient by autograd through the user's function.

        Raises:
            ValueError: If the cost has another shape, or no gradient with respect to the student neurons.
        """
        # Lightning validates in inference mode, which records no gradient and whose tensors autograd refuses.
        with torch.inference_mode(False), torch.enable_grad():
            y, x, matrix = (t.clone() if t.is_inference() else t for t in (y, x, plan.matrix))
            y = y.detach().requires_grad_()
            value = (matrix * self._matrix(y, x)).sum((-2, -1))
            if not value.requires_grad:
                raise ValueError(
                    f"The cost {self.function!r} does not depend on the student neurons in a differentiable way, so it "
                    "has no gradient. Compute it with torch operations on its first argument."
                )
            (gradient,) = torch.autograd.grad(value.sum(), y)
        return value.detach(), gradient

    def _matrix(self, y: Tensor, x: Tensor) -> Tensor:
        if y.dim() > 2:
            return torch.stack([self._matrix(*pair) for pair in zip(y, x, strict=True)])
        # Tensors of inference mode do not count their writes.
        watched = [] if torch.compiler.is_compiling() else [each for each in (y, x) if not each.is_inference()]
        versions = [tensor._version for tensor in watched]
        matrix = self.function(y, x)
        if versions != [tensor._version for tensor in watched]:
            raise ValueError(
                f"The cost {self.function!r} writes to its arguments in place, as `x -= x.mean()` does. These are the "
                "neurons that the rest of the step uses, too. Compute on new tensors: `x = x - x.mean()`."
            )
        expected = (y.shape[-2], x.shape[-2])
        if not isinstance(matrix, Tensor) or tuple(matrix.shape) != expected:
            got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(
                f"Expected the cost {self.function!r} to return a tensor of shape {expected}, but got {got}."
            )
        return matrix
