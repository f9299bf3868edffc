"""Running sums of forgetting attention's log gates, precise enough to be subtracted (Lin et al. 2025, 2503.02130)."""

import functools

import jax
import jax.numpy as jnp


def document_starts(segment_ids_BxT) -> jax.Array:
    """(B, T) int32: index of the first token of each token's document, a run of equal ids."""
    changes = segment_ids_BxT[:, 1:] != segment_ids_BxT[:, :-1]
    at = jnp.arange(1, segment_ids_BxT.shape[1])
    return jnp.pad(jax.lax.cummax(jnp.where(changes, at, 0), axis=1), ((0, 0), (1, 0)))


def cumulative_forget(log_forget, begins, start=None) -> jax.Array:
    """F_t = sum of log_forget over the tokens of t's document up to t, without its first, whose gate forgets nothing.

    In one float32 the sum would lose what its differences are made of: a thousand gates of -15 leave steps of 1e-3
    between the numbers near it. Two floats keep 45 bits, and (high_i - high_j) + (low_i - low_j) is exact to float32.

    Args:
      log_forget: (B, T, H), <= 0.
      begins: (B, T) booleans: the first token of a document.
      start: (B, H, 2): F of the token before the first one, which continues its document unless it `begins` one.

    Returns:
      (B, T, H, 2) float32, high and low part of F. Gradients belong to the high part; the low one is its rounding.
    """
    x = jnp.where(begins[..., None], 0, log_forget.astype(jnp.float32))
    if start is None:
        return _scan(jnp.stack([x, jnp.zeros_like(x)], -1), begins)
    pairs = jnp.concatenate([start[:, None], jnp.stack([x, jnp.zeros_like(x)], -1)], 1)
    return _scan(pairs, jnp.pad(begins, ((0, 0), (1, 0))))[:, 1:]


@jax.custom_vjp
def _scan(x_BxTxHx2, begins_BxT):
    """Sums of pairs that start anew where a document begins."""

    def add(earlier, later):
        begun, a = earlier
        begins, b = later
        return begun | begins, jnp.where(begins[..., None], b, _add_pairs(a, b))

    return jax.lax.associative_scan(add, (begins_BxT[..., None], x_BxTxHx2), axis=1)[1]


def _forward(x_BxTxHx2, begins_BxT):
    return _scan(x_BxTxHx2, begins_BxT), begins_BxT


def _backward(begins_BxT, d_sums_BxTxHx2):
    """Each gate gets what all later tokens of its document got, and to the bit nothing of another document."""
    ends = jnp.pad(begins_BxT[:, 1:], ((0, 0), (0, 1)))
    flip = functools.partial(jnp.flip, axis=1)
    d_high = jnp.stack([d_sums_BxTxHx2[..., 0], jnp.zeros_like(d_sums_BxTxHx2[..., 0])], -1)
    return flip(_scan(flip(d_high), flip(ends))), None


_scan.defvjp(_forward, _backward)


def _add_pairs(a, b):
    """Sum of two numbers held as (high, low) in the last axis (Knuth's TwoSum; Dekker 1971)."""
    high = a[..., 0] + b[..., 0]
    part = high - a[..., 0]
    low = (a[..., 0] - (high - part)) + (b[..., 0] - part) + (a[..., 1] + b[..., 1])
    total = high + low
    return jnp.stack([total, low - (total - high)], -1)
