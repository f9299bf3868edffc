"""Softmax attention by blocks of queries, with a hand-written backward pass (FlashAttention-2's; Dao 2023).

Only the keys that a block's queries can see take part: half the square when causal, a band with a window, and the
sinks. Saved are q, k, v, the output and each row's log-normaliser; weights are recomputed, so memory grows with T, not
T^2. Blocks that take equally many keys run in one loop, so that the program does not grow with T.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slm.attention.spans import Block, Shape, block_at, loops, visible


def blocked_attention(q, k, v, documents, sink_logits, forget, shape: Shape):
    """See `softmax_attention`. q: (B, T, H, K), k: (B, T, G, K), v: (B, T, G, V) -> (B, T, H, V).

    documents: (B, T) integers, or None: keys of another number are not seen. With sinks it must be the index of the
    document's first token. forget: (B, T, H, 2) of `cumulative_forget`, or None.
    """
    B, T, H, K = q.shape
    G, R = k.shape[2], H // k.shape[2]
    # Heads lead from here on, so that every product below is a plain batched matrix product.
    q = jnp.moveaxis(q.reshape(B, T, G, R, K), 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    sink = None if sink_logits is None else sink_logits.astype(jnp.float32).reshape(G, R)
    if forget is not None:
        forget = tuple(jnp.moveaxis(forget.reshape(B, T, G, R, 2), (4, 1), (0, 4)))
    out = _attention(q, k, v, documents, sink, forget, shape)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, H, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxV, documents, sink_GxR, forget, shape):
    return _forward(q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxV, documents, sink_GxR, forget, shape)[0]


def _forward(q, k, v, documents, sink, forget, shape):
    def attend(_, block: Block):
        _, logits = _logits(q, k, documents, forget, block, shape)
        top = logits.max(-1)
        if sink is not None:
            top = jnp.maximum(top, sink[:, :, None])
        weights = jnp.exp(logits - top[..., None])
        total = weights.sum(-1)
        if sink is not None:
            total += jnp.exp(sink[:, :, None] - top)
        out = _einsum("BGRTS,BGSV->BGRTV", weights.astype(v.dtype), block.keys(v, 2))
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, outputs = _run(attend, None, q, documents, shape)
    # Named, so that a remat policy can keep them: from these the backward pass needs no second forward pass.
    out, log_z = (checkpoint_name(x, "attention") for x in outputs)
    return out, (q, k, v, documents, sink, forget, out, log_z)


def _backward(shape, residuals, d_out):
    q, k, v, documents, sink, forget, out, log_z = residuals
    # sum_j p_j dp_j of the softmax's Jacobian, from the output alone (Dao et al. 2022, eq. 4).
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def owe(totals, block: Block):
        d_k, d_v, d_keys_forget = totals
        capped, logits = _logits(q, k, documents, forget, block, shape)
        d_out_rows = block.rows(d_out, 3)
        weights = jnp.exp(logits - block.rows(log_z, 3)[..., None])
        d_weights = _einsum("BGRTV,BGSV->BGRTS", d_out_rows, block.keys(v, 2))
        d_logits = weights * (d_weights - block.rows(inner, 3)[..., None])
        d_rows_forget = None
        if forget is not None:
            # Both summed up from the same numbers, so that what a query owes to itself cancels out.
            d_rows_forget, d_keys_forget = d_logits.sum(-1), block.add(d_keys_forget, -d_logits.sum(-2))
        if shape.softcap is not None:
            d_logits *= 1 - (capped / shape.softcap) ** 2
        # Materialised once: XLA would otherwise recompute the exponentials inside each product's transposing copy.
        weights, d_logits = jax.lax.optimization_barrier(
            (weights.astype(v.dtype), (d_logits * shape.scale).astype(q.dtype))
        )
        d_q = _einsum("BGRTS,BGSK->BGRTK", d_logits, block.keys(k, 2)).astype(q.dtype)
        # Transposed products: the operand that XLA:CPU copies to transpose is then the small one, not (T, S).
        d_k = block.add(d_k, _einsum("BGRTK,BGRTS->BGKS", block.rows(q, 3), d_logits))
        d_v = block.add(d_v, _einsum("BGRTV,BGRTS->BGVS", d_out_rows, weights))
        return (d_k, d_v, d_keys_forget), (d_q, d_rows_forget)

    d_k, d_v = (jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32) for x in (k, v))
    totals = d_k, d_v, None if forget is None else jnp.zeros(log_z.shape, jnp.float32)
    (d_k, d_v, d_keys_forget), (d_q, d_rows_forget) = _run(owe, totals, q, documents, shape)
    d_sink = None if sink is None else -(jnp.exp(sink[:, :, None] - log_z) * inner).sum((0, 3))
    d_k, d_v = d_k.swapaxes(2, 3).astype(k.dtype), d_v.swapaxes(2, 3).astype(v.dtype)
    # Of the two parts of `forget`, the low one is only the rounding of the high one.
    d_forget = None if forget is None else (d_rows_forget + d_keys_forget, jnp.zeros_like(d_keys_forget))
    return d_q, d_k, d_v, None, d_sink, d_forget


_attention.defvjp(_forward, _backward)


def _run(step: Callable, totals, q, documents, shape: Shape):
    """(totals, rows) of `step(totals, block) -> (totals, rows)` over all blocks; rows are joined along axis 3, that of
    the queries."""
    B, _, _, T = q.shape[:4]
    pieces = []
    for loop in loops(T, shape):

        def turn(totals, at, loop=loop):
            return step(totals, block_at(loop, *at, B, T, documents, shape))

        if len(loop.starts) == 1:
            totals, rows = turn(totals, (loop.starts[0], loop.firsts[0]))
        else:
            totals, rows = jax.lax.scan(turn, totals, (jnp.array(loop.starts), jnp.array(loop.firsts)))
            rows = jax.tree.map(lambda x: jax.lax.collapse(jnp.moveaxis(x, 0, 3), 3, 5), rows)
        pieces.append(rows)
    return totals, jax.tree.map(lambda *x: jnp.concatenate(x, 3), *pieces)


def _logits(q, k, documents, forget, block: Block, shape: Shape):
    """Scaled and capped logits (B, G, R, T, S) float32 of one block, and these with gates and mask."""
    capped = _einsum("BGRTK,BGSK->BGRTS", block.rows(q, 3), block.keys(k, 2)) * shape.scale
    if shape.softcap is not None:
        capped = shape.softcap * jnp.tanh(capped / shape.softcap)
    logits = capped
    if forget is not None:
        high, low = (block.rows(x, 3)[..., None] - block.keys(x, 3)[..., None, :] for x in forget)
        logits += high + low
    i, j = block.positions()
    keep, begin = True, 0
    if documents is not None:
        begin = block.keys(documents, 1)[:, None, :]
        keep = block.rows(documents, 1)[..., None] == begin
    if block.needed is not None:
        keep &= block.needed[:, None, :]
    keep &= visible(i, j, shape.causal, shape.window, j - begin < shape.sinks if shape.sinks else False)
    # Finite, so that a row without any key stays NaN-free; it underflows to exactly 0 in every other row.
    return capped, jnp.where(keep[:, None, None], logits, -1e30)


def _einsum(equation: str, *operands: Any):
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
