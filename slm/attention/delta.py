"""Delta-rule engine: DeltaNet, Gated DeltaNet, DeltaProduct and Kimi Delta Attention are its parametrisations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from slm.attention import wy
from slm.attention.dplr import check, how, prepare, read, scan_tokens
from slm.attention.triangular import product


def delta_attention(
    q,
    k,
    v,
    beta,
    *,
    log_decay=None,
    scale=None,
    initial_state=None,
    form="chunked",
    chunk=64,
    segment_ids=None,
    reset_state=None,
    implementation="auto",
):
    """S~ = exp(log_decay_t) S_{t-1};  S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T;  out_t = scale q_t^T S_t.

    DeltaNet (2406.06484) without decay, Gated DeltaNet (2412.06464) with a scalar one, Kimi Delta Attention
    (2510.26692) with one for each channel. Nothing is normalised or activated here. Everything is float32 inside.

    Args:
      q, k: (B, T, H, K).
      v: (B, T, H, V).
      beta: (B, T, H), usually in [0, 1], or [0, 2] for transitions with negative eigenvalues. With keys of norm n,
        the state cannot grow if beta n^2 <= 2.
      log_decay: (B, T, H), or (B, T, H, K) per channel; <= 0, and -inf forgets everything; None: no decay.
      scale: None means K**-0.5.
      initial_state: (B, H, K, V), the state before the first token; None: zeros.
      form: "recurrent" token by token: the definition, and the decode step; its backward pass keeps every state.
        "chunked" matrix products over chunks, for training: the backward pass keeps one state and one (C, C) inverse
        for each chunk.
      chunk: tokens C in a chunk, rounded up to a power of two; changes speed, not the mathematics.
      segment_ids: (B, T) integers: where they differ from the token before, the state becomes `reset_state` before
        that token is taken. The first token always continues `initial_state`.
      reset_state: (H, K, V); None: zeros.
      implementation: "xla"; "pallas" an accelerator kernel (interpreted, slowly, on a CPU) that applies the chunks of
        the chunked form; its backward pass is XLA's; "auto" is "xla": the kernel is unmeasured.

    Returns:
      (out (B, T, H, V) of q's dtype, final_state (B, H, K, V) float32 after the last token).

    Raises:
      ValueError: shapes do not agree, no such form or implementation, or the implementation cannot serve the request.
    """
    check(q, k, v, log_decay, form, chunk, initial_state, segment_ids, reset_state, implementation)
    if beta.shape != q.shape[:3]:
        raise ValueError(f"beta has shape {beta.shape}, expected {q.shape[:3]}")
    request = prepare(q, v, scale, initial_state, segment_ids, reset_state)
    if form == "chunked":
        return _chunked(*how(implementation, chunk, q.shape[1]), q, k, v, beta, log_decay, request)

    def step(state, token):
        k, v, beta, log_decay = token
        if log_decay is not None:
            state = jnp.exp(log_decay)[..., None] * state
        change = beta[..., None] * (v - read(k, state))
        return state + k[..., None] * change[..., None, :]

    log_decay = None if log_decay is None else log_decay.reshape(*q.shape[:3], -1)
    return scan_tokens(step, q, (k, v, beta, log_decay), request)


@functools.partial(jax.checkpoint, policy=wy.SAVED, static_argnums=(0, 1))
def _chunked(size, run, q, k, v, beta, log_decay, request):
    """The WY form (Yang et al. 2024, section 3; with decay: Yang, Kautz and Hatamizadeh 2025, section 3.3).

    With decays D_ij from after token j to token i, u_i = beta_i (v_i - (D_i0 S_0)^T k_i - sum_j<i k_i^T D_ij k_j u_j)
    are the values that tokens really write: a unit lower triangular system.
    """
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dtype, T = q.dtype, q.shape[1]
    q, k, v, beta = (wy.split(x, size) for x in (q, k, v, beta))
    q = q * request.scale
    segments = None if request.starts is None else wy.segments(request.starts, size)
    log_decay = None if log_decay is None else wy.split_decay(log_decay, size)
    same = True if segments is None else segments.same
    if log_decay is not None and log_decay.shape[-1] > 1:
        (lower,), (attend,) = wy.decayed_products([(k, True), (q, True)], [k], log_decay)
        lower, attend = (x if segments is None else x * same for x in (lower, attend))
        attend += (q * k).sum(-1, keepdims=True) * np.eye(size, dtype=np.float32)
    else:
        past = np.tril(np.ones((size, size), bool))
        logs = 0.0 if log_decay is None else wy.log_between(log_decay)
        decays = jnp.exp(jnp.where(past & same, logs, -jnp.inf))
        lower, attend = product(k, k.mT) * jnp.tril(decays, -1), product(q, k.mT) * decays
    gates = wy.gates(log_decay, segments)
    right, out, step = beta * v, None, None
    if segments is not None and request.reset is not None:
        fresh = wy.reset_gates(log_decay, segments)
        right -= beta * product(k * fresh.enter, request.reset)
        out, step = product(q * fresh.enter, request.reset), fresh.total * request.reset
    chunk = wy.Chunk(
        beta * lower, right, -beta * k * gates.enter, q * gates.enter, attend, k * gates.leave, out, gates.total, step
    )
    out, final = run(chunk, request.state, precision)
    return wy.unsplit(out, T).astype(dtype), final
