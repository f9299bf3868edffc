"""The sequential part of the delta engines as a kernel: chunks, made all at once by XLA, applied one after the other.

The XLA form (`slm.attention.wy.run`) writes the state and the values of every chunk to memory for its last products.
"""

import functools

import jax
import jax.numpy as jnp

from slm.attention import wy
from slm.attention.pallas.sequence import Kernel, Operand, column, dot, pad, padded, value_block
from slm.attention.triangular import inverse_unit_lower, product


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def run(chunk: wy.Chunk, start_BxHxKxV, precision):
    """As `slm.attention.wy.run`, which is also its backward pass, forward recomputed. All is float32, in full precision
    whatever `precision` allows. Chunks have 16 tokens at least.

    Returns:
      (out (N, B, H, C, V), final state (B, H, K, V)).
    """
    del precision
    inverse = inverse_unit_lower(chunk.lower)
    erase, right = product(inverse, chunk.erase), product(inverse, chunk.right)
    (N, B, H, C, V), K = right.shape, erase.shape[-1]
    Y, Kp, Vp = B * H, padded(K), padded(V)
    block = value_block(Vp)
    # As a row: arrays of columns would be padded to many times their size on a TPU.
    decay = jnp.broadcast_to(1.0 if chunk.decay is None else chunk.decay, (N, B, H, K, 1)).mT

    def per_chunk(x, rows, columns):
        x = pad(x, {3: rows, 4: columns}).reshape(N, Y, rows, columns)
        return Operand(x, (None, None, rows, columns), lambda y, p, j: (j, y, 0, 0))

    values = functools.partial(Operand, block=(None, None, C, block), index=lambda y, p, j: (j, y, 0, p))
    states = functools.partial(Operand, block=(None, Kp, block), index=lambda y, p, j: (y, 0, p))
    right = pad(right, {4: Vp}).reshape(N, Y, C, Vp)
    start = pad(start_BxHxKxV, {2: Kp, 3: Vp}).reshape(Y, Kp, Vp)
    moving = [
        values(right),
        per_chunk(erase, C, Kp),
        per_chunk(chunk.read, C, Kp),
        per_chunk(chunk.attend, C, C),
        per_chunk(decay, 1, Kp),
        per_chunk(chunk.write, C, Kp),
    ]
    if chunk.step is not None:
        step = pad(jnp.broadcast_to(chunk.step, (N, B, H, K, V)), {3: Kp, 4: Vp}).reshape(N, Y, Kp, Vp)
        moving.append(Operand(step, (None, None, Kp, block), lambda y, p, j: (j, y, 0, p)))
    (out,), (final,) = Kernel(
        start=lambda state: (state,),
        step=_step,
        finish=lambda state: (state,),
        grid=(Y, Vp // block),
        steps=N,
        fixed=[states(start)],
        moving=moving,
        results=[values(jax.ShapeDtypeStruct(right.shape, jnp.float32))],
        final=[states(jax.ShapeDtypeStruct(start.shape, jnp.float32))],
    ).run()
    out = out.reshape(N, B, H, C, Vp)[..., :V]
    return out if chunk.out is None else out + chunk.out, final.reshape(B, H, Kp, Vp)[:, :, :K, :V]


def _step(carry, _, moving):
    """The affine map of a `wy.Chunk` whose triangular system is solved already."""
    (state_KxV,), (right_CxV, erase_CxK, read_CxK, attend_CxC, decay_1xK, write_CxK, *step_KxV) = carry, moving
    values = right_CxV + dot(erase_CxK, state_KxV)
    out = dot(read_CxK, state_KxV) + dot(attend_CxC, values)
    state = column(decay_1xK, state_KxV.shape[1]) * state_KxV + dot(write_CxK, values, (0, 0))
    return (state + sum(step_KxV),), (out,)


def _forward(chunk, start, precision):
    return run(chunk, start, precision), (chunk, start)


def _backward(precision, inputs, cotangents):
    return jax.vjp(lambda chunk, start: wy.run(chunk, start, precision), *inputs)[1](cotangents)


run.defvjp(_forward, _backward)
