"""Which keys a block of queries can see, and in which loops the blocks are run."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128
"""Queries handled at once."""
LOOPS = 8
"""Spans of keys are rounded up to a multiple of 1/LOOPS of the sequence, if it has more blocks than that. This takes at
most 1/16 of the square more, and each length costs a loop's compilation."""


class Shape(NamedTuple):
    """The static part of a request."""

    causal: bool
    window: int | None
    sinks: int
    softcap: float | None
    scale: float


def visible(i, j, causal, window, sunk=False):
    """Whether query position i sees key position j, elementwise; `sunk` says which keys are sinks."""
    keep = j <= i if causal else jnp.ones(jnp.broadcast_shapes(i.shape, j.shape), bool)
    if window is not None:
        near = i - j < window if causal else jnp.abs(i - j) < window
        keep &= near | sunk
    return keep


class Loop(NamedTuple):
    """Consecutive blocks of queries that take equally long spans of keys."""

    starts: list[int]
    """The first query of each block."""
    firsts: list[int]
    """The first key of each block's span; they never fall."""
    size: int
    """Queries in a block."""
    length: int
    """Keys in a span: all that any query of the block sees, without sinks before the span."""


def loops(T: int, shape: Shape) -> list[Loop]:
    """Of all T queries in order: spans as short as they can be, but for rounding up (see `LOOPS`)."""
    near = shape.window or T
    # Sinks of a document that begins in a block may lie ahead of its queries' windows, but not causally.
    ahead = 0 if shape.causal else max(near, shape.sinks) - 1
    longest = min(T, near - 1 + BLOCK + ahead)
    step = -(-T // (LOOPS * BLOCK)) * BLOCK

    def sizes(start):
        size = min(BLOCK, T - start)
        length = min(T, start + size + ahead) - max(0, start - near + 1)
        return size, min(longest, -(-length // step) * step)

    found = []
    for (size, length), starts in itertools.groupby(range(0, T, BLOCK), sizes):
        starts = list(starts)
        found.append(Loop(starts, [max(0, min(start - near + 1, T - length)) for start in starts], size, length))
    return found


class Block(NamedTuple):
    """A block of queries, and the keys that any of them can see: sinks before its span, then the span."""

    start: int | jax.Array
    size: int
    first: int | jax.Array
    """The first key of the span."""
    length: int
    """Keys in the span."""
    sinks_BxN: jax.Array | None
    """Where sinks stand before the span. None without any."""
    needed: jax.Array | None
    """Which of these keys are no repetition, (B, keys). None: all."""

    def rows(self, x, axis):
        """The entries of x at these queries, which stand along `axis`."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis)

    def keys(self, x, axis):
        """The entries of x (B, ...) at these keys, which stand along `axis`."""
        near = jax.lax.dynamic_slice_in_dim(x, self.first, self.length, axis)
        if self.sinks_BxN is None:
            return near
        at = self.sinks_BxN.reshape([-1 if i == axis else n if i == 0 else 1 for i, n in enumerate(x.shape)])
        return jnp.concatenate([jnp.take_along_axis(x, at, axis), near], axis)

    def positions(self):
        """Of the queries, (1, queries, 1), and of the keys, (1 or B, 1, keys)."""
        i, j = self.start + jnp.arange(self.size), self.first + jnp.arange(self.length)[None]
        if self.sinks_BxN is not None:
            j = jnp.concatenate([self.sinks_BxN, jnp.broadcast_to(j, (len(self.sinks_BxN), self.length))], 1)
        return i[None, :, None], j[:, None, :]

    def add(self, total, part):
        """`total` (B, ..., T) with `part` (B, ..., keys of this block) added at these keys."""
        N, axis = part.shape[-1] - self.length, total.ndim - 1
        near = jax.lax.dynamic_slice_in_dim(total, self.first, self.length, axis) + part[..., N:]
        total = jax.lax.dynamic_update_slice_in_dim(total, near, self.first, axis)
        if N:
            total = jax.vmap(lambda row, at, piece: row.at[..., at].add(piece))(total, self.sinks_BxN, part[..., :N])
        return total


def block_at(loop: Loop, start, first, B: int, T: int, documents, shape: Shape) -> Block:
    """The block of `loop` whose queries begin at `start` and whose span of keys at `first`."""
    N = min(shape.sinks, loop.firsts[-1])
    if not N:
        return Block(start, loop.size, first, loop.length, None, None)
    # Documents are contiguous: only the one that `first` stands in has sinks before `first` that are still seen.
    begin = jnp.zeros((B, 1), jnp.int32)
    if documents is not None:
        begin = jax.lax.dynamic_slice_in_dim(documents, first, 1, axis=1)
    at = begin + jnp.arange(N)
    needed = jnp.pad(at < first, ((0, 0), (0, loop.length)), constant_values=True)
    return Block(start, loop.size, first, loop.length, jnp.minimum(at, T - 1), needed)
