"""Attention over gathered blocks of keys, with a hand-written backward pass: the engine of `sparse_attention`.

Saved are q, k, v, the output and each row's log-normaliser; weights are recomputed (FlashAttention-2, Dao 2023), so
memory grows with T, not T^2. Query blocks go through scans in portions; see slm.attention.block_table.
Letters: N blocks, b positions in a block, P query blocks at once, n key blocks of each, t and s positions inside a
block of queries and of keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slm.attention.block_table import EMPTY, BlockTable, Work, block_table
from slm.attention.patterns import Pattern

PORTION, CPU_PORTION = 2**26, 2**17
"""Logits that are computed at once, about: 256 MB, so that few steps of a scan keep an accelerator busy (not measured
there); on a CPU they should stay in a core's cache."""


class Shape(NamedTuple):
    """The static part of a request."""

    pattern: Pattern
    """Which blocks are computed."""
    first: int
    """Besides these, for each query the blocks of the first so many tokens of its document."""
    positional: Pattern | None
    """What is visible in them, asked about positions; None: `pattern`, asked about 0 ... T-1."""
    length: int
    block: int
    scale: float
    softcap: float | None

    @property
    def table(self) -> BlockTable:
        return block_table(self.pattern, self.length, self.block)

    @property
    def first_blocks(self) -> int:
        """How many blocks these tokens may lie in."""
        return (self.first + self.block - 2) // self.block + 1 if self.first else 0

    def works(self, k_BxGxNxsxK, R: int) -> list[Work]:
        B, G = k_BxGxNxsxK.shape[:2]
        portion = CPU_PORTION if jax.default_backend() == "cpu" else PORTION
        return self.table.work(max(1, portion // (B * G * R * self.block**2)))


def gathered_attention(q, k, v, segment_ids, positions, shape: Shape, kernel=None):
    """See `sparse_attention`. q: (B, T, H, K), k: (B, T, G, K), v: (B, T, G, V) -> (B, T, H, V).

    `kernel` does what `attend` does, and does it if that is None.
    """
    B, T, H, K = q.shape
    G, b = k.shape[2], shape.block
    # Heads lead, so that every product below is a plain batched matrix product.
    q = jnp.moveaxis(in_blocks(q.reshape(B, T, G, H // G, K), b), (3, 4), (1, 3))
    k, v = (jnp.moveaxis(in_blocks(x, b), 3, 1) for x in (k, v))
    documents = _Documents(*(None if x is None else in_blocks(x, b) for x in (segment_ids, positions)))
    out = jnp.moveaxis((kernel or attend)(q, k, v, documents, shape), (1, 3), (3, 4))
    return out.reshape(B, -1, H, v.shape[-1])[:, :T]


class _Documents(NamedTuple):
    segment_ids_BxNxb: jax.Array | None
    positions_BxNxb: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BxGxNxRxtxK, k_BxGxNxsxK, v_BxGxNxsxV, documents, shape):
    return _forward(q_BxGxNxRxtxK, k_BxGxNxsxK, v_BxGxNxsxV, documents, shape)[0]


def _forward(q, k, v, documents, shape):
    def portion(carry, work):
        near = _Near.of(work, documents, shape)
        logits = near.logits(q, k, shape)
        # A query block may come by several times, each time with other keys (Milakov and Gimelshein 2018, algorithm 3).
        old_top, old_total, old_out = map(near.rows, carry)
        top = jnp.maximum(old_top, logits.max((-2, -1)))
        weights, fading = jnp.exp(logits - top[..., None, None]), jnp.exp(old_top - top)
        total = old_total * fading + weights.sum((-2, -1))
        out = _einsum("BGPRtns,BGPnsV->BGPRtV", weights.astype(v.dtype), near.columns(v))
        return jax.tree.map(near.put, carry, (top, total, out + old_out * fading[..., None])), None

    # Bounded, so that a row without any key comes to exp(-1e30 + 1e29) = 0.
    top, total = jnp.full(q.shape[:-1], -1e29), jnp.zeros(q.shape[:-1])
    carry = top, total, jnp.zeros((*q.shape[:-1], v.shape[-1]))
    for work in shape.works(k, q.shape[3]):
        carry, _ = jax.lax.scan(portion, carry, work)
    top, total, out = carry
    sees = jnp.where(total > 0, total, 1)
    # Named, so that a remat policy can keep them: from these the backward pass needs no second forward pass.
    out = checkpoint_name((out / sees[..., None]).astype(q.dtype), "attention")
    log_z = checkpoint_name(jnp.where(total > 0, top, 0) + jnp.log(sees), "attention")
    return out, (q, k, v, documents, out, log_z)


def backward(shape, residuals, d_out):
    q, k, v, documents, out, log_z = residuals
    # sum_j p_j dp_j of the softmax's Jacobian, from the output alone (Dao et al. 2022, eq. 4).
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def portion(carry, work):
        d_q, d_k, d_v = carry
        near = _Near.of(work, documents, shape)
        logits = near.logits(q, k, shape)
        rows, d_rows = near.rows(q), near.rows(d_out)
        weights = jnp.exp(logits - near.rows(log_z)[..., None, None])
        d_weights = _einsum("BGPRtV,BGPnsV->BGPRtns", d_rows, near.columns(v))
        d_logits = weights * (d_weights - near.rows(inner)[..., None, None])
        if shape.softcap is not None:
            d_logits *= 1 - (jnp.where(logits > -1e29, logits, 0) / shape.softcap) ** 2
        # Materialised once: XLA would otherwise recompute the exponentials inside each product's transposing copy.
        weights, d_logits = jax.lax.optimization_barrier(
            (weights.astype(v.dtype), (d_logits * shape.scale).astype(q.dtype))
        )
        d_q = near.put(d_q, near.rows(d_q) + _einsum("BGPRtns,BGPnsK->BGPRtK", d_logits, near.columns(k)))
        # Transposed products: the operand that XLA:CPU copies to transpose is then the small one, not (t, n s).
        d_k = near.add(d_k, jnp.moveaxis(_einsum("BGPRtK,BGPRtns->BGPKns", rows, d_logits), 3, 5))
        d_v = near.add(d_v, jnp.moveaxis(_einsum("BGPRtV,BGPRtns->BGPVns", d_rows, weights), 3, 5))
        return (d_q, d_k, d_v), None

    carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    for work in shape.works(k, q.shape[3]):
        carry, _ = jax.lax.scan(portion, carry, work)
    return *(d_x.astype(x.dtype) for d_x, x in zip(carry, (q, k, v))), None


attend.defvjp(_forward, backward)


class _Near(NamedTuple):
    """P query blocks, and the key blocks that each of them needs."""

    blocks_P: jax.Array
    """Numbers of the query blocks; N where there is none."""
    keys_BxPxn: jax.Array
    keep_BxPxtxnxs: jax.Array
    """B may be 1."""

    @classmethod
    def of(cls, work: Work, documents: _Documents, shape: Shape) -> "_Near":
        segment_ids, positions = documents
        at = next((x for x in documents if x is not None), None)
        B = 1 if at is None else at.shape[0]
        keys = jnp.broadcast_to(work.keys, (B, *work.keys.shape))
        near = cls(work.rows, keys, None)
        if shape.positional is None:
            keep = jnp.asarray(shape.table.masks)[work.kinds].swapaxes(1, 2)[None]
        else:
            needed = jnp.broadcast_to(work.kinds != EMPTY, keys.shape)
            if shape.first_blocks:
                keys, needed = _with_first(work, positions, keys, needed, shape)
                near = cls(work.rows, keys, None)
            i, j = near.queries_at(positions), near.keys_at(positions)
            inside = near.keys_at(jnp.arange(positions[0].size).reshape(1, -1, shape.block)) < shape.length
            keep = shape.positional(i, j) & inside & needed[:, :, None, :, None]
        if segment_ids is not None:
            keep &= near.queries_at(segment_ids) == near.keys_at(segment_ids)
        return near._replace(keep_BxPxtxnxs=keep)

    def rows(self, x_BxGxN):
        """Of these query blocks; zeros where there is none."""
        return jnp.take(x_BxGxN, self.blocks_P, axis=2, mode="fill", fill_value=0)

    def put(self, x_BxGxN, rows_BxGxP):
        return x_BxGxN.at[:, :, self.blocks_P].set(rows_BxGxP, mode="drop")

    def columns(self, x_BxGxN):
        """(B, G, P, n, ...) of these key blocks."""
        keys = jnp.broadcast_to(self.keys_BxPxn, (len(x_BxGxN), *self.keys_BxPxn.shape[1:]))
        return jax.vmap(lambda x, at: jnp.take(x, at, axis=1, mode="clip"))(x_BxGxN, keys)

    def add(self, x_BxGxN, part_BxGxPxn):
        keys = jnp.broadcast_to(self.keys_BxPxn, (len(x_BxGxN), *self.keys_BxPxn.shape[1:]))
        return jax.vmap(lambda x, at, part: x.at[:, at].add(part))(x_BxGxN, keys, part_BxGxPxn)

    def queries_at(self, x_BxNxb):
        return jnp.take(x_BxNxb, self.blocks_P, axis=1, mode="clip")[:, :, :, None, None]

    def keys_at(self, x_BxNxb):
        x_BxNxb = jnp.broadcast_to(x_BxNxb, (len(self.keys_BxPxn), *x_BxNxb.shape[1:]))
        return self.columns(x_BxNxb[:, None])[:, 0, :, None]

    def logits(self, q, k, shape: Shape):
        """Scaled, capped, masked (B, G, P, R, t, n, s) float32."""
        logits = _einsum("BGPRtK,BGPnsK->BGPRtns", self.rows(q), self.columns(k)) * shape.scale
        if shape.softcap is not None:
            logits = shape.softcap * jnp.tanh(logits / shape.softcap)
        # Finite, so that a row without any key stays NaN-free; it underflows to exactly 0 in every other row.
        return jnp.where(self.keep_BxPxtxnxs[:, None, :, None], logits, -1e30)


def _with_first(work, positions_BxNxb, keys_BxPxn, needed_BxPxn, shape):
    """Keys and whether they are needed, with the blocks of the first tokens of the document that each query block
    begins in. Documents that begin later have theirs in the query block itself, as `wherever` sees to."""
    b, N = shape.block, positions_BxNxb.shape[1]
    begins_BxN = jnp.arange(N) * b - positions_BxNxb[:, :, 0]
    begins_BxP = jnp.take(begins_BxN, work.rows, axis=1, mode="clip")
    first = begins_BxP[..., None] // b + jnp.arange(shape.first_blocks)
    rows = work.rows[:, None]
    twice = jnp.asarray(shape.table.kinds != EMPTY).at[rows, first].get(mode="clip")
    needed = work.leads[:, None] & ~twice & (first >= 0) & (first <= rows)
    return jnp.concatenate([keys_BxPxn, first], -1), jnp.concatenate([needed_BxPxn, needed], -1)


def _einsum(equation, *operands):
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def in_blocks(x_BxT, b):
    """(B, T, ...) as (B, N, b, ...), filled up with zeros."""
    x = jnp.pad(x_BxT, ((0, 0), (0, -x_BxT.shape[1] % b)) + ((0, 0),) * (x_BxT.ndim - 2))
    return x.reshape(x.shape[0], -1, b, *x.shape[2:])
