"""What the delta engines do with chunks of tokens: a chunk is an affine map of the state, made for all chunks at once.

Only applying these maps one after the other is sequential. Arrays here are (N, B, H, C, dim): N chunks of C tokens.
Decays are exponentials of sums of logarithms, which are never positive.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from slm.attention.chunks import halves, scale_half
from slm.attention.triangular import inverse_unit_lower, join, product

FLOOR = -110.0
"""Log decays are cut here, where float32's exponential is zero already, so that -inf is welcome."""


SAVED = jax.checkpoint_policies.save_only_these_names("attention")
"""The backward pass remembers the state that enters a chunk, the chunk's inverse (C, C) and the values that were really
written (C, V); all else it makes again."""


def chunk_size(chunk, T):
    """Tokens in a chunk: a power of two, so that blocks can be halved, and not far above T."""
    return min(1 << (chunk - 1).bit_length(), 1 << (T - 1).bit_length())


def split(x_BxTxdims, size):
    """(B, T, H, dim) or (B, T, H) -> (N, B, H, C, dim) float32 with zeros after the last token; dim 1 if missing."""
    x = x_BxTxdims.astype(jnp.float32).reshape(*x_BxTxdims.shape[:3], -1)
    B, T, H, D = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
    return x.reshape(B, -1, size, H, D).transpose(1, 0, 3, 2, 4)


def unsplit(x_NxBxHxCxV, T):
    """Inverse of `split`: (B, T, H, V)."""
    N, B, H, C, V = x_NxBxHxCxV.shape
    return x_NxBxHxCxV.transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, V)[:, :T]


class Segments(NamedTuple):
    """Where documents begin inside chunks. Every mask is boolean and broadcasts against (N, B, H, ...)."""

    same: jax.Array
    """(N, B, 1, C, C): whether two tokens belong to one segment."""
    entered: jax.Array
    """(N, B, 1, C, 1): whether no segment began in the chunk up to this token: the state that enters reaches it."""
    last: jax.Array
    """(N, B, 1, C, 1): whether the token belongs to the chunk's last segment: it reaches the state that leaves."""


def segments(starts_BxT, size):
    """`Segments` from booleans that say where a segment begins."""
    B, T = starts_BxT.shape
    count = jnp.pad(jnp.cumsum(starts_BxT, 1), ((0, 0), (0, -T % size)), mode="edge")
    count = count.reshape(B, -1, size).swapaxes(0, 1)[:, :, None]
    before = jnp.concatenate([jnp.zeros_like(count[:1, ..., -1:]), count[:-1, ..., -1:]])
    return Segments(
        count[..., :, None] == count[..., None, :],
        (count == before)[..., None],
        (count == count[..., -1:])[..., None],
    )


def split_decay(log_decay, size):
    """`split` of log decays, cut where it makes no difference: sums with -inf would bring 0 times infinity."""
    return jnp.maximum(split(log_decay, size), FLOOR)


def log_between(log_decay_NxBxHxCx1):
    """(N, B, H, C, C): sums of log decays after token j up to token i, 0 where i <= j."""
    C = log_decay_NxBxHxCx1.shape[-2]
    # A difference of prefix sums would lose the digits of a small one behind large ones, and its gradients, equal and
    # opposite, would leave rounding errors in tokens that have no part in it. So do all sums here add what they mean.
    rows = jnp.where(np.tril(np.ones((C, C), bool)), log_decay_NxBxHxCx1.mT, 0.0)
    return product(rows, np.tril(np.ones((C, C), np.float32), -1))


def log_sums(log_decay_NxBxHxCxK):
    """Prefix sums along a chunk as (coarse, fine): between two tokens decays what the sum of both parts' differences
    says, to the last digit, since coarse ones add multiples of 1/256 exactly. For kernels: not for differentiation."""
    log_decay = jnp.maximum(log_decay_NxBxHxCxK, FLOOR)
    coarse = jnp.round(log_decay * 256) / 256
    until = np.tril(np.ones((log_decay.shape[-2],) * 2, np.float32))
    return _sum_tokens(until, coarse), _sum_tokens(until, log_decay - coarse)


def _sum_tokens(which_CxC, x):
    """which x over the last two axes of x (..., C, K)."""
    *batch, C, K = x.shape
    if K == 1:
        return product(x[..., 0], which_CxC.T)[..., None]
    # The constant is repeated, since one product with it would transpose x twice.
    return product(jnp.broadcast_to(which_CxC, (*batch, C, C)), x)


def sum_before(x):
    """Sums over the tokens before each one, (..., C, K)."""
    return _sum_tokens(np.tril(np.ones((x.shape[-2],) * 2, np.float32), -1), x)


def sum_after(x):
    """Sums over the tokens after each one, (..., C, K)."""
    return _sum_tokens(np.triu(np.ones((x.shape[-2],) * 2, np.float32), 1), x)


class Gates(NamedTuple):
    """Decays in [0, 1], (N, B, H, C, K or 1), zero where a segment's boundary lies between; 1 if nothing decays."""

    before: jax.Array | float
    """From where the state comes in to just before the token's own decay."""
    enter: jax.Array | float
    """From where the state comes in to just after the token's own decay."""
    leave: jax.Array | float
    """From the token's write to the end of the chunk."""

    @property
    def total(self):
        """From where the state comes in to the end of the chunk, (N, B, H, K or 1, 1); None if nothing decays."""
        return self.enter[..., -1:, :].mT if isinstance(self.enter, jax.Array) else None


def gates(log_decay_NxBxHxCxK, segments: Segments | None):
    """`Gates` of the state that enters a chunk; log_decay None: no decay."""
    found = Gates(1.0, 1.0, 1.0)
    if log_decay_NxBxHxCxK is not None:
        before = sum_before(log_decay_NxBxHxCxK)
        logs = (before, before + log_decay_NxBxHxCxK, sum_after(log_decay_NxBxHxCxK))
        found = Gates(*(jnp.exp(x) for x in logs))
    if segments is None:
        return found
    masks = (segments.entered, segments.entered, segments.last)
    return Gates(*(gate * mask.astype(jnp.float32) for gate, mask in zip(found, masks)))


def reset_gates(log_decay_NxBxHxCxK, segments: Segments):
    """`Gates` of the state that segments which begin inside the chunk start from; `leave`, of writes, is left out."""
    fresh = ~segments.entered
    if log_decay_NxBxHxCxK is None:
        return Gates(fresh.astype(jnp.float32), fresh.astype(jnp.float32), 0.0)
    earlier = np.tril(np.ones(segments.same.shape[-2:], bool), -1) & segments.same
    before = product(earlier.astype(jnp.float32), log_decay_NxBxHxCxK)
    return Gates(jnp.exp(before) * fresh, jnp.exp(before + log_decay_NxBxHxCxK) * fresh, 0.0)


def decayed_products(reads, writes, log_decay_NxBxHxCxK):
    """sum_c x_ic y_jc (decay of channel c between j and i) for j < i, zero elsewhere, of every read x and write y.

    Pairs meet at the middle of the smallest aligned block of 2, 4, 8 ... tokens that holds both: the read brings the
    decay since the middle, the write the decay up to it, both at most 1, and the rest is a matrix product. Both grow
    from level to level by the decay over the neighbouring block. (Exponentials of sums, made anew at each level, cost
    more, and XLA:CPU needs minutes to compile their gradient.)

    Args:
      reads: [(x (N, B, H, C, K), whether it sees its own token's decay)].
      writes: [y (N, B, H, C, K)], which decay from the next token on.

    Returns:
      For each read a list of (N, B, H, C, C), one for each write.
    """
    C, size, through = writes[0].shape[-2], 1, jnp.exp(log_decay_NxBxHxCxK)
    blocks = [[jnp.zeros((*x.shape[:-1], 1, 1), jnp.float32)] * len(writes) for x, _ in reads]
    reads = [x * through if own else x for x, own in reads]
    while size < C:
        late, early = ([halves(x, size)[..., half, :, :] for x in kind] for kind, half in ((reads, 1), (writes, 0)))
        blocks = [
            [join(b[..., ::2, :, :], product(x, y.mT), b[..., 1::2, :, :]) for b, y in zip(kind, early, strict=True)]
            for kind, x in zip(blocks, late, strict=True)
        ]
        first, second = through[..., ::2, :], through[..., 1::2, :]
        reads, writes = [scale_half(x, first, 1) for x in reads], [scale_half(y, second, 0) for y in writes]
        through, size = first * second, 2 * size
    return [[block[..., 0, :, :] for block in kind] for kind in blocks]


class Chunk(NamedTuple):
    """What happens in every chunk. With S the state that enters and u the values that its tokens really write (C, V):

    (I + lower) u = right + erase S;  out = read S + attend u + out;  next S = decay S + write^T u + step.
    """

    lower: jax.Array
    right: jax.Array
    erase: jax.Array
    read: jax.Array
    attend: jax.Array
    write: jax.Array
    out: jax.Array | None = None
    decay: jax.Array | None = None
    step: jax.Array | None = None


def run(chunk: Chunk, start_BxHxKxV, precision):
    """(out (N, B, H, C, V), final state (B, H, K, V)). `precision` is that of products that only the output sees."""
    values, states, final = _chain(
        chunk.lower, chunk.right, chunk.erase, chunk.write, chunk.decay, chunk.step, start_BxHxKxV
    )
    out = jnp.matmul(chunk.read, states, precision=precision) + jnp.matmul(chunk.attend, values, precision=precision)
    return out if chunk.out is None else out + chunk.out, final


@jax.custom_vjp
def _chain(lower, right, erase, write, decay, step, start):
    """(u of every chunk, S that enters every chunk, the last S): `Chunk`'s first and last equations."""
    return _forward(lower, right, erase, write, decay, step, start)[0]


def _forward(lower, right, erase, write, decay, step, start):
    # Named, so that remat policies can keep what is costly to make again.
    inverse = checkpoint_name(inverse_unit_lower(lower), "attention")
    erase_solved = product(inverse, erase)

    def body(state, now):
        erase, right, write, decay, step = now
        values = right + product(erase, state)
        news = product(write.mT, values) + (state if decay is None else decay * state)
        return news if step is None else news + step, (values, state)

    final, outs = jax.lax.scan(body, start, (erase_solved, product(inverse, right), write, decay, step))
    values, states = (checkpoint_name(x, "attention") for x in outs)
    has_step = None if step is None else ()
    return (values, states, final), (inverse, erase_solved, write, decay, has_step, values, states)


def _backward(residuals, cotangents):
    inverse, erase_solved, write, decay, has_step, values, states = residuals
    *d_outs, d_final = cotangents

    def body(d_next, now):
        erase, write, decay, d_values, d_state = now
        d_values = d_values + product(write, d_next)
        d_state = d_state + product(erase.mT, d_values) + (d_next if decay is None else decay * d_next)
        return d_state, (d_values, d_next)

    now = (erase_solved, write, decay, *d_outs)
    d_start, (d_values, d_nexts) = jax.lax.scan(body, d_final, now, reverse=True)
    # With X the inverse, u = X (right + erase S): d lower = -X^T dX X^T comes down to the last of these products.
    d_right = product(inverse.mT, d_values)
    d_erase = product(d_right, states.mT)
    d_lower = -jnp.tril(product(d_right, values.mT), -1)
    d_write = product(values, d_nexts.mT)
    d_decay = None
    if decay is not None:
        repeated = [axis for axis, size in enumerate(decay.shape) if size == 1]
        d_decay = (d_nexts * states).sum(repeated, keepdims=True)
    return d_lower, d_right, d_erase, d_write, d_decay, None if has_step is None else d_nexts, d_start


_chain.defvjp(_forward, _backward)
