r"""The polar factor U Vᵀ of a matrix U S Vᵀ: the nearest matrix with orthonormal rows (columns, if those are fewer).

On a CPU it comes from the thin SVD. On other devices an SVD is slow and makes the host wait, so there it comes from
matrix products alone: the Newton-Schulz iteration, each step an odd polynomial of degree five, with the coefficients
that bring singular values to 1 fastest ("Polar Express", arXiv 2505.16932). The number of steps is fixed. Convergence
need not be checked on the device: each step maps every singular value by the same polynomial, so what the steps do to
every number between 0 and 1 is known beforehand. A test checks it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["polar_factor"]

#: Coefficients of s, s³ and s⁵. Singular values from 1e-5 to 1 come to 1 by these steps; those of rounding stay near 0.
#: Each step has the least largest error |p(s) - 1| on the interval that the steps before leave, with two changes for
#: the sake of rounding. The end of the interval is moved up by 2 %, because the polynomials are steep there. Its start
#: is at least a tenth of the old end: otherwise some large singular values are mapped near 0, and lose their digits on
#: the way back.
EXPRESS: tuple[tuple[float, float, float], ...] = (
    (5.530254486059, -13.218132011641, 8.918216250780),
    (3.787577032279, -4.246382953691, 1.343877822860),
    (3.787577032279, -4.246382953691, 1.343877822860),
    (3.787577032279, -4.246382953691, 1.343877822860),
    (3.787577032279, -4.246382953691, 1.343877822860),
    (3.787577032279, -4.246382953691, 1.343877822860),
    (3.787577032279, -4.246382953691, 1.343877822860),
    (3.648021656593, -4.003802431681, 1.257796143074),
    (2.072818978391, -1.422821458889, 0.371889339465),
)
#: The limit of those coefficients, with cubic convergence near 1.
LAST = (15 / 8, -10 / 8, 3 / 8)
LAST_STEPS = 2


def polar_factor(matrix: Tensor) -> Tensor:
    """The polar factor U Vᵀ of matrices ``(..., N, M)``, without autograd.

    Where the rank r is below min(N, M), it is the partial isometry of rank r, which is unique: directions that the
    matrix does not determine stay 0 instead of being chosen by rounding. A zero row or column stays zero.

    Args:
        matrix: Float32 or float64, of any scale. One with values that are not finite gives NaN, and raises nothing.

    Returns:
        ``(..., N, M)``. Its singular values are 1, or 0 where those of the matrix are rounding. On devices other than a
        CPU, singular values below 1e-5 of the largest become some value between 0 and 1.

    Example:
        >>> import torch
        >>> from lightning_otrt.transport.polar import polar_factor
        >>> rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
        >>> stretched = rotation * torch.tensor([3.0, 2.0, 1.0, 0.5])
        >>> bool((polar_factor(stretched) - rotation).abs().max() < 1e-6)
        True
    """
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        # In units of its own norm no matrix is too small or too large for products of five.
        norm = torch.linalg.matrix_norm(matrix)[..., None, None]
        fits = norm.isfinite()
        matrix = torch.where(fits, matrix / torch.where(norm > 0, norm, 1.0), 0.0)
        factor = _by_decomposition(matrix) if matrix.device.type == "cpu" else newton_schulz(matrix)
        return torch.where(fits, factor, torch.nan)


def _by_decomposition(matrix: Tensor) -> Tensor:
    """From the thin SVD, without the directions at the level of rounding."""
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # LAPACK gives up on some rare matrices, which is no reason to end a training.
        return newton_schulz(matrix)
    # The threshold of `torch.linalg.matrix_rank`.
    threshold = s[..., :1] * (max(matrix.shape[-2:]) * torch.finfo(s.dtype).eps)
    return (u * (s > threshold).to(u.dtype)[..., None, :]) @ vh


def newton_schulz(matrix: Tensor) -> Tensor:
    """From matrix products alone; a zero matrix stays zero.

    Args:
        matrix: ``(..., N, M)`` with singular values up to 1, such as one of Frobenius norm 1.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return newton_schulz(matrix.mT).mT
    scale: Tensor | None = None
    for a, b, c in (*EXPRESS, *[LAST] * LAST_STEPS):
        gram = matrix @ matrix.mT
        square = gram @ gram
        if scale is None:
            # (Σ s⁸)^⅛ is at least the largest singular value, and nearer to it than the Frobenius norm.
            bound = torch.linalg.matrix_norm(square)[..., None, None].sqrt()
            scale = torch.where(bound > 0, bound, 1.0).reciprocal()
            matrix, gram, square = matrix * scale.sqrt(), gram * scale, square * scale.square()
        matrix = torch.add(a * matrix, torch.add(b * gram, square, alpha=c) @ matrix)
    return matrix
