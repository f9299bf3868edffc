"""gather, scatter and dynamic slices as GatherND, ScatterND and Slice.

XLA cuts windows out of its operand; ONNX indexes the leading axes and takes all of the others. So what XLA indexes is
brought to the front, a window becomes a grid of indices, and batching dimensions become indices that count.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from slm.interop.onnx.graph import INLINE, Graph, Tensor, constant
from slm.interop.onnx.shapes import output

CLIP, FILL, PROMISE = "CLIP", "FILL_OR_DROP", "PROMISE_IN_BOUNDS"
REDUCTIONS = {"scatter": "none", "scatter-add": "add", "scatter-mul": "mul", "scatter-min": "min", "scatter-max": "max"}


class Windows(NamedTuple):
    """Which windows of an operand are meant, in ONNX's terms."""

    indexed: list[int]
    """Axes of the operand that are indexed, in order; they go to the front."""
    rest: list[int]
    """Its other axes, taken whole."""
    grid: list[int]
    """Those indexed axes whose windows have an axis of the result."""
    batch: tuple[int, ...]
    """Shape of the windows' numbers."""
    index: Tensor
    """(*batch, *sizes of grid, len(indexed)) int64."""
    valid: Tensor | None
    """(*batch) bool: whether the window lies inside; None: all do."""


def windows(shape, indices: Tensor, columns, batching, sizes, dropped, mode: str, trace) -> Windows:
    """The windows of an operand of `shape`.

    Args:
      indices: (*batch, n) integers: starts of windows.
      columns: the operand's axis that each of the n means.
      batching: pairs of an axis of the operand and the axis of `indices` that counts along with it.
      sizes: of a window, by axis of the operand.
      dropped: axes of the operand, of window size 1, that the result does not have (batching ones too).
      mode: CLIP, FILL or PROMISE: what to do with windows that leave the operand.
      trace: (function, tensors) -> tensors of the function's results.
    """
    counted, batch = dict(batching), indices.shape[:-1]
    indexed = [i for i, n in enumerate(shape) if i in columns or i in counted or sizes[i] != n]
    rest = [i for i in range(len(shape)) if i not in indexed]
    grid = [i for i in indexed if i not in dropped]
    whole = (*batch, *(sizes[i] for i in grid))

    def index_of(starts):
        parts, valid = [], jnp.ones(batch, bool)
        for axis in indexed:
            if axis in counted:
                at = lax.broadcasted_iota(jnp.int32, batch, counted[axis])
            elif axis in columns:
                at = lax.index_in_dim(starts, columns.index(axis), len(batch), keepdims=False)
                last = shape[axis] - sizes[axis]
                if mode == FILL:
                    valid &= (at >= 0) & (at <= last)
                if mode != PROMISE:
                    at = jnp.minimum(jnp.maximum(at, 0), last)
            else:
                at = jnp.zeros(batch, jnp.int32)
            at = jnp.broadcast_to(at.reshape(*batch, *(1,) * len(grid)), whole)
            if axis in grid:
                at += lax.broadcasted_iota(at.dtype, whole, len(batch) + grid.index(axis))
            parts.append(at.astype(jnp.int32)[..., None])
        return lax.concatenate(parts, len(whole)), valid

    index, valid = trace(index_of, indices)
    sure = mode != FILL or (valid.array is not None and bool(valid.array.all()))
    return Windows(indexed, rest, grid, batch, index, None if sure else valid)


def gather(g: Graph, e, trace, operand: Tensor, indices: Tensor):
    d, sizes, mode = e.params["dimension_numbers"], e.params["slice_sizes"], e.params["mode"].name
    shape, dtype = output(e)
    counted = tuple(zip(d.operand_batching_dims, d.start_indices_batching_dims))
    dropped = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    w = windows(operand.shape, indices, tuple(d.start_index_map), counted, sizes, dropped, mode, trace)
    operand = g.transpose(g.full(operand), [*w.indexed, *w.rest])
    found = (*w.index.shape[:-1], *(operand.shape[len(w.indexed) :]))
    if len(w.indexed) == 1:
        at = g.reshape(w.index, w.index.shape[:-1])
        out = g.node("Gather", [operand, at], found, dtype, axis=0)
    else:
        out = g.node("GatherND", [operand, g.cast(g.full(w.index), np.int64)], found, dtype)
    kept = [i for i in range(len(operand.shape)) if i not in dropped]
    has = [*w.grid, *w.rest]
    place = dict(zip(d.offset_dims, kept))
    numbers = iter(range(len(w.batch)))
    axes = [len(w.batch) + has.index(place[i]) if i in place else next(numbers) for i in range(len(shape))]
    out = g.transpose(out, axes)
    if w.valid is None:
        return out
    fill = e.params["fill_value"]
    if fill is None:
        fill = _absent(dtype)
    wide = [1 if i in place else n for i, n in enumerate(shape)]
    (chosen,) = trace(lambda ok, x: (jnp.where(ok.reshape(wide), x, jnp.asarray(fill, dtype)),), w.valid, out)
    return chosen


def _absent(dtype):
    """What jax reads outside of an array: NaN, or the number least likely to be mistaken."""
    if np.issubdtype(dtype, np.floating):
        return np.nan
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.signedinteger) else np.iinfo(dtype).max


def scatter(g: Graph, e, trace, operand: Tensor, indices: Tensor, updates: Tensor):
    d, mode = e.params["dimension_numbers"], e.params["mode"].name
    shape, dtype = output(e)
    dropped = (*d.inserted_window_dims, *d.operand_batching_dims)
    kept = [i for i in range(len(shape)) if i not in dropped]
    place = dict(zip(kept, d.update_window_dims))
    sizes = [updates.shape[place[i]] if i in place else 1 for i in range(len(shape))]
    counted = tuple(zip(d.operand_batching_dims, d.scatter_indices_batching_dims))
    columns = tuple(d.scatter_dims_to_operand_dims)
    w = windows(shape, indices, columns, counted, sizes, dropped, mode, trace)
    numbers = [i for i in range(len(updates.shape)) if i not in d.update_window_dims]
    updates = g.transpose(g.full(updates), [*numbers, *(place[i] for i in (*w.grid, *w.rest))])
    order = [*w.indexed, *w.rest]
    operand, index = g.transpose(g.full(operand), order), w.index
    n = operand.shape[0]
    if w.valid is not None:
        # ONNX knows no update that is dropped: those go to a row that is cut off again.
        operand, index = trace(lambda *inputs: _with_bin(n, w, *inputs), operand, index, w.valid)
    how = REDUCTIONS[e.primitive.name]
    out = g.node("ScatterND", [g.full(operand), g.cast(g.full(index), np.int64), updates], operand.shape, dtype,
                 reduction=how)  # fmt: skip
    if w.valid is not None:
        (out,) = trace(lambda x: (lax.slice_in_dim(x, 0, n),), out)
    return g.transpose(out, [order.index(i) for i in range(len(order))])


def _with_bin(n: int, w: Windows, operand, index, valid):
    valid = jnp.broadcast_to(valid.reshape(*w.batch, *(1,) * len(w.grid)), index.shape[:-1])
    first, others = index[..., :1], index[..., 1:]
    first = jnp.where(valid[..., None], first, n)
    spare = jnp.zeros((1, *operand.shape[1:]), operand.dtype)
    return lax.concatenate([operand, spare], 0), lax.concatenate([first, others], index.ndim - 1)


def dynamic_slice(g: Graph, e, trace, operand: Tensor, *starts: Tensor):
    shape, dtype = output(e)
    axes = [i for i, n in enumerate(operand.shape) if shape[i] != n]
    if not axes:
        return operand

    def ends_of(*starts):
        first = [jnp.clip(s, 0, operand.shape[i] - shape[i]).astype(jnp.int32).reshape(1) for s, i in zip(starts, axes)]
        first = lax.concatenate(first, 0)
        return first, first + jnp.asarray([shape[i] for i in axes], jnp.int32)

    first, last = (g.cast(g.full(x), np.int64) for x in trace(ends_of, *(starts[i] for i in axes)))
    return g.node("Slice", [g.full(operand), first, last, constant(np.array(axes, np.int64))], shape, dtype)


def dynamic_update_slice(g: Graph, e, trace, operand: Tensor, update: Tensor, *starts: Tensor):
    shape, dtype = output(e)
    axes = [i for i, n in enumerate(shape) if update.shape[i] != n]
    if not axes:
        return update
    if math.prod(update.shape) > INLINE:
        raise NotImplementedError("an update of so many elements")

    def start_of(*starts):
        return (lax.concatenate([s.astype(jnp.int32).reshape(1) for s in starts], 0),)

    (start,) = trace(start_of, *(starts[i] for i in axes))
    w = windows(shape, start, tuple(axes), (), update.shape, (), CLIP, trace)
    order = [*w.indexed, *w.rest]
    inputs = [
        g.transpose(g.full(operand), order),
        g.cast(g.full(w.index), np.int64),
        g.transpose(g.full(update), order),
    ]
    out = g.node("ScatterND", inputs, [shape[i] for i in order], dtype)
    return g.transpose(out, [order.index(i) for i in range(len(order))])


INDEXING = {
    "gather": gather,
    **dict.fromkeys(REDUCTIONS, scatter),
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
}
"""Primitive to a function (graph, equation, trace, tensors) -> tensor."""
