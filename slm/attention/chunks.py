"""The chunked form of diagonal-decay recurrences (Yang et al. 2024, 2312.06635, section 4), with its backward pass.

Inside a chunk everything is a matrix product; from chunk to chunk goes one state. Decays only ever enter as products of
exp(log_decay) <= 1 over the tokens between a write and a read, never as quotients, so that hard decays underflow to the
right answer, zero. The forward pass keeps the states at the beginning of each block of chunks; all else is recomputed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

SUB = 16
"""Tokens of the blocks in which per-channel decays are put together by masked products."""
FLOOR = -128.0
"""exp of this is 0 in float32, so that harder decays, -inf too, may be replaced by it."""
_exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_materialised = jax.lax.optimization_barrier
"""Keeps XLA:CPU from fusing what makes a product's operand into the strided copy that the product needs."""


def chunked_decay(q, k, v, log_decay, state, chunk: int):
    """See `decay_attention`: q, k (B, T, G, K), v (B, T, H, V) -> (unscaled out (B, T, H, V), final state), float32."""
    B, T, H, V = v.shape
    if log_decay is not None and log_decay.ndim == 4:
        q, k = (jnp.repeat(x, H // q.shape[2], axis=2) for x in (q, k))
    C = min(_power_below(chunk), _power_below(2 * T - 1))
    N = -(-T // C)
    n = min(N, _at_once(B * H * C * max(q.shape[-1], V)))
    # Padding adds nothing to a state and does not let it decay.
    padding = ((0, 0), (0, -T % (n * C)), (0, 0))
    dtype = jnp.result_type(q, k, v)
    # Sums over time leave the range of float16.
    dtype = jnp.float32 if dtype == jnp.float16 else dtype
    q, k, v = (jnp.pad(x.astype(dtype), (*padding, (0, 0))) for x in (q, k, v))
    if log_decay is not None:
        log_decay = jnp.pad(log_decay.astype(jnp.float32), (*padding, (0, 0))[: log_decay.ndim])
    out, state = _chunked(q, k, v, log_decay, state, C, n)
    return out[:, :T], state


def _power_below(x: int) -> int:
    """The largest power of two that is at most x >= 1."""
    return 1 << (x.bit_length() - 1)


def _at_once(size: int) -> int:
    """How many chunks to compute side by side, of `size` elements each: on a CPU, as many as stay in its cache."""
    return max(1, 2**14 // size) if jax.default_backend() == "cpu" else 2**14


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _chunked(q_BxTxGxK, k_BxTxGxK, v_BxTxHxV, log_decay, state_BxHxKxV, C: int, n: int):
    """(out (B, T, H, V), state after all of T), by blocks of n chunks of C tokens."""
    return _forward(q_BxTxGxK, k_BxTxGxK, v_BxTxHxV, log_decay, state_BxHxKxV, C, n)[0]


def _forward(q, k, v, log_decay, state, C, n):
    advance = _scalar_forward if log_decay is None or log_decay.ndim == 3 else _channel_forward

    def step(state, i):
        after, out = advance(state, *(_take(x, i, C, n) for x in (q, k, v, log_decay)))
        return after, (_put(out, len(v)), state)

    final, (out, states) = jax.lax.scan(step, state, jnp.arange(v.shape[1] // (n * C)))
    # Named, so that a remat policy can keep them instead of running the forward pass again.
    return (_joined(out), final), (q, k, v, log_decay, checkpoint_name(states, "attention"))


def _backward(C, n, residuals, cotangents):
    *inputs, states = residuals
    d_out, d_final = cotangents
    retreat = _scalar_backward if inputs[3] is None or inputs[3].ndim == 3 else _channel_backward

    def step(d_after, now):
        i, state = now
        d_before, grads = retreat(d_after, state, *(_take(x, i, C, n) for x in (*inputs, d_out)))
        return d_before, [
            None if g is None else _put(g, len(d_out)).astype(x.dtype) for g, x in zip(grads, inputs, strict=True)
        ]

    d_state, grads = jax.lax.scan(step, d_final, (jnp.arange(len(states)), states), reverse=True)
    return *(None if g is None else _joined(g) for g in grads), d_state


_chunked.defvjp(_forward, _backward)


# Below, Z = B n counts the chunks that are taken at once; C and S are time in a chunk (or in one of its N or P parts),
# for queries and for keys. Heads stay an axis of their own, so that a mesh may shard them as well as B.


def _take(x_BxTxHxK, i, C: int, n: int):
    """Block i as (Z, H, C, ...). Transposed only here, when it is in cache."""
    if x_BxTxHxK is None:
        return None
    _, _, *rest = x_BxTxHxK.shape
    x = jax.lax.dynamic_slice_in_dim(x_BxTxHxK, i * n * C, n * C, axis=1)
    return x.reshape(-1, C, *rest).swapaxes(1, 2)


def _put(x_ZxHxCxK, B: int):
    """The inverse of `_take`: (B, n C, H, ...)."""
    x = x_ZxHxCxK.swapaxes(1, 2)
    return x.reshape(B, -1, *x.shape[2:])


def _joined(blocks_MxBxTxHxV):
    """Blocks one after the other: (B, T, H, V)."""
    x = jnp.moveaxis(blocks_MxBxTxHxV, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _pass_on(state_BxHxKxV, update_ZxHxKxV, through_ZxHxK, reverse=False):
    """(states before (after, if reverse) each chunk (Z, H, K, V), the last one (B, H, K, V)).

    The next state is through * state + update; `through` may be (Z, H, 1).
    """
    B = len(state_BxHxKxV)

    def step(state, now):
        update, through = now
        return through[..., None] * state + update, state

    chunks = [jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 0) for x in (update_ZxHxKxV, through_ZxHxK)]
    alone = len(chunks[0]) == 1
    last, states = jax.lax.scan(step, state_BxHxKxV, chunks, reverse=reverse, unroll=alone)
    return jnp.moveaxis(states, 0, 1).reshape(update_ZxHxKxV.shape), last


def _einsum(equation, *operands, dtype):
    """Product of operands rounded to the compute dtype, summed in float32."""
    return jnp.einsum(equation, *(x.astype(dtype) for x in operands), preferred_element_type=jnp.float32)


# One decay a head.


def _scalar_weights(log_decay_ZxGxRxC, C: int):
    """(between (Z, G, R, C, S), into (Z, G, R, C), out_of (Z, G, R, S), through (Z, G, R)): products of decays over the
    tokens from a write to a read, from the chunk's start to a read, from a write to its end, and over all of it."""
    causal = np.tril(np.ones((C, C), bool))
    if log_decay_ZxGxRxC is None:
        ones = jnp.ones((1, 1, 1, C))
        return causal.astype(np.float32), ones, ones, ones[..., -1]
    # Differences of sums over many tokens are inexact, but not these: multiples of 2^-8 sum without rounding, and the
    # rest is small.
    log_decay_ZxGxRxC = jnp.maximum(log_decay_ZxGxRxC, FLOOR)
    coarse = jnp.round(log_decay_ZxGxRxC * 256) / 256
    sums = [_exactly("ZGRS,CS->ZGRC", x, causal.astype(np.float32)) for x in (coarse, log_decay_ZxGxRxC - coarse)]
    between = sum(x[..., :, None] - x[..., None, :] for x in sums)
    into = jnp.exp(sum(sums))
    out_of = jnp.exp(sum(x[..., -1:] - x for x in sums))
    return jnp.exp(jnp.where(causal, between, -jnp.inf)), into, out_of, into[..., -1]


def _grouped(G: int, *arrays):
    """(Z, H, ...) -> (Z, G, R, ...)."""
    return [None if x is None else x.reshape(len(x), G, -1, *x.shape[2:]) for x in arrays]


def _ungrouped(x_ZxGxRxC):
    """(Z, G, R, ...) -> (Z, H, ...)."""
    return x_ZxGxRxC.reshape(len(x_ZxGxRxC), -1, *x_ZxGxRxC.shape[3:])


def _scalar_forward(state, q, k, v, log_decay):
    _, G, C, _ = q.shape
    v, log_decay = _grouped(G, v, log_decay)
    product = functools.partial(_einsum, dtype=v.dtype)
    between, into, out_of, through = _scalar_weights(log_decay, C)
    weights = _materialised(product("ZGCK,ZGSK->ZGCS", q, k)[:, :, None] * between)
    update = product("ZGSK,ZGRSV->ZGRKV", k, _materialised(v * out_of[..., None]))
    through = jnp.broadcast_to(through, update.shape[:3])
    states, after = _pass_on(state, _ungrouped(update), _ungrouped(through)[..., None])
    (states,) = _grouped(G, states)
    out = product("ZGRCS,ZGRSV->ZGRCV", weights, v) + into[..., None] * product("ZGCK,ZGRKV->ZGRCV", q, states)
    return after, _ungrouped(out)


def _scalar_backward(d_after, state, q, k, v, log_decay, d_out):
    _, G, C, _ = q.shape
    v, log_decay, d_out = _grouped(G, v, log_decay, d_out)
    product = functools.partial(_einsum, dtype=v.dtype)
    between, into, out_of, through = _scalar_weights(log_decay, C)
    d_read = _materialised(d_out * into[..., None])
    written = _materialised(v * out_of[..., None])
    update = product("ZGSK,ZGRSV->ZGRKV", k, written)
    d_update = product("ZGCK,ZGRCV->ZGRKV", q, d_read)
    factors = _ungrouped(jnp.broadcast_to(through, update.shape[:3]))[..., None]
    states, _ = _pass_on(state, _ungrouped(update), factors)
    d_states, d_before = _pass_on(d_after, _ungrouped(d_update), factors, reverse=True)
    states, d_states = _grouped(G, states, d_states)  # before and after each chunk

    scores = product("ZGCK,ZGSK->ZGCS", q, k)[:, :, None]
    d_weights = product("ZGRCV,ZGRSV->ZGRCS", d_out, v)
    weights, d_scores = _materialised((scores * between, (d_weights * between).sum(2)))
    read = product("ZGCK,ZGRKV->ZGRCV", q, states)
    d_written = product("ZGSK,ZGRKV->ZGRSV", k, d_states)
    d_q = product("ZGCS,ZGSK->ZGCK", d_scores, k) + product("ZGRCV,ZGRKV->ZGCK", d_read, states)
    d_k = product("ZGCS,ZGCK->ZGSK", d_scores, q) + product("ZGRSV,ZGRKV->ZGSK", written, d_states)
    d_v = product("ZGRCS,ZGRCV->ZGRSV", weights, d_out) + out_of[..., None] * d_written
    if log_decay is None:
        return d_before, (d_q, d_k, _ungrouped(d_v), None)
    # The decay of token t scales what was written before it and is read from it on. Summed pair by pair: a difference
    # of cumulative sums would leak rounding into decays that have no part in it.
    before = np.tril(np.ones((C, C), np.float32), -1)  # [t, s]: s < t
    pairs = _exactly("ZGRCS,TS->ZGRCT", _materialised(d_weights * weights), before)
    d_log = jnp.einsum("ZGRCT,CT->ZGRT", pairs, 1 - before.T)
    d_log += _exactly("ZGRC,CT->ZGRT", jnp.einsum("ZGRCV,ZGRCV->ZGRC", d_read.astype(jnp.float32), read), 1 - before.T)
    d_log += _exactly("ZGRS,TS->ZGRT", jnp.einsum("ZGRSV,ZGRSV->ZGRS", written.astype(jnp.float32), d_written), before)
    d_log += (through * (states * d_states).sum((-1, -2)))[..., None]
    return d_before, (d_q, d_k, _ungrouped(d_v), _ungrouped(d_log))


# One decay a channel.


def halves(x, m: int):
    """(..., C, K) -> (..., pairs, 2, m, K)."""
    return x.reshape(*x.shape[:-2], -1, 2, m, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale_half(x, factor, half: int):
    """x (..., C, K) with the earlier (0) or the later (1) half of each of P parts of the chunk times the part's factor,
    (..., P, K or 1)."""
    m = x.shape[-2] // (2 * factor.shape[-2])
    here = np.arange(2).reshape(2, 1, 1) == half
    return (halves(x, m) * jnp.where(here, factor[..., None, None, :], 1.0)).reshape(x.shape)


def _scale_half_backward(half, residuals, d):
    x, factor = residuals
    m = x.shape[-2] // (2 * factor.shape[-2])
    # Written out, since XLA:CPU is slow in the reduction that the gradient of a broadcast becomes.
    d_factor = (halves(x, m)[..., half, :, :] * halves(d, m)[..., half, :, :]).sum(-2)
    if factor.shape[-1] == 1:
        d_factor = d_factor.sum(-1, keepdims=True)
    return scale_half(d, factor, half), d_factor


scale_half.defvjp(lambda x, factor, half: (scale_half(x, factor, half), (x, factor)), _scale_half_backward)


def _level(c: int, m: int):
    """Which pairs (query, key) of c tokens meet at level m: neighbouring blocks of m, the query in the later one."""
    i, j = np.arange(c)[:, None], np.arange(c)[None, :]
    return (i // (2 * m) == j // (2 * m)) & (i // m % 2 == 1) & (j // m % 2 == 0)


def _inside(q, k, v, log_decay):
    """What a chunk does by itself: (its output without a state, queries times the decays from the chunk's start, keys
    times those to its end, the decays over the whole of it (Z, H, K)).

    A pair of tokens meets in one pair of neighbouring blocks of m = 1, 2, 4 ... tokens. There its decays are those to
    the query from its block's start, times those from the key to the end of its own; both grow with m by a factor for
    each block. So one exponential a token is all it takes.
    """
    Z, H, C, K = q.shape
    c = min(C, SUB)
    product = functools.partial(_einsum, dtype=v.dtype)
    through = jnp.exp(jnp.maximum(log_decay, FLOOR))  # (Z, H, blocks of m, K)
    queries, keys = q * through, k.astype(jnp.float32)
    near = jnp.eye(c) * jnp.einsum("ZHCK,ZHCK->ZHC", q, k, preferred_element_type=jnp.float32).reshape(Z, H, -1, 1, c)
    far, m = [], 1
    while m < C:
        if m < c:
            scores = product("ZHNCK,ZHNSK->ZHNCS", queries.reshape(Z, H, -1, c, K), keys.reshape(Z, H, -1, c, K))
            near = jnp.where(_level(c, m), scores, near)
        else:
            scores = product("ZHNCK,ZHNSK->ZHNCS", halves(queries, m)[:, :, :, 1], halves(keys, m)[:, :, :, 0])
            far.append(product("ZHNCS,ZHNSV->ZHNCV", scores, halves(v, m)[:, :, :, 0]))
        first, second = (halves(through, 1)[:, :, :, half, 0] for half in (0, 1))
        queries, keys, through = scale_half(queries, first, 1), scale_half(keys, second, 0), first * second
        m *= 2
    out = product("ZHNCS,ZHNSV->ZHNCV", near, v.reshape(Z, H, -1, c, v.shape[-1])).reshape(v.shape)
    for x in far:
        out += jnp.stack([jnp.zeros_like(x), x], 3).reshape(v.shape)
    return out, queries, keys, through[:, :, 0]


def _channel_forward(state, q, k, v, log_decay):
    product = functools.partial(_einsum, dtype=v.dtype)
    out, queries, keys, through = _inside(q, k, v, log_decay)
    states, after = _pass_on(state, product("ZHSK,ZHSV->ZHKV", keys, v), through)
    return after, out + product("ZHCK,ZHKV->ZHCV", queries, states)


def _channel_backward(d_after, state, q, k, v, log_decay, d_out):
    product = functools.partial(_einsum, dtype=v.dtype)
    (_, queries, keys, through), pull = jax.vjp(_inside, q, k, v, log_decay)
    states, _ = _pass_on(state, product("ZHSK,ZHSV->ZHKV", keys, v), through)
    d_states, d_before = _pass_on(d_after, product("ZHCK,ZHCV->ZHKV", queries, d_out), through, reverse=True)
    d_queries = product("ZHCV,ZHKV->ZHCK", d_out, states)
    d_keys = product("ZHSV,ZHKV->ZHSK", v, d_states)
    d_q, d_k, d_v, d_log_decay = pull((d_out, d_queries, d_keys, (states * d_states).sum(-1)))
    return d_before, (d_q, d_k, d_v + product("ZHSK,ZHKV->ZHSV", keys, d_states), d_log_decay)
