"""A function as an ONNX graph: its jaxpr, equation by equation.

What depends on constants alone is computed here by JAX itself, except from parameters, which stay in their file.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.extend import core

from slm.errors import ConfigError
from slm.interop.onnx.graph import Graph, Tensor, constant
from slm.interop.onnx.indexing import INDEXING
from slm.interop.onnx.operators import OPERATORS
from slm.interop.onnx.rewritten import REWRITTEN

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
"""Primitives that only call a jaxpr."""
FOLDED = 2**16
"""Most elements of a result that is computed here."""


def trace(g: Graph, function: Callable, *inputs: Tensor) -> list[Tensor]:
    """The results of a function of arrays, on tensors of the graph."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    closed = jax.make_jaxpr(function)(*shapes)
    return convert(g, closed.jaxpr, [constant(c) for c in closed.consts], inputs)


def convert(g: Graph, jaxpr, consts, inputs) -> list[Tensor]:
    """The outputs of a jaxpr. Raises ConfigError for a primitive that is not in the tables."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs)))

    def read(x):
        return constant(np.asarray(x.val, x.aval.dtype)) if isinstance(x, core.Literal) else values[x]

    for e in jaxpr.eqns:
        found = _equation(g, e, [read(x) for x in e.invars])
        for variable, value in zip(e.outvars, found if isinstance(found, list) else [found]):
            values[variable] = value
    return [read(x) for x in jaxpr.outvars]


def _equation(g: Graph, e, inputs):
    name = e.primitive.name
    if name in CALLS:
        inner = e.params["jaxpr"] if "jaxpr" in e.params else e.params["call_jaxpr"]
        jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())
        return convert(g, jaxpr, [constant(c) for c in consts], inputs)
    sizes = [int(np.prod(v.aval.shape, dtype=np.int64)) for v in e.outvars]
    if not any(sizes):
        return [constant(np.zeros(v.aval.shape, v.aval.dtype)) for v in e.outvars]
    constants = all(x.array is not None and not x.parameter for x in inputs)
    if constants and name != "iota" and max(sizes) <= FOLDED and name != "broadcast_in_dim":
        found = e.primitive.bind(*(x.whole for x in inputs), **e.params)
        return [constant(np.asarray(x)) for x in (found if e.primitive.multiple_results else [found])]
    try:
        if name == "scan":
            return _scan(g, e, inputs)
        if name in INDEXING:
            return INDEXING[name](g, e, lambda f, *xs: trace(g, f, *xs), *inputs)
        if name in REWRITTEN:
            known = {key: e.params[key] for key in ("y",) if key in e.params}
            (out,) = trace(g, lambda *xs: (REWRITTEN[name](*xs, **known),), *inputs)
            return out
        if name in OPERATORS:
            return OPERATORS[name](g, e, *inputs)
    except NotImplementedError as error:
        raise ConfigError(
            f"ONNX has no operator for the primitive {name} with {error}: use slm.save_stablehlo"
        ) from None
    raise ConfigError(f"ONNX: the primitive {name} is not among those that are converted: use slm.save_stablehlo")


def _scan(g: Graph, e, inputs) -> list[Tensor]:
    """lax.scan as ONNX's Scan, whose body sees the constants from outside; of length 1, its body."""
    p = e.params
    jaxpr, length, split = p["jaxpr"], p["length"], p["num_consts"] + p["num_carry"]
    consts, carry, xs = inputs[: p["num_consts"]], inputs[p["num_consts"] : split], inputs[split:]
    outer = [constant(c) for c in jaxpr.consts]
    if length == 1:
        found = convert(g, jaxpr.jaxpr, outer, [*consts, *carry, *(g.reshape(x, x.shape[1:]) for x in xs)])
        news, ys = found[: p["num_carry"]], found[p["num_carry"] :]
        return [*news, *(g.reshape(y, (1, *y.shape)) for y in ys)]
    body = g.body()
    states = [Tensor(x.shape, x.dtype, x.shape, g.fresh()) for x in carry]
    items = [Tensor(x.shape[1:], x.dtype, x.shape[1:], g.fresh()) for x in xs]
    found = convert(body, jaxpr.jaxpr, outer, [*consts, *states, *items])
    if not xs:  # ONNX counts its steps by what it scans
        xs = [constant(np.arange(length, dtype=np.int32))]
        items = [Tensor((), np.dtype(np.int32), (), g.fresh())]
    outputs = [(g.fresh(), x) for x in found]
    graph = body.proto(g.fresh(), [*states, *items], outputs)
    way, results = int(p["reverse"]), len(found) - len(carry)
    directions = {"scan_input_directions": [way] * len(xs)}
    if results:
        directions["scan_output_directions"] = [way] * results
    whole = [g.full(x) for x in (*carry, *xs)]
    outputs = [(v.aval.shape, v.aval.dtype) for v in e.outvars]
    return g.nodes_of("Scan", whole, outputs, body=graph, num_scan_inputs=len(xs), **directions)
