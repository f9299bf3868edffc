"""Attention over the blocks of a `BlockTable` as a kernel: keys are read where they lie, with a running softmax.

The XLA form (slm.attention.gathered) copies the key blocks of every query block side by side.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from slm.attention import gathered
from slm.attention.block_table import EMPTY, BlockTable
from slm.attention.pallas.sequence import Kernel, Operand, column, dot, iota, pad, padded


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BxGxNxRxtxK, k_BxGxNxsxK, v_BxGxNxsxV, documents, shape: gathered.Shape):
    """As `slm.attention.gathered.attend`, whose backward pass it shares.

    Raises:
      ValueError: blocks are not a power of two, 16 at least; or the pattern sees positions inside of documents.
    """
    return _forward(q_BxGxNxRxtxK, k_BxGxNxsxK, v_BxGxNxsxV, documents, shape)[0]


def _forward(q, k, v, documents, shape):
    _check(shape)
    (B, G, N, R, b, K), V = q.shape, v.shape[-1]
    Kp, Vp = padded(K), padded(V)
    queries = pad(q, {5: Kp}).reshape(B * G, N, R, b, Kp)
    keys, values = pad(k, {4: Kp}).reshape(B * G, N, b, Kp), pad(v, {4: Vp}).reshape(B * G, N, b, Vp)
    table = shape.table

    def at_query(array, rows, size):
        return Operand(array, (None, None, None, rows, size), lambda y, p, *_: (y // R, p, y % R, 0, 0))

    def at_key(array, size):
        return Operand(array, (None, None, b, size), lambda y, p, j, keys, *_: (y // R, keys[p, j], 0, 0))

    mask = Operand(
        jnp.asarray(table.masks, jnp.int32), (None, b, b), lambda y, p, j, keys, kinds, counts: (kinds[p, j], 0, 0)
    )
    fixed, moving = [at_query(queries, b, Kp)], [at_key(keys, Kp), at_key(values, Vp), mask]
    if documents.segment_ids_BxNxb is not None:
        segments, H, row = documents.segment_ids_BxNxb[:, :, None], G * R, (None, None, 1, b)
        fixed.append(Operand(segments, row, lambda y, p, *_: (y // H, p, 0, 0)))
        moving.append(Operand(segments, row, lambda y, p, j, keys, *_: (y // H, keys[p, j], 0, 0)))
    tables = _tables(table)
    _, (out, log_z) = Kernel(
        start=functools.partial(_start, V=Vp),
        step=functools.partial(_step, scale=shape.scale, softcap=shape.softcap),
        finish=_finish,
        grid=(B * G * R, N),
        steps=tables[0].shape[1],
        fixed=fixed,
        moving=moving,
        results=[],
        final=[
            at_query(jax.ShapeDtypeStruct((B * G, N, R, b, Vp), q.dtype), b, Vp),
            at_query(jax.ShapeDtypeStruct((B * G, N, R, 1, b), jnp.float32), 1, b),
        ],
        tables=tables,
        count=lambda y, p, keys, kinds, counts: counts[p],
    ).run()
    out = checkpoint_name(out.reshape(*q.shape[:-1], Vp)[..., :V], "attention")
    log_z = checkpoint_name(log_z.reshape(q.shape[:-1]), "attention")
    return out, (q, k, v, documents, out, log_z)


attend.defvjp(_forward, gathered.backward)


def _check(shape: gathered.Shape):
    if shape.positional is not None:
        raise ValueError(
            'implementation = "pallas": the kernel of sparse_attention serves no pattern that depends on positions '
            "inside of documents: use xla"
        )
    if shape.block != padded(shape.block):
        raise ValueError(
            f'implementation = "pallas": block = {shape.block}, but the kernel of sparse_attention needs a power of '
            "two, 16 at least: change block, or use xla"
        )


def _tables(table: BlockTable):
    """(key blocks (N, n), kinds of their masks (N, n), how many (N,)) of each query block, the last one repeated."""
    rows = [np.flatnonzero(row != EMPTY) for row in table.kinds]
    counts = np.array([len(row) for row in rows])
    keys = np.zeros((len(rows), max(1, counts.max())), np.int64)
    for at, row in enumerate(rows):
        if len(row):
            keys[at] = np.pad(row, (0, keys.shape[1] - len(row)), mode="edge")
    kinds = np.take_along_axis(table.kinds, keys, 1)
    return [jnp.asarray(x, jnp.int32) for x in (keys, kinds, counts)]


def _start(q_txK, *_, V):
    t = q_txK.shape[0]
    # Above the logit of what is masked, so that a row without any key comes to exp(-1e30 + 1e29) = 0.
    return jnp.full((t, 1), -1e29), jnp.zeros((t, 1)), jnp.zeros((t, V))


def _step(carry, fixed, moving, *, scale, softcap):
    """The running softmax of Milakov and Gimelshein (2018), as in FlashAttention."""
    (top_tx1, total_tx1, out_txV), (q_txK, *own), (k_sxK, v_sxV, mask_txs, *others) = carry, fixed, moving
    logits = dot(q_txK, k_sxK, (1, 1)) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    keep = mask_txs != 0
    for segment_1xt, other_1xs in zip(own, others, strict=True):
        keep &= column(segment_1xt, keep.shape[1]) == other_1xs
    logits = jnp.where(keep, logits, -1e30)
    top = jnp.maximum(top_tx1, logits.max(1, keepdims=True))
    weights, faded = jnp.exp(logits - top), jnp.exp(top_tx1 - top)
    total = faded * total_tx1 + weights.sum(1, keepdims=True)
    return (top, total, faded * out_txV + dot(weights.astype(v_sxV.dtype), v_sxV)), ()


def _finish(top_tx1, total_tx1, out_txV):
    sees = jnp.where(total_tx1 > 0, total_tx1, 1.0)
    log_z = jnp.where(total_tx1 > 0, top_tx1, 0.0) + jnp.log(sees)
    t = log_z.shape[0]
    row_1xt = jnp.where(iota((t, t), 0) == iota((t, t), 1), log_z, 0.0).sum(0, keepdims=True)
    return out_txV / sees, row_1xt
