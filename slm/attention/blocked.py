"""Softmax attention by blocks of queries, with a hand-written backward pass (FlashAttention-2's; Dao 2023).

Only the keys that a block's queries can see take part: half the square when causal, a band with a window. Saved are
q, k, v, the output and each row's log-normaliser; weights are recomputed, so memory grows with T, not T^2.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128
"""Queries handled at once."""


class Shape(NamedTuple):
    """The static part of a request."""

    causal: bool
    window: int | None
    sinks: int
    softcap: float | None
    scale: float


def visible(i, j, causal, window, sinks):
    """Whether query position i sees key position j, elementwise."""
    keep = j <= i if causal else jnp.ones(jnp.broadcast_shapes(i.shape, j.shape), bool)
    if window is not None:
        near = i - j < window if causal else jnp.abs(i - j) < window
        keep &= near | (j < sinks)
    return keep


def blocked_attention(q, k, v, segment_ids, sink_logits, shape: Shape):
    """See `softmax_attention`. q: (B, T, H, K), k: (B, T, G, K), v: (B, T, G, V) -> (B, T, H, V)."""
    B, T, H, K = q.shape
    G, R = k.shape[2], H // k.shape[2]
    # Heads lead from here on, so that every product below is a plain batched matrix product.
    q = jnp.moveaxis(q.reshape(B, T, G, R, K), 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    sink = None if sink_logits is None else sink_logits.astype(jnp.float32).reshape(G, R)
    out = _attention(q, k, v, segment_ids, sink, shape)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, H, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxV, segment_ids, sink_GxR, shape):
    return _forward(q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxV, segment_ids, sink_GxR, shape)[0]


def _forward(q, k, v, segment_ids, sink, shape):
    outs, normalisers = [], []
    for rows, spans in _blocks(q.shape[3], shape):
        logits = _logits(q, k, segment_ids, rows, spans, shape)
        top = logits.max(-1)
        if sink is not None:
            top = jnp.maximum(top, sink[:, :, None])
        weights = jnp.exp(logits - top[..., None])
        total = weights.sum(-1)
        if sink is not None:
            total += jnp.exp(sink[:, :, None] - top)
        out = _einsum("BGRTS,BGSV->BGRTV", weights.astype(v.dtype), _take(v, spans, 2))
        outs.append((out / total[..., None]).astype(q.dtype))
        normalisers.append(top + jnp.log(total))
    # Named, so that a remat policy can keep them: from these the backward pass needs no second forward pass.
    out = checkpoint_name(jnp.concatenate(outs, 3), "attention")
    log_z = checkpoint_name(jnp.concatenate(normalisers, 3), "attention")
    return out, (q, k, v, segment_ids, sink, out, log_z)


def _backward(shape, residuals, d_out):
    q, k, v, segment_ids, sink, out, log_z = residuals
    # sum_j p_j dp_j of the softmax's Jacobian, from the output alone (Dao et al. 2022, eq. 4).
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    d_q, (d_k, d_v) = [], (jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32) for x in (k, v))
    for rows, spans in _blocks(q.shape[3], shape):
        logits = _logits(q, k, segment_ids, rows, spans, shape)
        weights = jnp.exp(logits - log_z[..., rows, None])
        d_weights = _einsum("BGRTV,BGSV->BGRTS", d_out[..., rows, :], _take(v, spans, 2))
        d_logits = weights * (d_weights - inner[..., rows, None])
        if shape.softcap is not None:
            d_logits *= 1 - (jnp.where(logits > -1e29, logits, 0) / shape.softcap) ** 2
        # Materialised once: XLA would otherwise recompute the exponentials inside each product's transposing copy.
        weights, d_logits = jax.lax.optimization_barrier(
            (weights.astype(v.dtype), (d_logits * shape.scale).astype(q.dtype))
        )
        d_q.append(_einsum("BGRTS,BGSK->BGRTK", d_logits, _take(k, spans, 2)).astype(q.dtype))
        # Transposed products: the operand that XLA:CPU copies to transpose is then the small one, not (T, S).
        d_k = _add(d_k, _einsum("BGRTK,BGRTS->BGKS", q[..., rows, :], d_logits), spans)
        d_v = _add(d_v, _einsum("BGRTV,BGRTS->BGVS", d_out[..., rows, :], weights), spans)
    d_sink = None if sink is None else -(jnp.exp(sink[:, :, None] - log_z) * inner).sum((0, 3))
    d_k, d_v = d_k.swapaxes(2, 3).astype(k.dtype), d_v.swapaxes(2, 3).astype(v.dtype)
    return jnp.concatenate(d_q, 3), d_k, d_v, None, d_sink


_attention.defvjp(_forward, _backward)


def _blocks(T: int, shape: Shape):
    """For each block of queries: (slice of rows, spans (start, stop) of keys that any of them can see)."""
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        last = stop if shape.causal else (T if shape.window is None else min(T, stop + shape.window - 1))
        first = 0 if shape.window is None else max(0, start - shape.window + 1)
        sunk = min(shape.sinks, first)
        yield slice(start, stop), ([(0, sunk)] if sunk else []) + [(first, last)]


def _logits(q, k, segment_ids, rows, spans, shape: Shape):
    """Scaled, capped, masked logits (B, G, R, T, S) float32 of one block."""
    logits = _einsum("BGRTK,BGSK->BGRTS", q[..., rows, :], _take(k, spans, 2)) * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * jnp.tanh(logits / shape.softcap)
    i = jnp.arange(rows.start, rows.stop)[:, None]
    j = _take(jnp.arange(k.shape[2]), spans, 0)[None, :]
    keep = visible(i, j, shape.causal, shape.window, shape.sinks)[None]
    if segment_ids is not None:
        keep &= segment_ids[:, rows, None] == _take(segment_ids, spans, 1)[:, None, :]
    # Finite, so that a row without any key stays NaN-free; it underflows to exactly 0 in every other row.
    return jnp.where(keep[:, None, None], logits, -1e30)


def _einsum(equation: str, *operands: Any):
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _take(x, spans, axis):
    parts = [jax.lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in spans]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _add(total, part, spans):
    """Add `part`, whose keys are those of `spans` one after the other, into `total` along the key axis, the last."""
    at = 0
    for start, stop in spans:
        piece = part[..., at : at + stop - start]
        total = total.at[..., start:stop].add(piece)
        at += stop - start
    return total
