"""Exact softmax attention (Vaswani et al. 2017): grouped heads, window, sinks, soft cap, forget gates, documents."""

import jax
import jax.numpy as jnp

from slm.attention.blocked import blocked_attention
from slm.attention.forget import cumulative_forget, document_starts
from slm.attention.spans import BLOCK, Shape, visible


def softmax_attention(
    q,
    k,
    v,
    *,
    causal=True,
    window=None,
    sinks=0,
    sink_logits=None,
    softcap=None,
    scale=None,
    segment_ids=None,
    log_forget=None,
    implementation="auto",
):
    """softmax(scale * q k^T + mask) v, accumulated in float32 whatever the input's type.

    Args:
      q: (B, T, H, K).
      k: (B, T, G, K), G divides H; query head h reads key head h // (H/G).
      v: (B, T, G, V).
      causal: key j is seen by query i only if j <= i.
      window: W: key j is seen by query i only if i - j < W (and j - i < W without `causal`), so W counts the query.
      sinks: the first `sinks` keys of the row stay visible beyond the window (StreamingLLM, Xiao et al. 2024); with
        segment_ids those of each document, which is a run of equal ids.
      sink_logits: (H,): exp(sink_h), not scaled, joins the denominator (gpt-oss).
      softcap: c: logits become c tanh(logits / c) before masking (Gemma 2).
      scale: None means K**-0.5.
      segment_ids: (B, T) integers: a query sees only keys of its own segment.
      log_forget: (B, T, H), <= 0 and finite: to query i's logit of key j is added the sum of log_forget over j+1 ... i,
        after the soft cap (forgetting attention, Lin et al. 2025, eq. 6).
      implementation: "xla" one masked product; "blocked" blocks of queries that skip the keys no query of theirs can
        see, and recompute in the backward pass; "cudnn" NVIDIA's fused kernel; "tokamax" what that package, if it is
        installed, chooses (a Pallas kernel on TPU and GPU, or XLA: it does not tell); "auto" see
        `choose_implementation`.

    Returns:
      (B, T, H, V) of q's dtype.

    Raises:
      ValueError: shapes do not agree, or the named implementation cannot serve the request.
    """
    _check(q, k, v, window, segment_ids, log_forget, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    modified = sinks > 0 or sink_logits is not None or softcap is not None or log_forget is not None
    extras = modified or segment_ids is not None or v.shape[-1] != q.shape[-1]
    if implementation == "auto":
        implementation = choose_implementation(q.shape, q.dtype, causal=causal, window=window, extras=extras)
    if implementation == "cudnn":
        return _cudnn(q, k, v, causal, window, extras, scale)
    if implementation == "tokamax":
        if sinks or sink_logits is not None or log_forget is not None:
            raise ValueError("tokamax attention cannot serve sinks, sink_logits or log_forget: use blocked or auto")
        if v.shape[-1] != q.shape[-1]:
            raise ValueError("tokamax attention is asked for values of another size than keys: use blocked or auto")
        return _tokamax(q, k, v, causal, window, softcap, scale, segment_ids)
    if implementation not in ("xla", "blocked"):
        raise ValueError(f"implementation = {implementation!r}: must be auto, xla, blocked, cudnn or tokamax")
    at, documents, forget = jnp.arange(q.shape[1])[None], segment_ids, None
    if segment_ids is not None and (sinks or log_forget is not None):
        documents = document_starts(segment_ids)
    if log_forget is not None:
        begins = at == (0 if documents is None else documents)
        forget = cumulative_forget(log_forget, jnp.broadcast_to(begins, q.shape[:2]))
    if implementation == "blocked":
        shape = Shape(causal, window, sinks, softcap, scale)
        return blocked_attention(q, k, v, documents, sink_logits, forget, shape)
    keep = True if documents is None else documents[:, :, None] == documents[:, None, :]
    sunk = False if not sinks else (at - (0 if documents is None else documents) < sinks)[:, None, :]
    keep &= visible(at[:, :, None], at[:, None, :], causal, window, sunk)
    return _attend(q, k, v, keep, scale, softcap, sink_logits, forget, forget)


def choose_implementation(shape, dtype, *, causal=True, window=None, extras=False, platform=None) -> str:
    """What `implementation="auto"` means for queries of `shape` (B, T, H, K) on `platform` (None: the default one).

    `extras`: something is asked for that cuDNN cannot serve: sinks, soft cap, forget gates, segments, or V != K.
    """
    platform = platform or jax.default_backend()
    _, T, _, K = shape
    half = dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and not extras and K % 8 == 0 and K <= 128 and (window is None or causal):
        return "cudnn"
    return "blocked" if T > BLOCK else "xla"


def cached_attention(
    q,
    k,
    v,
    query_positions,
    key_positions,
    *,
    window=None,
    sinks=0,
    sink_logits=None,
    softcap=None,
    scale=None,
    query_forget=None,
    key_forget=None,
    old=None,
):
    """Causal attention of new queries over cached keys in any order, as a decode step and a prefill need it.

    Long calls take `BLOCK` queries at a time, so that memory grows with S, not with T S.

    Args:
      q: (B, T, H, K). k: (B, S, G, K). v: (B, S, G, V).
      query_positions: (B, T) integers. key_positions: (B, S) integers, -1 where the slot is empty.
      window, sinks, sink_logits, softcap, scale: as in `softmax_attention`.
      query_forget, key_forget: (B, T, H, 2), (B, S, H, 2) of `cumulative_forget`, or None.
      old: None, or S - T: from there on the keys are those of the queries, whose positions follow each other. Then a
        long call with a window costs T (old + window), not T S.

    Returns:
      (B, T, H, V); a query that sees no key (padding) gets an average of everything, never NaN.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attend(q, positions, forget, k, v, key_positions, key_forget):
        i, j = positions[:, :, None], key_positions[:, None, :]
        keep = visible(i, j, True, window, j < sinks) & (j >= 0)
        return _attend(q, k, v, keep, scale, softcap, sink_logits, forget, key_forget)

    T, keys = q.shape[1], (k, v, key_positions, key_forget)
    if T <= BLOCK:
        return attend(q, query_positions, query_forget, *keys)

    length = T if window is None or old is None else BLOCK + window - 1

    def piece(now):
        block, *queries = now
        if length + sinks >= T:
            return attend(*queries, *keys)
        start = jnp.clip(block * BLOCK - window + 1, 0, T - length)

        def near(x):
            """The old keys, the call's first, which may be sinks, and those up to a window back."""
            return jnp.concatenate([x[:, : old + sinks], jax.lax.dynamic_slice_in_dim(x, old + start, length, 1)], 1)

        k, v, key_positions, key_forget = jax.tree.map(near, keys)
        first = jnp.arange(key_positions.shape[1]) - old
        twice = (first >= start) & (first < sinks)
        return attend(*queries, k, v, jnp.where(twice, -1, key_positions), key_forget)

    def blocks(x):
        x = jnp.pad(x, ((0, 0), (0, -T % BLOCK)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]), 1, 0)

    queries = jax.tree.map(blocks, (q, query_positions, query_forget))
    out = jax.lax.map(piece, (jnp.arange(-(-T // BLOCK)), *queries))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *out.shape[3:])[:, :T]


def _check(q, k, v, window, segment_ids, log_forget, causal):
    B, T, H, K = q.shape
    if k.shape[:2] != (B, T) or k.shape[3] != K or v.shape[:3] != k.shape[:3] or H % k.shape[2]:
        raise ValueError(
            f"shapes do not agree: q {q.shape}, k {k.shape}, v {v.shape}; expected (B,T,H,K), (B,T,G,K), (B,T,G,V) "
            "with G dividing H"
        )
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1, since it counts the query itself")
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids has shape {segment_ids.shape}, expected {(B, T)}")
    if log_forget is not None and log_forget.shape != (B, T, H):
        raise ValueError(f"log_forget has shape {log_forget.shape}, expected {(B, T, H)}")
    if log_forget is not None and not causal:
        raise ValueError("log_forget forgets the past: it needs causal = True")


def _attend(q, k, v, keep_BxTxS, scale, softcap, sink_logits, query_forget=None, key_forget=None):
    B, T, H, K = q.shape
    G = k.shape[2]
    q = q.reshape(B, T, G, H // G, K)
    logits = jnp.einsum("BTGRK,BSGK->BGRTS", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if query_forget is not None:
        i, j = (jnp.moveaxis(x.reshape(B, -1, G, H // G, 2), (4, 1), (0, 4)) for x in (query_forget, key_forget))
        high, low = i[..., :, None] - j[..., None, :]
        logits += high + low
    # Finite, so that a row without any key stays NaN-free; it underflows to exactly 0 in every other row.
    logits = jnp.where(keep_BxTxS[:, None, None], logits, -1e30)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    if sink_logits is not None:
        sink = sink_logits.astype(jnp.float32).reshape(1, G, H // G, 1, 1)
        top = jnp.maximum(top, jax.lax.stop_gradient(sink))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    if sink_logits is not None:
        total += jnp.exp(sink - top)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum("BGRTS,BSGV->BTGRV", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, H, v.shape[-1]).astype(q.dtype)


def _cudnn(q, k, v, causal, window, extras, scale):
    if extras:
        raise ValueError(
            "cudnn attention cannot serve sinks, sink_logits, softcap, log_forget, segment_ids or "
            "values of another size than keys: use blocked or auto"
        )
    if window is not None and not causal:
        raise ValueError("cudnn attention cannot serve a window without causal: use blocked or auto")
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=local, implementation="cudnn"
    )


def _tokamax(q, k, v, causal, window, softcap, scale, segment_ids):
    try:
        import tokamax
    except ImportError as error:
        raise ValueError("tokamax attention needs the package tokamax: `pip install tokamax`, or use auto") from error
    # Its masks are arrays: documents cost T^2 bytes a sequence.
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    local = None if window is None else (window - 1, 0 if causal else window - 1)
    return tokamax.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=causal, local_window_size=local, logits_soft_cap=softcap
    )
