"""The transport distance by OTT-JAX, compiled, on one thread, where it is installed."""

from __future__ import annotations

import os
from collections.abc import Callable

# Read when JAX starts its CPU client; all methods have one thread.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from ott.geometry.geometry import Geometry
from ott.solvers import linear

#: From student and teacher points to the ground cost.
GroundCost = Callable[[Array, Array], Array]


def squared_distances(y: Array, x: Array) -> Array:
    """‖y - x‖²."""
    return jnp.maximum((y * y).sum(1)[:, None] + (x * x).sum(1)[None] - 2 * y @ x.T, 0)


def distances(y: Array, x: Array) -> Array:
    """‖y - x‖, with a gradient of zero at zero."""
    return jnp.sqrt(jnp.maximum(squared_distances(y, x), 1e-12))


def correlations(y: Array, x: Array) -> Array:
    """1 - r."""
    y, x = (side - side.mean(1, keepdims=True) for side in (y, x))
    y, x = (side / jnp.linalg.norm(side, axis=1, keepdims=True) for side in (y, x))
    return 1 - y @ x.T


GROUND_COSTS: dict[str, GroundCost] = {
    "euclidean": distances,
    "sqeuclidean": squared_distances,
    "correlation": correlations,
}


def solver(cost: str, unit: float, epsilon: float, iterations: int) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Value and gradient of ⟨P, M⟩ with the plan held fixed; ``unit`` times the ground cost is M."""

    def value(y: Array, x: Array) -> Array:
        matrix = unit * GROUND_COSTS[cost](y, x)
        fixed = jax.lax.stop_gradient(matrix)
        geometry = Geometry(cost_matrix=fixed / fixed.mean(), epsilon=epsilon)
        # As many iterations as asked for: the threshold cannot be reached.
        solved = linear.solve(geometry, min_iterations=iterations, max_iterations=iterations, threshold=0.0)
        return jnp.vdot(jax.lax.stop_gradient(solved.matrix), matrix)

    return jax.jit(jax.value_and_grad(value))


def to_jax(array: np.ndarray) -> Array:
    """A NumPy array as one of JAX."""
    return jnp.asarray(array)
