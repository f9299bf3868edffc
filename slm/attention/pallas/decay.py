"""The chunked form of decaying recurrences with one decay a head, as a kernel: states never leave the chip.

The XLA form (slm.attention.chunks) writes the state of every chunk to memory and reads it back.
"""

import functools

import jax
import jax.numpy as jnp

from slm.attention import wy
from slm.attention.chunks import chunked_decay
from slm.attention.pallas.sequence import Kernel, Operand, column, dot, iota, pad, padded, value_block


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def decay_kernel(q, k, v, log_decay, state, chunk: int):
    """As `slm.attention.chunks.chunked_decay`, which is also its backward pass, forward recomputed.

    Args:
      q, k: (B, T, G, K), G divides H. v: (B, T, H, V).
      log_decay: (B, T, H), -inf allowed, or None.
      state: (B, H, K, V) float32.
      chunk: tokens in a chunk; used as a power of two, 16 at least.

    Returns:
      (unscaled out (B, T, H, V), final state (B, H, K, V)), float32.

    Raises:
      ValueError: the decay is per channel.
    """
    if log_decay is not None and log_decay.ndim == 4:
        raise ValueError(
            'implementation = "pallas": the kernel of decay_attention takes one decay a head, log_decay (B, T, H), '
            "not one a channel: use xla"
        )
    (B, T, H, V), K = v.shape, q.shape[-1]
    R = H // q.shape[2]
    C = min(padded(chunk), padded(T))
    N, Kp, Vp = -(-T // C), padded(K), padded(V)
    dtype = jnp.result_type(q, k, v)
    # Sums over time leave the range of float16.
    dtype = jnp.float32 if dtype == jnp.float16 else dtype

    def chunks(x, size):
        x = pad(x.astype(dtype), {1: N * C, 3: size})
        return jnp.moveaxis(x.reshape(B, N, C, *x.shape[2:]), 3, 1).reshape(-1, N, C, size)

    q, k, v = chunks(q, Kp), chunks(k, Kp), chunks(v, Vp)
    log_decay = jnp.zeros((B, T, H)) if log_decay is None else log_decay
    sums = wy.log_sums(jnp.moveaxis(wy.split(log_decay, C), 0, 2))
    rows = [part.reshape(B * H, N, 1, C) for part in sums]
    state = pad(state, {2: Kp, 3: Vp}).reshape(B * H, Kp, Vp)
    block = value_block(Vp)
    shared = functools.partial(Operand, block=(None, None, C, Kp), index=lambda y, p, j: (y // R, j, 0, 0))
    values = functools.partial(Operand, block=(None, None, C, block), index=lambda y, p, j: (y, j, 0, p))
    row = functools.partial(Operand, block=(None, None, 1, C), index=lambda y, p, j: (y, j, 0, 0))
    states = functools.partial(Operand, block=(None, Kp, block), index=lambda y, p, j: (y, 0, p))
    (out,), (final,) = Kernel(
        start=lambda state: (state,),
        step=_step,
        finish=lambda state: (state,),
        grid=(B * H, Vp // block),
        steps=N,
        fixed=[states(state)],
        moving=[shared(q), shared(k), values(v), *map(row, rows)],
        results=[values(jax.ShapeDtypeStruct(v.shape, jnp.float32))],
        final=[states(jax.ShapeDtypeStruct(state.shape, jnp.float32))],
    ).run()
    out = jnp.moveaxis(out.reshape(B, H, N, C, Vp), 1, 3).reshape(B, N * C, H, Vp)
    return out[:, :T, :, :V], final.reshape(B, H, Kp, Vp)[:, :, :K, :V]


def _step(carry, _, moving):
    """One chunk (Yang et al. 2024, 2312.06635, section 4): reads of the state that enters and of the chunk itself."""
    (state_KxV,), (q_CxK, k_CxK, v_CxV, coarse_1xC, fine_1xC) = carry, moving
    (C, K), V, dtype = q_CxK.shape, v_CxV.shape[1], v_CxV.dtype
    causal = iota((C, C), 0) >= iota((C, C), 1)
    between = (column(coarse_1xC, C) - coarse_1xC) + (column(fine_1xC, C) - fine_1xC)
    decays = jnp.exp(jnp.where(causal, between, -jnp.inf))
    weights = (dot(q_CxK, k_CxK, (1, 1)) * decays).astype(dtype)
    into = jnp.exp(coarse_1xC + fine_1xC)
    out = dot(weights, v_CxV) + column(into, V) * dot(q_CxK, state_KxV.astype(dtype))
    last = iota((1, C), 1) == C - 1
    coarse, fine = (jnp.where(last, x, 0.0).sum(1, keepdims=True) for x in (coarse_1xC, fine_1xC))
    out_of = jnp.exp((coarse - coarse_1xC) + (fine - fine_1xC))
    written = dot((column(out_of, K) * k_CxK).astype(dtype), v_CxV, (0, 0))
    return (jnp.exp(coarse + fine) * state_KxV + written,), (out,)


def _forward(q, k, v, log_decay, state, chunk):
    return decay_kernel(q, k, v, log_decay, state, chunk), (q, k, v, log_decay, state)


def _backward(chunk, inputs, cotangents):
    return jax.vjp(lambda *inputs: chunked_decay(*inputs, chunk), *inputs)[1](cotangents)


decay_kernel.defvjp(_forward, _backward)
