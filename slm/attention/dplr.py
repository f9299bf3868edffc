"""Delta-rule engine, general form: diagonal plus low rank transitions, as RWKV-7 has them (Peng et al. 2025)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm.attention import wy
from slm.attention.recurrence import changes
from slm.attention.triangular import product


def dplr_attention(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    *,
    scale=None,
    initial_state=None,
    form="chunked",
    chunk=64,
    segment_ids=None,
    reset_state=None,
    implementation="auto",
):
    """S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T;  out_t = scale q_t^T S_t.

    a_t reads S_{t-1} before its decay, as in RWKV-7 (2503.14456) and flash-linear-attention. RWKV-7 with removal key
    kappa of norm 1, in-context learning rate eta and replacement key k is a = -kappa, b = eta kappa, scale = 1. Where a
    transition is written with a' reading the decayed state, as the delta rule is, a = exp(log_decay) a':
    `delta_attention` is a = exp(log_decay) k, b = -beta k, and beta k in the place of k.

    Args:
      q, k, a, b: (B, T, H, K).
      v: (B, T, H, V).
      log_decay: (B, T, H), or (B, T, H, K) per channel; <= 0, and -inf forgets everything but what a_t read.
      scale, initial_state, form, chunk, segment_ids, reset_state, implementation: as in `delta_attention`.

    Returns:
      (out (B, T, H, V) of q's dtype, final_state (B, H, K, V) float32 after the last token).

    Raises:
      ValueError: shapes do not agree, no such form or implementation, or the implementation cannot serve the request.
    """
    check(q, k, v, log_decay, form, chunk, initial_state, segment_ids, reset_state, implementation)
    for name, x in (("a", a), ("b", b)):
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {x.shape}, expected {q.shape} like q")
    request = prepare(q, v, scale, initial_state, segment_ids, reset_state)
    if form == "chunked":
        return _chunked(*how(implementation, chunk, q.shape[1]), q, k, v, log_decay, a, b, request)

    def step(state, token):
        k, v, log_decay, a, b = token
        removed = b[..., None] * read(a, state)[..., None, :]
        return jnp.exp(log_decay)[..., None] * state + removed + k[..., None] * v[..., None, :]

    return scan_tokens(step, q, (k, v, log_decay.reshape(*q.shape[:3], -1), a, b), request)


@functools.partial(jax.checkpoint, policy=wy.SAVED, static_argnums=(0, 1))
def _chunked(size, run, q, k, v, log_decay, a, b, request):
    """The extended WY form (Yang et al. 2024, 2406.06484, section 3) with a and b in the places of -beta k and k."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dtype, T = q.dtype, q.shape[1]
    q, k, v, a, b = (wy.split(x, size) for x in (q, k, v, a, b))
    q = q * request.scale
    segments = None if request.starts is None else wy.segments(request.starts, size)
    log_decay = wy.split_decay(log_decay, size)
    pairs = wy.decayed_products([(q, True), (a, False)], [k, b], log_decay)
    if segments is not None:
        pairs = jax.tree.map(lambda x: x * segments.same, pairs)
    (from_k, from_b), (a_on_k, a_on_b) = pairs
    eye = np.eye(size, dtype=np.float32)
    from_k, from_b = (x + (q * y).sum(-1, keepdims=True) * eye for x, y in ((from_k, k), (from_b, b)))
    gates = wy.gates(log_decay, segments)
    right, out = product(a_on_k, v), jnp.matmul(from_k, v, precision=precision)
    step = product((k * gates.leave).mT, v)
    if segments is not None and request.reset is not None:
        fresh = wy.reset_gates(log_decay, segments)
        right += product(a * fresh.before, request.reset)
        out += product(q * fresh.enter, request.reset)
        step += fresh.total * request.reset
    chunk = wy.Chunk(-a_on_b, right, a * gates.before, q * gates.enter, from_b, b * gates.leave, out, gates.total, step)
    out, final = run(chunk, request.state, precision)
    return wy.unsplit(out, T).astype(dtype), final


class Request(NamedTuple):
    """What both delta engines are asked beside their tokens, with defaults filled in."""

    scale: float
    state: jax.Array
    """(B, H, K, V) float32."""
    starts: jax.Array | None
    """(B, T) boolean: whether a segment begins at this token. None: there are no segments."""
    reset: jax.Array | None
    """(H, K, V) float32. None: zeros."""


def prepare(q, v, scale, initial_state, segment_ids, reset_state) -> Request:
    B, _, H, K = q.shape
    zeros = jnp.zeros((B, H, K, v.shape[-1]), jnp.float32)
    return Request(
        K**-0.5 if scale is None else scale,
        zeros if initial_state is None else initial_state.astype(jnp.float32),
        None if segment_ids is None else changes(segment_ids),
        None if reset_state is None else reset_state.astype(jnp.float32),
    )


def how(implementation, chunk: int, T: int):
    """(tokens in a chunk, what applies the chunks one after the other) of an implementation."""
    size = wy.chunk_size(chunk, T)
    if implementation != "pallas":
        return size, wy.run
    from slm.attention.pallas.delta import run

    return max(16, size), run


def scan_tokens(step, q, tokens, request: Request):
    """The definition: `step(state, token) -> state` over the time axis, 1, of `tokens`, each read by q (B, T, H, K)."""
    starts = jnp.zeros(q.shape[:2], bool) if request.starts is None else request.starts
    reset = jnp.float32(0) if request.reset is None else request.reset

    def body(state, now):
        start, q, token = now
        if request.starts is not None:
            state = jnp.where(start[:, None, None, None], reset, state)
        state = step(state, token)
        return state, read(q, state)

    arrays = jax.tree.map(lambda x: x.astype(jnp.float32), (q, tokens))
    now = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (starts, *arrays))
    state, out = jax.lax.scan(body, request.state, now)
    return (jnp.moveaxis(out, 0, 1) * request.scale).astype(q.dtype), state


def read(x_BxHxK, state_BxHxKxV):
    """x^T S, (B, H, V), by multiplication and sum: in full float32 on every device."""
    return (x_BxHxK[..., None] * state_BxHxKxV).sum(-2)


def check(q, k, v, log_decay, form, chunk, initial_state, segment_ids, reset_state, implementation):
    """Raises ValueError where the arguments that both delta engines have do not agree."""
    B, T, H, K = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"shapes do not agree: q {q.shape}, k {k.shape}, v {v.shape}; expected k like q, v (B,T,H,V)")
    if T < 1:
        raise ValueError("no tokens: T = 0")
    if log_decay is not None and log_decay.shape not in ((B, T, H), (B, T, H, K)):
        raise ValueError(f"log_decay has shape {log_decay.shape}, expected {(B, T, H)} or {(B, T, H, K)}")
    if form not in ("recurrent", "chunked"):
        raise ValueError(f"form = {form!r}: must be recurrent or chunked")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1 token")
    if implementation == "pallas" and form != "chunked":
        raise ValueError(f'implementation = "pallas": the kernel has the chunked form only, not {form}: use xla')
    if implementation not in ("auto", "xla", "pallas"):
        raise ValueError(f"implementation = {implementation!r}: must be auto, xla or pallas")
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids has shape {segment_ids.shape}, expected {(B, T)}")
    for name, state, shape in (("initial_state", initial_state, (B, H)), ("reset_state", reset_state, (H,))):
        if state is not None and state.shape != (*shape, K, v.shape[-1]):
            raise ValueError(f"{name} has shape {state.shape}, expected {(*shape, K, v.shape[-1])}")
