"""Primitives that only move elements: broadcasts, slices, concatenations, padding. Views of parameters cost no node."""

from collections.abc import Callable

import numpy as np

from slm.interop.onnx.graph import Tensor, constant


def output(equation):
    """(shape, dtype) of an equation's first output."""
    aval = equation.outvars[0].aval
    return tuple(aval.shape), np.dtype(aval.dtype)


def broadcast(g, e, x):
    (shape, _), at = output(e), e.params["broadcast_dimensions"]
    held = [1] * len(shape)
    for size, axis in zip(x.held or (1,) * len(x.shape), at):
        held[axis] = size
    if x.array is not None:
        return constant(x.array.reshape(held), shape, x.parameter)
    if tuple(held) != x.held:
        x = g.reshape(Tensor(x.held, x.dtype, x.held, x.name), held)
    return Tensor(shape, x.dtype, tuple(held), x.name)


def squeeze(g, e, x):
    gone = {axis % len(x.shape) for axis in e.params["dimensions"]}
    held = tuple(size for axis, size in enumerate(x.held) if axis not in gone)
    if x.array is not None:
        return constant(x.array.reshape(held), output(e)[0], x.parameter)
    small = g.reshape(Tensor(x.held, x.dtype, x.held, x.name), held)
    return Tensor(output(e)[0], x.dtype, held, small.name)


def iota(g, e):
    (shape, dtype), axis = output(e), e.params["dimension"]
    held = [1] * len(shape)
    held[axis] = shape[axis]
    return constant(np.arange(shape[axis]).astype(dtype).reshape(held), shape)


def split(g, e, x):
    axis, sizes = e.params["axis"], e.params["sizes"]
    if x.array is not None and x.held == x.shape:
        return [constant(p, parameter=x.parameter) for p in np.split(x.array, np.cumsum(sizes)[:-1], axis)]
    outputs = [(v.aval.shape, x.dtype) for v in e.outvars]
    return g.nodes_of("Split", [g.full(x), constant(np.array(sizes, np.int64))], outputs, axis=axis)


def slice_(g, e, x):
    starts, limits, strides = (e.params[name] for name in ("start_indices", "limit_indices", "strides"))
    if x.array is not None and x.held == x.shape:
        cut = tuple(map(slice, starts, limits, strides or [1] * len(starts)))
        return constant(x.array[cut], parameter=x.parameter)
    axes = [i for i, n in enumerate(x.shape) if (starts[i], limits[i]) != (0, n) or (strides and strides[i] != 1)]
    if not axes:
        return x
    where = ([values[i] for i in axes] for values in (starts, limits, range(len(starts)), strides or [1] * len(starts)))
    return g.node("Slice", [g.full(x), *(constant(np.array(w, np.int64)) for w in where)], *output(e))


def pad(g, e, x, value):
    config = np.array(e.params["padding_config"], np.int64).reshape(-1, 3)
    x, shape = g.full(x), list(x.shape)
    for axis in np.flatnonzero(config[:, 2]):  # between elements: after each of them, less the last
        n, gap = shape[axis], int(config[axis, 2])
        low, high = [0] * (len(shape) + 1), [0] * (len(shape) + 1)
        high[axis + 1] = gap
        x = g.reshape(x, [*shape[: axis + 1], 1, *shape[axis + 1 :]])
        wide = [*shape[: axis + 1], gap + 1, *shape[axis + 1 :]]
        x = g.node("Pad", [x, constant(np.array(low + high)), value], wide, x.dtype)
        shape[axis] = n * (gap + 1)
        x = g.reshape(x, shape)
        config[axis, 1] -= gap
    amounts = constant(np.concatenate([config[:, 0], config[:, 1]]))
    return g.node("Pad", [x, amounts, value], *output(e))


def concatenate(g, e, *parts):
    parts = [g.full(x) for x in parts if np.prod(x.shape)]
    return parts[0] if len(parts) == 1 else g.node("Concat", parts, *output(e), axis=e.params["dimension"])


def stack(g, e, *parts):
    shape, _ = output(e)
    axis = e.params["axis"]
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    return g.node("Concat", [g.reshape(x, one) for x in parts], *output(e), axis=axis)


def reverse(g, e, x):
    axes = [int(axis) for axis in e.params["dimensions"]]
    where = ([-1] * len(axes), [np.iinfo(np.int64).min] * len(axes), axes, [-1] * len(axes))
    return g.node("Slice", [g.full(x), *(constant(np.array(w, np.int64)) for w in where)], *output(e))


SHAPES: dict[str, Callable] = {
    "broadcast_in_dim": broadcast,
    "squeeze": squeeze,
    "reshape": lambda g, e, x: g.reshape(x, output(e)[0]),
    "transpose": lambda g, e, x: g.transpose(x, e.params["permutation"]),
    "iota": iota,
    "split": split,
    "slice": slice_,
    "pad": pad,
    "concatenate": concatenate,
    "stack": stack,
    "rev": reverse,
}
"""Primitive to a function (graph, equation, tensors) -> tensor or tensors."""
