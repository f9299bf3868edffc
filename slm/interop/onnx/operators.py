"""Primitives of jaxprs as ONNX operators: one table of functions (graph, equation, tensors) -> tensor or tensors."""

from collections.abc import Callable

import numpy as np

from slm.interop.onnx.graph import Graph, Tensor, constant
from slm.interop.onnx.shapes import SHAPES, output

SAME_NAME = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow", "neg": "Neg",
    "abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
    "sin": "Sin", "cos": "Cos", "tan": "Tan", "tanh": "Tanh", "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh",
    "atan": "Atan", "erf": "Erf", "logistic": "Sigmoid", "eq": "Equal", "lt": "Less", "le": "LessOrEqual",
    "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip
"""Primitives that an operator of ONNX computes elementwise."""
OF_BITS = {"and": ("And", "BitwiseAnd"), "or": ("Or", "BitwiseOr"), "xor": ("Xor", "BitwiseXor"),
           "not": ("Not", "BitwiseNot")}  # fmt: skip
"""Primitive to its operators of booleans and of integers."""
REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
              "reduce_prod": "ReduceProd", "reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}  # fmt: skip
IDENTITIES = ("stop_gradient", "name", "copy", "copy_p", "optimization_barrier", "sharding_constraint")


def elementwise(g: Graph, op: str, inputs: list[Tensor], shape, dtype, **attributes) -> Tensor:
    """A node that broadcasts, of which only what differs is computed."""
    held = np.broadcast_shapes(*(x.held for x in inputs))
    return g.node(op, inputs, shape, dtype, held, **attributes)


def same(op: str) -> Callable:
    def emit(g, e, *inputs):
        shape, dtype = output(e)
        if inputs[0].dtype == np.uint32:  # for which runtimes have few operators
            return _unsigned(g, op, inputs, shape, dtype)
        return elementwise(g, op, list(inputs), shape, dtype)

    return emit


def _unsigned(g: Graph, op: str, inputs, shape, dtype) -> Tensor:
    """Arithmetic modulo 2^32 on int64, whose low bits are right even where it overflows; or comparison."""
    inputs = [g.cast(x, np.int64) for x in inputs]
    if dtype.kind == "b":
        return elementwise(g, op, inputs, shape, dtype)
    wide = elementwise(g, op, inputs, shape, np.int64)
    return g.cast(elementwise(g, "BitwiseAnd", [wide, constant(np.int64(2**32 - 1))], shape, np.int64), dtype)


def bits(pair: tuple[str, str]) -> Callable:
    return lambda g, e, *inputs: elementwise(g, pair[inputs[0].dtype != bool], list(inputs), *output(e))


def not_equal(g, e, *inputs):
    shape, _ = output(e)
    equal = elementwise(g, "Equal", list(inputs), shape, bool)
    return elementwise(g, "Not", [equal], shape, bool)


def ordered(g, e, x, y):
    if np.issubdtype(x.dtype, np.floating):
        raise NotImplementedError("the total order of floats")
    return elementwise(g, {"lt_to": "Less", "le_to": "LessOrEqual"}[e.primitive.name], [x, y], *output(e))


def shift(g, e, x, by):
    direction = "LEFT" if e.primitive.name == "shift_left" else "RIGHT"
    (shape, dtype), kind = output(e), np.dtype(np.uint32)
    shifted = elementwise(g, "BitShift", [g.cast(x, kind), g.cast(by, kind)], shape, kind, direction=direction)
    return g.cast(shifted, dtype)


def remainder(g, e, x, y):
    shape, dtype = output(e)
    kind = np.dtype(np.int64) if dtype == np.uint32 else dtype
    return g.cast(elementwise(g, "Mod", [g.cast(x, kind), g.cast(y, kind)], shape, kind, fmod=1), dtype)


def select(g, e, which, *cases):
    shape, dtype = output(e)
    if which.dtype == bool:
        return elementwise(g, "Where", [which, cases[1], cases[0]], shape, dtype)
    chosen = cases[-1]
    for i in reversed(range(len(cases) - 1)):
        here = elementwise(g, "Equal", [which, constant(np.array(i, which.dtype))], which.shape, bool)
        chosen = elementwise(g, "Where", [here, cases[i], chosen], shape, dtype)
    return chosen


def sort(g, e, *operands):
    if e.params["num_keys"] != 1:
        raise NotImplementedError("several keys")
    key, *others = map(g.full, operands)
    axis, shape, kind = e.params["dimension"], key.shape, key.dtype
    key = g.cast(key, np.int32) if kind.kind == "b" else key
    inputs, outputs = [key, constant(np.array([shape[axis]]))], [(shape, key.dtype), (shape, np.int64)]
    # Of equals, TopK takes the first one first, so it is stable.
    found, at = g.nodes_of("TopK", inputs, outputs, axis=axis, largest=0, sorted=1)
    return [g.cast(found, kind), *(g.node("GatherElements", [x, at], shape, x.dtype, axis=axis) for x in others)]


def reduce(g, e, x):
    shape, dtype = output(e)
    axes = [int(axis) for axis in e.params["axes"]]
    if not axes:
        return x
    kind = np.dtype(np.int32) if x.dtype == bool else x.dtype
    inputs = [g.cast(g.full(x), kind), constant(np.array(axes, np.int64))]
    return g.cast(g.node(REDUCTIONS[e.primitive.name], inputs, shape, kind, keepdims=0), dtype)


def arg(g, e, x):
    (shape, dtype), (axis,) = output(e), e.params["axes"]
    op = "ArgMax" if e.primitive.name == "argmax" else "ArgMin"
    x = g.cast(x, np.int32) if x.dtype == bool else x
    return g.cast(g.node(op, [g.full(x)], shape, np.int64, axis=int(axis), keepdims=0), dtype)


def top_k(g, e, x):
    (values, dtype), (indices, kind) = ((v.aval.shape, v.aval.dtype) for v in e.outvars)
    k, axis = constant(np.array([e.params["k"]], np.int64)), e.params.get("axis", -1)
    found, at = g.nodes_of("TopK", [g.full(x), k], [(values, dtype), (indices, np.int64)], axis=axis)
    return [found, g.cast(at, kind)]


def cumsum(g, e, x):
    axis = constant(np.int64(e.params["axis"]))
    return g.node("CumSum", [g.full(x), axis], *output(e), reverse=int(e.params["reverse"]))


def dot(g, e, x, y):
    """Transposed and reshaped until it is MatMul: (batch, rows, contracted) times (batch, contracted, columns)."""
    (over_x, over_y), (batch_x, batch_y) = e.params["dimension_numbers"]
    rows, columns = (
        [i for i in range(len(t.shape)) if i not in (*over, *batch)]
        for t, over, batch in ((x, over_x, batch_x), (y, over_y, batch_y))
    )
    shape, dtype = output(e)
    x, y = (g.cast(t, dtype) for t in (x, y))

    def size(t, axes):
        return int(np.prod([t.shape[i] for i in axes], dtype=np.int64))

    batch = tuple(x.shape[i] for i in batch_x)
    left = g.transpose(x, [*batch_x, *rows, *over_x])
    left = g.reshape(left, (*batch, size(x, rows), size(x, over_x)))
    right = g.transpose(y, [*batch_y, *over_y, *columns])
    right = g.reshape(right, (*batch, size(y, over_y), size(y, columns)))
    product = g.node("MatMul", [left, right], (*batch, size(x, rows), size(y, columns)), dtype)
    return g.reshape(product, shape)


def round_(g, e, x):
    if int(e.params["rounding_method"]) != 1:
        raise NotImplementedError("halves away from zero")
    return elementwise(g, "Round", [x], *output(e))


OPERATORS: dict[str, Callable] = {
    **{name: same(op) for name, op in SAME_NAME.items()},
    **{name: bits(pair) for name, pair in OF_BITS.items()},
    **SHAPES,
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(IDENTITIES, lambda g, e, *inputs: list(inputs)),
    **dict.fromkeys(("shift_left", "shift_right_logical"), shift),
    **dict.fromkeys(("argmax", "argmin"), arg),
    **dict.fromkeys(("lt_to", "le_to"), ordered),
    "ne": not_equal,
    "rem": remainder,
    "select_n": select,
    "convert_element_type": lambda g, e, x: g.cast(x, output(e)[1]),
    "cumsum": cumsum,
    "top_k": top_k,
    "sort": sort,
    "dot_general": dot,
    "round": round_,
}
