"""Inverse of unit lower triangular matrices by blocks, the heart of the WY / UT transform of delta rules."""

import jax
import jax.numpy as jnp

BLOCK = 8
"""Rows that forward substitution takes before blocks are merged by matrix products."""


def inverse_unit_lower(lower):
    """(I + lower)^-1 of (..., C, C) float32, zero on and above the diagonal; C is a power of two.

    Forward substitution in the blocks of the diagonal, then pairs of blocks merge: the inverse of [[A, 0], [L, B]] is
    [[A^-1, 0], [-B^-1 L A^-1, B^-1]]. Unlike a Neumann series it does not overflow where entries exceed 1. Not meant
    to be differentiated: its users know the gradient in closed form.
    """
    C = lower.shape[-1]
    size = min(BLOCK, C)
    inverse = _substitute(_blocks(lower, size, 0))
    while size < C:
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        below = -product(second, product(_blocks(lower, size, 1), first))
        inverse = join(first, below, second)
        size *= 2
    return inverse[..., 0, :, :]


def product(x, y):
    """Batched matrix product in full float32 on every device."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def join(first, below, second):
    """[[first, 0], [below, second]] of (..., s, s) blocks."""
    above = jnp.zeros_like(below)
    return jnp.concatenate([jnp.concatenate([first, above], -1), jnp.concatenate([below, second], -1)], -2)


def _blocks(matrix, size, below):
    """The (size, size) blocks on the diagonal (below = 0), or those left of every second one of them (below = 1)."""
    starts = range(size * below, matrix.shape[-1], size * (1 + below))
    return jnp.stack([matrix[..., i : i + size, i - size * below :][..., :size] for i in starts], -3)


def _substitute(lower):
    eye = jnp.eye(lower.shape[-1], dtype=lower.dtype)
    rows = [jnp.broadcast_to(eye[0], lower.shape[:-1])]
    for i in range(1, lower.shape[-1]):
        rows.append(eye[i] - (lower[..., i, :i, None] * jnp.stack(rows, -2)).sum(-2))
    return jnp.stack(rows, -2)
