"""What rotations cost beside Sinkhorn plans. ``python -m benchmarks.orthogonal`` compares ways to a polar factor.

Processor time of one thread, medians of interleaved rounds. The calls of :func:`calls`, from neurons to value and
gradient, are a part of ``benchmarks.speed``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.steps import engine_step
from benchmarks.timing import Quartiles, ratios, rounds
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.orthogonal import OrthogonalAlignment
from lightning_otrt.transport.polar import newton_schulz, polar_factor
from lightning_otrt.transport.sinkhorn import TRAINING_ITERATIONS, sinkhorn_plan

#: (student neurons, teacher neurons)
WIDTHS = ((128, 128), (256, 512), (512, 512), (1024, 512), (2048, 2048))
EPSILON = 0.01
SINKHORN, SVD = "cold Sinkhorn", "SVD"


def by_gram(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(C Cᵀ)^-½ C from the eigenvectors of the smaller Gram matrix, which knows singular values to half the digits."""
    if matrix.shape[0] > matrix.shape[1]:
        return by_gram(matrix.mT, dtype).mT
    wide = matrix.to(dtype or matrix.dtype)
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    least = squares[-1] * (torch.finfo(squares.dtype).eps * matrix.shape[0])
    inverse = torch.where(squares > least, squares.clamp_min(least).rsqrt(), 0.0)
    return (((vectors * inverse) @ vectors.mT) @ wide).to(matrix.dtype)


def neurons(rows: int, columns: int, observations: int) -> tuple[Tensor, Tensor]:
    """Student and teacher neurons with a common part, whose spectrum falls as that of a layer does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(columns, observations, generator=generator)
    x = x * torch.arange(1, columns + 1)[:, None] ** -0.5
    x = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0] @ x
    mixed = torch.randn(rows, columns, generator=generator) @ x / columns**0.5
    return mixed + mixed.std() * torch.randn(rows, observations, generator=generator), x


def polar_factors(rows: int, columns: int, seconds: float) -> dict[str, list[float]]:
    """Times of the methods on one matrix."""
    y, x = neurons(rows, columns, 2 * max(rows, columns))
    coupling, rule = OrthogonalAlignment(), get_cost("correlation")
    sums = coupling.sums(y, x)
    cost = rule.matrix(sums, rule.energy(x))[None]
    matrix = sums[-1] / torch.linalg.matrix_norm(sums[-1])
    square = matrix if rows <= columns else matrix.mT
    methods: dict[str, Callable[[], object]] = {
        "one product": lambda: square @ square.mT,
        SINKHORN: lambda: sinkhorn_plan(cost, EPSILON, iterations=TRAINING_ITERATIONS),
        SVD: lambda: polar_factor(matrix),
        "Newton-Schulz": lambda: newton_schulz(matrix),
        "eigenvectors": lambda: by_gram(matrix),
        "eigenvectors, float64": lambda: by_gram(matrix, torch.float64),
    }
    if max(rows, columns) > 1024:
        # Half a minute a round.
        del methods["eigenvectors, float64"]
    return rounds(methods, seconds=seconds, least=3)


def errors(rows: int, columns: int) -> dict[str, float]:
    """Largest error of each method against the decomposition in float64, relative to the size of an entry."""
    y, x = neurons(rows, columns, 2 * max(rows, columns))
    matrix = y @ x.mT
    matrix = matrix / torch.linalg.matrix_norm(matrix)
    exact = polar_factor(matrix.double())
    found = {SVD: polar_factor(matrix), "Newton-Schulz": newton_schulz(matrix), "eigenvectors": by_gram(matrix)}
    return {name: float((factor - exact).norm() / exact.norm()) for name, factor in found.items()}


def calls(shape: tuple[int, int, int], seconds: float) -> dict[str, dict[str, tuple[float, Quartiles]]]:
    """Calls of the engine with a rotation: milliseconds, and the ratio to the same call with a Sinkhorn plan.

    Args:
        shape: Student neurons, teacher neurons, observations.
        seconds: Time to spend on each kind of call.

    Returns:
        By kind: ``"cold"`` and ``"warm"`` calls solve, without and with an earlier plan; the others do not.
    """
    kinds = {
        "cold": (True, True, 0.0),
        "warm": (True, False, 0.0),
        "between": (False, False, 0.0),
        "running": (False, False, 0.98),
    }
    found: dict[str, dict[str, tuple[float, Quartiles]]] = {}
    for kind, (solve, cold, memory) in kinds.items():
        steps = {
            plan: engine_step(shape, "correlation", memory, solve, plan=plan, cold=cold)
            for plan in ("sinkhorn", "orthogonal")
        }
        taken = rounds(steps, seconds=seconds, least=5)
        found[kind] = {
            plan: (1e3 * Quartiles.of(taken[plan]).median, ratios(taken, plan, "sinkhorn")) for plan in steps
        }
    return found


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row")
    parser.add_argument("--largest", type=int, default=2048, help="largest width")
    options = parser.parse_args()
    torch.set_num_threads(1)
    widths = [pair for pair in WIDTHS if max(pair) <= options.largest]
    found = {pair: polar_factors(*pair, options.seconds) for pair in widths}
    names = list(next(iter(found.values())))
    print("Milliseconds of a polar factor\n")
    print(
        table(
            ["N × M", *names],
            (
                [f"{rows} × {columns}"]
                + [f"{1e3 * Quartiles.of(taken[name]).median:.3g}" if name in taken else "" for name in names]
                for (rows, columns), taken in found.items()
            ),
        )
    )
    print("\nRelative error in float32, on spectra that fall\n")
    wrong = {pair: errors(*pair) for pair in widths if max(pair) <= 1024}
    methods = list(next(iter(wrong.values())))
    print(
        table(
            ["N × M", *methods],
            ([f"{r} × {c}", *(f"{row[name]:.1g}" for name in methods)] for (r, c), row in wrong.items()),
        )
    )


if __name__ == "__main__":
    main()
