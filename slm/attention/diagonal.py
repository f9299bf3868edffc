"""The elementwise recurrence h_t = exp(log_decay_t) h_{t-1} + x_t, as RG-LRU and its relatives need it."""

import functools

import jax
import jax.numpy as jnp

from slm.attention.recurrence import changes, check_shapes

CHUNK = 64
"""Tokens that are taken one after the other, in all chunks at once."""


def diagonal_recurrence(
    x, log_decay, *, initial_state=None, form="chunked", chunk=CHUNK, segment_ids=None, reset_state=None
):
    """h_t = exp(log_decay_t) h_{t-1} + x_t, in float32.

    Args:
      x: (B, T, D).
      log_decay: (B, T, D), <= 0 and -inf allowed.
      initial_state: (B, D), the state before the first token; None: zeros.
      form: "recurrent" token by token, the definition; "chunked" `chunk` steps for all chunks side by side, then one
        for each chunk: T / chunk + chunk steps instead of T.
      segment_ids: (B, T) integers: where they differ from the token before, the state becomes `reset_state` before
        that token is taken. The first token always continues `initial_state`.
      reset_state: (D,); None: zeros.

    Returns:
      (h (B, T, D) float32, final_state (B, D) float32). Kept for the backward pass, which is the same recurrence
      backwards in time, are h and the decays.

    Raises:
      ValueError: shapes do not agree, there are no tokens, or no such form.
    """
    B, T, D = x.shape
    expected = {
        "log_decay": (log_decay, (B, T, D)),
        "initial_state": (initial_state, (B, D)),
        "segment_ids": (segment_ids, (B, T)),
        "reset_state": (reset_state, (D,)),
    }
    check_shapes(expected)
    if form not in ("recurrent", "chunked"):
        raise ValueError(f"form = {form!r}: must be recurrent or chunked")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1")
    if not T:
        raise ValueError("no tokens: T = 0")
    x, decay = x.astype(jnp.float32), jnp.exp(log_decay.astype(jnp.float32))
    state = jnp.zeros((B, D), jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    if segment_ids is not None:
        starts = changes(segment_ids)[..., None]
        if reset_state is not None:
            x += jnp.where(starts, decay * reset_state.astype(jnp.float32), 0)
        decay = jnp.where(starts, 0, decay)
    h = _recurrence(x, decay, state, chunk if form == "chunked" else T)
    return h, h[:, -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recurrence(x, decay, state, chunk):
    return _run(x, decay, state, chunk)


def _forward(x, decay, state, chunk):
    h = _run(x, decay, state, chunk)
    return h, (h, decay, state)


def _backward(chunk, residuals, d_h):
    h, decay, state = residuals
    # dx_t = dh_t + decay_{t+1} dx_{t+1}: the recurrence again, from the last token to the first.
    later = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], 1)
    d_x = _run(d_h[:, ::-1], later[:, ::-1], jnp.zeros_like(state), chunk)[:, ::-1]
    before = jnp.concatenate([state[:, None], h[:, :-1]], 1)
    return d_x, d_x * before, d_x[:, 0] * decay[:, 0]


_recurrence.defvjp(_forward, _backward)


def _run(x, decay, state, chunk):
    B, T, D = x.shape
    C = min(chunk, T)
    N = -(-T // C)
    padding = ((0, 0), (0, N * C - T), (0, 0))

    def by_step(a):
        return jnp.pad(a, padding).reshape(B, N, C, D).transpose(2, 0, 1, 3)

    def step(carry, now):
        h, through = carry
        x, decay = now
        h, through = decay * h + x, decay * through
        return (h, through), (h, through)

    # From a zero state in each chunk, together with what would become of a state that enters it.
    zeros = jnp.zeros((B, N, D), jnp.float32)
    _, (local, through) = jax.lax.scan(step, (zeros, zeros + 1), (by_step(x), by_step(decay)))

    def enter(state, last):
        h, through = last
        return through * state + h, state

    # A padded step has decay 0: only the last chunk has some, and no chunk comes after it.
    ends = jnp.moveaxis(local[-1], 1, 0), jnp.moveaxis(through[-1], 1, 0)
    _, entering = jax.lax.scan(enter, state, ends)
    h = local + through * jnp.moveaxis(entering, 0, 1)
    return h.transpose(1, 2, 0, 3).reshape(B, N * C, D)[:, :T]
