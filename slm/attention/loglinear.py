"""Log-linear attention: a decaying recurrence that keeps log T states, one for each scale of the past, and weighs them.

Guo et al. 2025 (2506.04761). The past of token t, counting from 0, is split as a Fenwick tree splits it: level 0 is t
itself; level l > 0 is a block of 2^(l-1) tokens if bit l-1 of t is set. So token j is at level floor(log2(t xor j)) + 1
of t: the nearer, the finer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from slm.attention.forget import cumulative_forget, document_starts
from slm.attention.recurrence import changes, check_shapes
from slm.attention.wy import FLOOR, log_between, sum_after, sum_before

BLOCK = 128
"""Queries handled at once where documents are packed."""


def levels_of(length: int) -> int:
    """Levels that tokens 0 ... length - 1 need for their past: floor(log2(length - 1)) + 2."""
    return (length - 1).bit_length() + 1


def log_linear_attention(
    q,
    k,
    v,
    log_decay,
    level_scale,
    *,
    scale=None,
    initial_state=None,
    form="chunked",
    chunk=64,
    segment_ids=None,
    positions=None,
):
    """out_t = scale sum_{j <= t} level_scale_{t, level(t, j)} exp(sum of log_decay after j up to t) (q_t . k_j) v_j.

    Args:
      q, k: (B, T, H, K). v: (B, T, H, V).
      log_decay: (B, T, H), <= 0 and -inf allowed.
      level_scale: (B, T, H, L), lambda of the paper's equation 8.
      scale: None means K**-0.5.
      initial_state: (B, H, S, K, V) float32, one state a level; None: zeros, as at the beginning of a text.
      form: "recurrent" token by token, the definition; "chunked" products over chunks and, between chunks, one for each
        level: O(T log T). It starts at the beginning of a text; with segment_ids it is O(T^2), by blocks of queries,
        since the levels of packed documents do not line up.
      chunk: tokens in a chunk, a power of two.
      segment_ids: (B, T) integers: where they differ from the token before, a new text begins.
      positions: (B, T) numbers of the tokens in their texts, -1 for padding, which the state ignores; None: from 0 at
        the first token and wherever a new text begins.

    Returns:
      (out (B, T, H, V) of v's dtype, final_state (B, H, S, K, V) float32; None from the chunked form).

    Raises:
      ValueError: shapes do not agree, L levels do not reach over T tokens, chunk is no power of two, or the form cannot
        serve.
    """
    B, T, H, V = v.shape
    _check(q, k, v, log_decay, level_scale, initial_state, segment_ids, positions)
    K, L = q.shape[-1], level_scale.shape[-1]
    if initial_state is None and levels_of(T) > L:
        raise ValueError(f"{L} levels reach over {2 ** (L - 1)} tokens, not over {T}: give level_scale {levels_of(T)}")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk = {chunk}: must be a power of two, as the levels are")
    scale = K**-0.5 if scale is None else scale
    log_decay, level_scale = jnp.maximum(log_decay.astype(jnp.float32), FLOOR), level_scale.astype(jnp.float32)
    if positions is None:
        first = 0 if segment_ids is None else document_starts(segment_ids)
        positions = jnp.broadcast_to(jnp.arange(T), (B, T)) - first
    if form == "recurrent":
        if initial_state is None:
            initial_state = jnp.zeros((B, H, levels_of(T) + 1, K, V), jnp.float32)
        out, state = _recurrent(q, k, v, log_decay, level_scale, initial_state, segment_ids, positions)
        return (out * scale).astype(v.dtype), state
    if form != "chunked":
        raise ValueError(f"form = {form!r}: must be recurrent or chunked")
    if initial_state is not None:
        raise ValueError("the chunked form begins where a text does: give no initial_state, or form = recurrent")
    if segment_ids is None:
        out = jax.checkpoint(functools.partial(_chunked, C=min(chunk, T)))(q, k, v, log_decay, level_scale)
    else:
        out = _parallel(q, k, v, log_decay, level_scale, segment_ids, positions)
    return (out * scale).astype(v.dtype), None


def _check(q, k, v, log_decay, level_scale, initial_state, segment_ids, positions):
    (B, T, H, V), K = v.shape, q.shape[-1]
    expected = {
        "q": (q, (B, T, H, K)),
        "k": (k, (B, T, H, K)),
        "log_decay": (log_decay, (B, T, H)),
        "level_scale": (level_scale, (B, T, H, level_scale.shape[-1])),
        "segment_ids": (segment_ids, (B, T)),
        "positions": (positions, (B, T)),
    }
    if initial_state is not None:
        expected["initial_state"] = initial_state, (B, H, *initial_state.shape[2:3], K, V)
    check_shapes(expected)


def _recurrent(q, k, v, log_decay, level_scale, state, segment_ids, positions):
    S, L = state.shape[2], level_scale.shape[-1]
    level = jnp.arange(S)
    # Beyond L there is nothing yet, unless the text is longer than the levels reach.
    weights = jnp.pad(level_scale, ((0, 0),) * 3 + ((0, max(0, S - L)),))[..., :S]
    starts = jnp.zeros(v.shape[:2], bool) if segment_ids is None else changes(segment_ids)

    def token(state, now):
        q, k, v, log_decay, weight, position, start = now
        state = jnp.where(start[:, None, None, None, None], 0, state)
        state *= jnp.exp(log_decay)[:, :, None, None, None]
        state = state.at[:, :, 0].set(k[..., None] * v[..., None, :])
        out = jnp.einsum("BHK,BHL,BHLKV->BHV", q, weight, state)
        # For the next token, levels 0 ... z become one block at z + 1, with z the ones that `position` ends with.
        ends_with_ones = (position[:, None] + 1) % (1 << level) == 0
        merged = (ends_with_ones & (position >= 0)[:, None])[:, None, :, None, None]
        block = jnp.where(merged, state, 0).sum(2, keepdims=True)
        target = (merged.sum(2, keepdims=True) == level[:, None, None]) & (position >= 0)[:, None, None, None, None]
        return jnp.where(merged, 0, state) + jnp.where(target, block, 0), out

    arrays = (x.astype(jnp.float32) for x in (q, k, v, log_decay, weights))
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (*arrays, positions, starts))
    state, out = jax.lax.scan(token, state.astype(jnp.float32), tokens)
    return jnp.moveaxis(out, 0, 1), state


def _chunked(q, k, v, log_decay, level_scale, *, C):
    B, T, H, _ = q.shape
    C = 1 << (C.bit_length() - 1)
    N = 1 << (-(-T // C) - 1).bit_length()  # chunks pair up, level by level
    dtype = v.dtype

    def product(equation, *operands):
        return jnp.einsum(equation, *(x.astype(dtype) for x in operands), preferred_element_type=jnp.float32)

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, N * C - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, N, C, *x.shape[2:]), 3, 1)

    q, k, v, log_decay, level_scale = map(chunks, (q, k, v, log_decay, level_scale))
    log_decay = log_decay[..., None]
    into, leave = (sum_before(log_decay) + log_decay)[..., 0], sum_after(log_decay)
    total = into[..., -1]
    between = jnp.exp(jnp.where(np.tril(np.ones((C, C), bool)), log_between(log_decay), -jnp.inf))
    weights = between * jnp.einsum("BHNCL,CSL->BHNCS", level_scale[..., : levels_of(C)], _levels(C))
    out = product("BHNCS,BHNSV->BHNCV", weights * product("BHNCK,BHNSK->BHNCS", q, k), v)
    # For blocks of C, 2C, 4C ... tokens: what each leaves behind, and the decays from its start up to each token.
    states = product("BHNSK,BHNSV->BHNKV", k * jnp.exp(leave), v)
    q, into, out, level_scale = (x.reshape(B, H, N * C, *x.shape[4:]) for x in (q, into, out, level_scale))
    for level in range(levels_of(C), levels_of(N * C)):
        pairs = (B, H, states.shape[2] // 2, 2, -1)
        later_q, later_into, scales = (
            x.reshape(*pairs, *x.shape[3:])[:, :, :, 1] for x in (q, into, level_scale[..., level])
        )
        first, second = states[:, :, 0::2], states[:, :, 1::2]
        reads = product("BHPTK,BHPKV->BHPTV", later_q * (jnp.exp(later_into) * scales)[..., None], first)
        out = out.reshape(*pairs, out.shape[-1]).at[:, :, :, 1].add(reads).reshape(out.shape)
        into = into.reshape(pairs).at[:, :, :, 1].add(total[:, :, 0::2, None]).reshape(into.shape)
        states = jnp.exp(total[:, :, 1::2])[..., None, None] * first + second
        total = total[:, :, 0::2] + total[:, :, 1::2]
    return jnp.moveaxis(out, 1, 2)[:, :T]


def _levels(C: int) -> np.ndarray:
    """(C, C, levels) one-hot: at which level token j <= i of C is of token i."""
    apart = np.arange(C)[:, None] ^ np.arange(C)[None, :]
    level = np.frompyfunc(int.bit_length, 1, 1)(apart).astype(int)
    return np.eye(levels_of(C), dtype=np.float32)[level] * np.tril(np.ones((C, C), np.float32))[..., None]


def _parallel(q, k, v, log_decay, level_scale, segment_ids, positions):
    """By blocks of queries, each against all keys, so that levels may count from anywhere."""
    T = q.shape[1]
    so_far = cumulative_forget(log_decay, changes(segment_ids))
    at = jnp.arange(T)

    @jax.checkpoint
    def block(rows):
        q_, so_far_, scales, segment, position, i = rows
        keep = (segment[:, :, None] == segment_ids[:, None, :]) & (i[None, :, None] >= at[None, None, :])
        between = (so_far_[:, :, None] - so_far[:, None]).sum(-1)
        decay = jnp.exp(jnp.where(keep[..., None], between, -jnp.inf))
        # The number of bits of (t xor j), by comparing it with the powers of two.
        apart = position[:, :, None] ^ positions[:, None, :]
        level = (apart[..., None] >= 1 << jnp.arange(scales.shape[-1] - 1)).sum(-1)
        scales = jnp.take_along_axis(scales[:, :, None], level[:, :, :, None, None], -1)[..., 0]
        scores = jnp.einsum("BTHK,BSHK->BTSH", q_, k, preferred_element_type=jnp.float32)
        weights = (scores * decay * scales).astype(v.dtype)
        return jnp.einsum("BTSH,BSHV->BTHV", weights, v, preferred_element_type=jnp.float32)

    def blocks(x, axis):
        x = jnp.pad(x, [(0, -T % BLOCK if a == axis else 0) for a in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :]), axis, 0)

    rows = (*(blocks(x, 1) for x in (q, so_far, level_scale, segment_ids, positions)), blocks(at, 0))
    out = jnp.moveaxis(jax.lax.map(block, rows), 0, 1)
    return out.reshape(q.shape[0], -1, *out.shape[3:])[:, :T]
