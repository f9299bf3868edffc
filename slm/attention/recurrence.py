"""Diagonal-decay recurrences: linear attention, RetNet, GLA, Mamba-2 ... are parametrisations of `decay_attention`."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slm.attention.chunks import chunked_decay


def decay_attention(
    q,
    k,
    v,
    log_decay,
    *,
    scale=None,
    initial_state=None,
    form="chunked",
    chunk=64,
    segment_ids=None,
    reset_state=None,
    implementation="auto",
):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T;  out_t = scale q_t^T S_t. Everything accumulates in float32.

    Args:
      q, k: (B, T, G, K), G divides H; value head h uses head h // (H/G) of them, which is not materialised H/G times
        where the decay is a scalar per head (Mamba-2's B and C).
      v: (B, T, H, V).
      log_decay: (B, T, H) scalar per head, or (B, T, H, K) per channel, <= 0 and -inf allowed; None: no decay.
      scale: None means K**-0.5.
      initial_state: (B, H, K, V), the state before the first token; None: zeros.
      form: "recurrent" token by token, the definition, whose backward pass keeps every state; "chunked" matrix products
        over chunks, for training.
      chunk: tokens in a chunk; changes speed, not the mathematics.
      segment_ids: (B, T) integers: where they differ from the token before, the state becomes `reset_state` before
        that token is taken. The first token always continues `initial_state`.
      reset_state: (H, K, V); None: zeros.
      implementation: "xla"; "pallas" an accelerator kernel (interpreted, slowly, on a CPU) for the forward pass of the
        chunked form, which serves no decay per channel; "auto" is "xla": the kernel is unmeasured.

    Returns:
      (out (B, T, H, V) of v's dtype, final_state (B, H, K, V) float32 after the last token).

    Raises:
      ValueError: shapes do not agree, no such form or implementation, or the implementation cannot serve the request.
    """
    check(q, k, v, log_decay, initial_state, segment_ids, reset_state, form, chunk, implementation)
    B, T, H, V = v.shape
    K = q.shape[-1]
    scale = K**-0.5 if scale is None else scale
    state = jnp.zeros((B, H, K, V), jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    reset = jnp.zeros((H, K, V), jnp.float32) if reset_state is None else reset_state.astype(jnp.float32)
    if form == "recurrent":
        out, state = _recurrent(q, k, v, log_decay, state, segment_ids, reset)
        return (out * scale).astype(v.dtype), state
    added = None
    if segment_ids is not None:
        starts = changes(segment_ids)
        if reset_state is not None:
            added = _from_reset(q, log_decay, starts, reset)
        # Then nothing before a document's first token is left.
        shape = (B, T, H) if log_decay is None else log_decay.shape
        log_decay = jnp.zeros(shape) if log_decay is None else log_decay.astype(jnp.float32)
        log_decay = jnp.where(starts.reshape(B, T, *(1,) * (len(shape) - 2)), -jnp.inf, log_decay)
    advance = chunked_decay
    if implementation == "pallas":
        from slm.attention.pallas.decay import decay_kernel as advance
    out, state = advance(q, k, v, log_decay, state, chunk)
    if added is not None:
        out, state = out + added[0], state + added[1]
    # Named, so that a remat policy can keep it instead of running the forward pass again.
    return checkpoint_name((out * scale).astype(v.dtype), "attention"), state


def check(q, k, v, log_decay, initial_state, segment_ids, reset_state, form, chunk, implementation):
    """Raises ValueError where the arguments of `decay_attention` do not agree."""
    B, T, H, V = v.shape
    G, K = q.shape[2:]
    if q.shape != k.shape or q.shape[:2] != (B, T) or H % G:
        raise ValueError(
            f"shapes do not agree: q {q.shape}, k {k.shape}, v {v.shape}; expected (B,T,G,K), (B,T,G,K), (B,T,H,V) "
            "with G dividing H"
        )
    if log_decay is not None and log_decay.shape not in ((B, T, H), (B, T, H, K)):
        raise ValueError(f"log_decay has shape {log_decay.shape}, expected {(B, T, H)} or {(B, T, H, K)}")
    expected = {
        "initial_state": (initial_state, (B, H, K, V)),
        "segment_ids": (segment_ids, (B, T)),
        "reset_state": (reset_state, (H, K, V)),
    }
    check_shapes(expected)
    if form not in ("recurrent", "chunked"):
        raise ValueError(f"form = {form!r}: must be recurrent or chunked")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1")
    if not T:
        raise ValueError("no tokens: T = 0")
    if implementation == "pallas" and form != "chunked":
        raise ValueError(f'implementation = "pallas": the kernel has the chunked form only, not {form}: use xla')
    if implementation not in ("auto", "xla", "pallas"):
        raise ValueError(f"implementation = {implementation!r}: must be auto, xla or pallas")


def check_shapes(expected: dict) -> None:
    """Raises ValueError for the first array of {name: (array or None, shape)} that has another shape."""
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


def changes(segment_ids):
    """(B, T) boolean: whether a token's segment is not that of the token before; never at the first token."""
    return jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0


def _recurrent(q, k, v, log_decay, state, segment_ids, reset):
    """(unscaled out (B, T, H, V) float32, final state)."""
    R = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x.astype(jnp.float32), R, axis=2) for x in (q, k))
    decay = jnp.ones(v.shape[:3], jnp.float32) if log_decay is None else jnp.exp(log_decay.astype(jnp.float32))
    decay = decay.reshape(*v.shape[:3], -1)
    starts = jnp.zeros(v.shape[:2], bool) if segment_ids is None else changes(segment_ids)

    def token(state, now):
        q, k, v, decay, start = now
        state = jnp.where(start[:, None, None, None], reset, state)
        state = decay[..., None] * state + k[..., None] * v[..., None, :]
        return state, (q[..., None] * state).sum(-2)

    tokens = (jnp.moveaxis(x, 1, 0) for x in (q, k, v.astype(jnp.float32), decay, starts))
    state, out = jax.lax.scan(token, state, tuple(tokens))
    return jnp.moveaxis(out, 0, 1), state


def _from_reset(q, log_decay, starts, reset_HxKxV):
    """What is left of `reset_state` in each output (B, T, H, V) and in the final state: the recurrence is linear."""
    B, T, G, _ = q.shape
    H = len(reset_HxKxV)
    decay = jnp.ones((B, T, H, 1)) if log_decay is None else jnp.exp(log_decay.astype(jnp.float32)).reshape(B, T, H, -1)
    starts = starts[..., None, None]

    def since(one, other):
        (a, a_starts), (b, b_starts) = one, other
        return jnp.where(b_starts, b, a * b), a_starts | b_starts

    left, later = jax.lax.associative_scan(since, (decay, starts), axis=1)
    left = jnp.where(later, left, 0)
    q = jnp.repeat(q.astype(jnp.float32), H // G, axis=2)
    return jnp.einsum("BTHK,HKV->BTHV", q * left, reset_HxKxV), left[:, -1, :, :, None] * reset_HxKxV
