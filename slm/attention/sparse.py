"""Softmax attention over what a mask pattern makes visible, computing only blocks of which anything is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from slm.attention.block_table import invariant, wherever
from slm.attention.gathered import Shape, gathered_attention, in_blocks
from slm.attention.patterns import Explicit, Pattern
from slm.attention.softmax import BLOCK, _attend


def sparse_attention(
    q,
    k,
    v,
    *,
    pattern,
    scale=None,
    softcap=None,
    segment_ids=None,
    positions=None,
    block=64,
    implementation="auto",
):
    """softmax(scale q k^T) v over the pairs that `pattern` makes visible, accumulated in float32.

    Nothing is added to the pattern: say `causal & ...` for the past only. A query that sees no key gives zeros.

    Time is proportional to the blocks with any visible pair, not to the pairs: window, global tokens, local and random
    blocks gain; `strided` and `fixed` touch every s-th column, hence every block where s <= `block`, and gain nothing.
    Patterns that see only multiples of d (`dilated`) are computed on the d interleaved sequences, where they are dense.

    Args:
      q: (B, T, H, K). k: (B, T, G, K), G divides H; query head h reads key head h // (H/G). v: (B, T, G, V).
      pattern: a mask function of slm.attention.patterns, or a boolean array (T, T), [query, key], known when tracing.
      scale: None means K**-0.5.
      softcap: c: logits become c tanh(logits / c).
      segment_ids: (B, T) integers: a query sees only keys of its own segment.
      positions: (B, T) integers: the positions that the pattern sees; None: 0 ... T-1. In documents packed into a row
        they count from 0 in each segment. Blocks are then computed that any layout of documents could make visible: few
        for causal, windows, chunks, local blocks and, with causal, global tokens; all for `fixed`, `random_blocks` and
        arrays.
      block: positions in a block.
      implementation: "xla"; "pallas" an accelerator kernel (interpreted, slowly, on a CPU) that serves no patterns that
        depend on positions inside of documents; "auto" is "xla": the kernel is unmeasured.

    Returns:
      (B, T, H, V) of q's dtype.

    Raises:
      ValueError: shapes do not agree, positions come without segment_ids, the array is traced or not (T, T) booleans,
        or there is no such implementation.
    """
    if implementation not in ("auto", "xla", "pallas"):
        raise ValueError(f"implementation = {implementation!r}: must be auto, xla or pallas")
    _check(q, k, v, segment_ids, positions)
    if not isinstance(pattern, Pattern):
        pattern = Explicit.of(pattern)
    if isinstance(pattern, Explicit) and pattern.length != q.shape[1]:
        raise ValueError(f"pattern is an array of {pattern.length} x {pattern.length} booleans for T = {q.shape[1]}")
    if positions is not None and segment_ids is None:
        raise ValueError("positions are those inside documents: give segment_ids, which tell the documents apart")
    if block < 1:
        raise ValueError(f"block = {block}: must be at least 1")
    T, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    step, shape = _plan(pattern, T, block, positions is not None, scale, softcap)
    if shape.positional is None:
        positions = None
    kernel = None
    if implementation == "pallas":
        from slm.attention.pallas.block_sparse import attend as kernel
    if step == 1:
        return gathered_attention(q, k, v, segment_ids, positions, shape, kernel)
    if T % step:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        end = jnp.broadcast_to(segment_ids.max(1, keepdims=True) + 1, (len(q), -T % step))
        segment_ids = jnp.concatenate([segment_ids, end], 1)
    q, k, v, segment_ids = jax.tree.map(functools.partial(_apart, step=step), (q, k, v, segment_ids))
    out = gathered_attention(q, k, v, segment_ids, None, shape, kernel)
    out = out.reshape(-1, step, *out.shape[1:]).swapaxes(1, 2)
    return out.reshape(len(out), -1, *out.shape[3:])[:, :T]


def blocks_computed(pattern: Pattern, T: int, *, block: int = 64, documents: bool = False) -> int:
    """Pairs of blocks that `sparse_attention` computes for T positions (with `positions`, if `documents`)."""
    step, shape = _plan(pattern, T, block, documents, 1.0, None)
    return step * (shape.table.kept + len(shape.table.kinds) * shape.first_blocks)


def cached_sparse_attention(q, k, v, query_positions, key_positions, *, pattern, scale=None, softcap=None):
    """Attention of new queries over cached keys in any order, as a decode step and a prefill need it.

    Long calls take `BLOCK` queries at a time, so that memory grows with S, not with T S. Every key is looked at; how
    many need to be cached is told by `patterns.reach`.

    Args:
      q: (B, T, H, K). k: (B, S, G, K). v: (B, S, G, V).
      query_positions: (B, T) integers. key_positions: (B, S) integers, -1 where the slot is empty.
      pattern, scale, softcap: as in `sparse_attention`; the pattern must say `causal &` where that is meant.

    Returns:
      (B, T, H, V); zeros for a query that sees no key.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attend(q_BxTxHxK, positions_BxT):
        j = key_positions[:, None, :]
        keep = pattern(positions_BxT[:, :, None], j) & (j >= 0)
        out = _attend(q_BxTxHxK, k, v, keep, scale, softcap, None)
        return jnp.where(keep.any(-1)[..., None, None], out, 0)

    T = q.shape[1]
    if T <= BLOCK:
        return attend(q, query_positions)
    q_blocks, position_blocks = (jnp.moveaxis(in_blocks(x, BLOCK), 1, 0) for x in (q, query_positions))
    out = jax.lax.map(lambda x: attend(*x), (q_blocks, position_blocks))
    return jnp.moveaxis(out, 0, 1).reshape(len(q), -1, *out.shape[3:])[:, :T]


@dataclasses.dataclass(frozen=True)
class _Every(Pattern):
    """What `pattern`, which depends on i - j alone, does to every step-th position."""

    pattern: Pattern
    step: int

    def __call__(self, i, j):
        return self.pattern(i * self.step, j * self.step)


def _plan(pattern, T, block, documents, scale, softcap) -> tuple[int, Shape]:
    """(step, what to compute): with step > 1 for each of the sequences of every step-th position by itself."""
    if not invariant(pattern):
        seen, first = wherever(pattern) if documents else (pattern, 0)
        return 1, Shape(seen, first, pattern if documents else None, T, block, scale, softcap)
    whole = Shape(pattern, 0, None, T, block, scale, softcap)
    differences = np.arange(-T, T + 1)
    step = int(np.gcd.reduce(differences[pattern(differences, 0)]))
    if step <= 1:
        return 1, whole
    apart = whole._replace(pattern=_Every(pattern, step), length=-(-T // step))
    return (step, apart) if step * apart.table.kept < whole.table.kept else (1, whole)


def _apart(x_BxT, step):
    """(B, T, ...) as (B step, T / step, ...): every step-th position to itself, filled up with zeros at the end."""
    x = in_blocks(x_BxT, step).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def _check(q, k, v, segment_ids, positions):
    B, T, H, K = q.shape
    if k.shape[:2] != (B, T) or k.shape[3] != K or v.shape[:3] != k.shape[:3] or H % k.shape[2]:
        raise ValueError(
            f"shapes do not agree: q {q.shape}, k {k.shape}, v {v.shape}; expected (B,T,H,K), (B,T,G,K), (B,T,G,V) "
            "with G dividing H"
        )
    for name, x in (("segment_ids", segment_ids), ("positions", positions)):
        if x is not None and x.shape != (B, T):
            raise ValueError(f"{name} has shape {x.shape}, expected {(B, T)}")
