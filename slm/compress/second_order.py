"""One matrix changed input by input, where the weights that are still free make up for what each change breaks.

What is minimised is the error of the layer's outputs, ||X W - X W'||^2, whose Hessian for each output is H = X^T X
(Optimal Brain Surgeon, Hassibi & Stork 1993). Going through the inputs in a fixed order, all outputs can share one
factor of H^-1 (GPTQ, Frantar et al. 2022, section 3, step 3; SparseGPT, Frantar & Alistarh 2023, section 3.2).
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from slm.compress.schemes import Scheme
from slm.compress.sparsity import keep_highest, parse_pattern
from slm.errors import ConfigError
from slm.models.quantized import spread

BLOCK = 128
"""Inputs whose effect on all later ones is added up and applied at once: a matrix product instead of many outer ones
(GPTQ, section 3, step 2; the values are the same)."""
DAMPING = 0.01
"""Share of H's mean diagonal that is added to its diagonal, as in GPTQ and SparseGPT."""


class Change(Protocol):
    """What weights become. Hashable, and equal to those that do the same, so that it is compiled once."""

    size: int | None
    """Inputs that are decided about together; None: as many as come, at most BLOCK."""

    def begin(self, rows_NxO, diagonal_N, given: Any) -> Any:
        """Decides about inputs that come next: their weights now, their part of the factor's diagonal and of `given`.
        Returns a pytree for `row`."""

    def row(self, decided: Any, i, row_O):
        """The new weights (O,) of the i-th of those inputs, which by now has taken up the errors of those before."""


@jax.jit
def factor(gram_IxI, damping=DAMPING):
    """Upper triangular U (I, I) with U^T U = H^-1, H = gram + damping * mean(diag(gram)) * identity.

    An input that is always zero gets 1 on the diagonal. Not finite if H is not positive definite: damp more.
    """
    gram = gram_IxI.astype(jnp.float32)
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    H = gram + jnp.diag(jnp.where(dead, 1, 0) + damping * jnp.mean(diagonal))
    # H = R R^T with R upper triangular is Cholesky's factor in reversed order; then H^-1 = R^-T R^-1, without inverting
    # H itself.
    R = jnp.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(R, jnp.eye(len(R)), lower=False)


@functools.partial(jax.jit, static_argnums=2)
def solve(kernel_IxO, factor_IxI, change: Change, given: Any = None):
    """Changes all weights of a matrix, input by input.

    Args:
      kernel_IxO: weights.
      factor_IxI: of `factor`.
      change: what they become; I must be a multiple of its size.
      given: pytree of (I, ...) arrays, whose part for its inputs `change` gets.

    Returns:
      (I, O) float32 weights, and what `change` decided, stacked over its groups (groups, ...); None if change.size is.
    """
    inputs, U = len(kernel_IxO), factor_IxI
    block = BLOCK if change.size is None else change.size * max(1, BLOCK // change.size)
    weights, parts = kernel_IxO.astype(jnp.float32), []
    if inputs >= block:
        starts = jnp.arange(inputs // block) * block
        weights, decided = jax.lax.scan(
            lambda w, start: _solve_block(w, U, change, given, start, block), weights, starts
        )
        parts.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), decided))
    if rest := inputs % block:
        weights, decided = _solve_block(weights, U, change, given, inputs - rest, rest)
        parts.append(decided)
    if change.size is None:
        return weights, None
    return weights, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def _solve_block(weights_IxO, U, change, given, start, block):
    """Changes the inputs from `start`, and lets all that follow make up for it."""
    rows = jax.lax.dynamic_slice_in_dim(weights_IxO, start, block)
    across = jax.lax.dynamic_slice_in_dim(U, start, block)
    own = jax.lax.dynamic_slice_in_dim(across, start, block, 1)
    given = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, block), given)
    size = block if change.size is None else change.size

    def group(carry, first):
        rows, _ = carry
        part = lambda a: jax.lax.dynamic_slice_in_dim(a, first, size)  # noqa: E731
        decided = change.begin(part(rows), part(jnp.diagonal(own)), jax.tree.map(part, given))

        def one(i, carry):
            rows, errors = carry
            at = first + i
            new = change.row(decided, i, rows[at])
            error = (rows[at] - new) / own[at, at]
            later = jnp.where(jnp.arange(block) > at, own[at], 0)
            rows = (rows - later[:, None] * error[None]).at[at].set(new)
            return rows, errors.at[at].set(error)

        return jax.lax.fori_loop(0, size, one, carry), decided

    (rows, errors), decided = jax.lax.scan(group, (rows, jnp.zeros_like(rows)), jnp.arange(0, block, size))
    later = jnp.where(jnp.arange(len(weights_IxO)) >= start + block, across, 0)
    weights = jax.lax.dynamic_update_slice_in_dim(weights_IxO, rows, start, 0)
    return weights - jnp.matmul(later.T, errors, precision="highest"), decided


@dataclass(frozen=True)
class Drop:
    """Weights become zero where w^2 / U_ii^2, what that costs, is lowest (SparseGPT, equation 3)."""

    sparsity: float
    """Share of zeros among all weights that are decided about together."""
    pattern: tuple[int, int] | None = None
    """(N, M): at most N of M inputs stay, for each output."""

    @property
    def size(self) -> int | None:
        return None if self.pattern is None else self.pattern[1]

    def begin(self, rows, diagonal, given):
        costs = jnp.square(rows / diagonal[:, None])
        if self.pattern is None:
            return keep_highest(costs.reshape(-1), self.sparsity).reshape(costs.shape)
        n, m = self.pattern
        return keep_highest(costs.T, 1 - n / m).T

    def row(self, kept, i, row):
        return jnp.where(kept[i], row, 0)


@dataclass(frozen=True)
class Round:
    """Weights go to a grid, which is fitted to a group when its turn comes, or given."""

    scheme: Scheme
    size: int | None
    """Inputs in a group; None: grids are given, (scale (I, O), zero (I, O) or None)."""

    def begin(self, rows, diagonal, given):
        return given if self.size is None else self.scheme.fit(rows)

    def row(self, decided, i, row):
        scale, zero = jax.tree.map(lambda a: a[i if self.size is None else 0][None], decided)
        return self.scheme.fake(row[None], scale, zero)[0]


def sparsegpt(kernel_IxO, gram_IxI, sparsity: float, pattern: str = "unstructured", damping: float = DAMPING):
    """A matrix with zeros, the rest updated so that its outputs change little (SparseGPT, Frantar & Alistarh 2023).

    Args:
      kernel_IxO: weights.
      gram_IxI: X^T X of its inputs.
      sparsity: share of zeros, the same in every BLOCK of inputs; of no meaning for N:M.
      pattern: `unstructured` or `N:M`.
      damping: see `factor`.

    Returns (I, O) float32. Raises ConfigError for another pattern.
    """
    kind, numbers = parse_pattern(pattern)
    if kind != "n:m" and pattern != "unstructured":
        raise ConfigError(f"pattern = {pattern!r}: sparsegpt makes unstructured zeros, or N:M such as 2:4")
    change = Drop(0.0, numbers) if kind == "n:m" else Drop(float(sparsity))
    if change.size is not None and len(kernel_IxO) % change.size:
        raise ConfigError(
            f"pattern = {pattern}: {change.size} does not divide the {len(kernel_IxO)} inputs of a matrix"
        )
    values, _ = solve(_alive(kernel_IxO, gram_IxI), factor(gram_IxI, damping), change)
    return values


def gptq(kernel_IxO, gram_IxI, scheme: Scheme, damping: float = DAMPING, act_order: bool = False):
    """A matrix on a grid, each rounding error made up for by inputs that are rounded later (GPTQ, Frantar et al. 2022).

    Args:
      kernel_IxO: weights.
      gram_IxI: X^T X of its inputs.
      scheme: the grid.
      damping: see `factor`.
      act_order: take inputs in falling order of their energy. Groups stay where they are in the matrix, with scales
        fitted before anything is rounded; otherwise a group's scale is fitted when its turn comes.

    Returns:
      (I, O) float32 values on the grid; scale and zero as scheme.fit gives them: scheme.pack(*gptq(...)) is exact.

    Raises ConfigError where groups do not divide the inputs.
    """
    scheme.check("a matrix", len(kernel_IxO))
    kernel = _alive(kernel_IxO, gram_IxI).astype(jnp.float32)
    if scheme.group_size and not act_order:
        values, (scale, zero) = solve(kernel, factor(gram_IxI, damping), Round(scheme, scheme.group_size))
        return values, scale[:, 0], None if zero is None else zero[:, 0]
    scale, zero = scheme.fit(kernel)
    order = jnp.argsort(-jnp.diagonal(gram_IxI)) if act_order else jnp.arange(len(kernel))
    given = jax.tree.map(lambda a: jnp.broadcast_to(spread(a, len(kernel)), kernel.shape)[order], (scale, zero))
    U = factor(gram_IxI[order][:, order], damping)
    values, _ = solve(kernel[order], U, Round(scheme, None), given)
    return values[jnp.argsort(order)], scale, zero


def _alive(kernel, gram):
    """Weights of inputs that are always zero say nothing: zero, so that they do not stretch a grid."""
    return jnp.where(jnp.diagonal(gram)[:, None] == 0, 0, kernel)
