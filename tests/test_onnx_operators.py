"""Every primitive that is converted, alone, against JAX: awkward shapes, indices outside, numbers at the edge."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax

from slm.errors import ConfigError
from slm.interop.onnx.convert import trace
from slm.interop.onnx.graph import IR_VERSION, OPSET, Graph, Tensor

X = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
TINY = np.array([0, 1e-30, 1e-9, -1e-9, 1e-4, -3e-3, 0.4, -0.9, 2, 80, -80], np.float32)
WHOLE = np.array([[7, -7, 3], [-3, 0, 5]], np.int32)
WIDE = np.array([0, 1, 2**31, 2**32 - 1, 123456789], np.uint32)
DROP = lax.GatherScatterMode.FILL_OR_DROP


def run(function, *arrays):
    """The results of a function in ONNX Runtime, its arguments being inputs of the graph."""
    g = Graph()
    inputs = [Tensor(a.shape, a.dtype, a.shape, f"in{i}") for i, a in enumerate(arrays)]
    outputs = [(f"out{i}", x) for i, x in enumerate(trace(g, function, *inputs))]
    proto = onnx.helper.make_model(
        g.proto("graph", inputs, outputs),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {f"in{i}": a for i, a in enumerate(arrays)})


def windowed(x, at):
    """Windows (2, 3) of x (3, 4, 5) at two of its axes, in the order of indices (n, 2), clipped."""
    numbers = lax.GatherDimensionNumbers((1, 2, 3), (), (2, 1))
    return lax.gather(x, at, numbers, (3, 2, 3), mode=lax.GatherScatterMode.CLIP)


def batched(x, at):
    numbers = lax.GatherDimensionNumbers((1,), (1,), (1,), (0,), (0,))
    return lax.gather(x, at, numbers, (1, 1, 5), mode=DROP)


def scattered(x, at, new):
    """Windows (2, 5) into x (3, 4, 5), of which some do not fit."""
    numbers = lax.ScatterDimensionNumbers((1, 2), (0,), (0, 1))
    return lax.scatter(x, at, new, numbers, mode=DROP)


def loop(x):
    def body(carry, row):
        return carry * 0.5 + row.sum(), (carry, row * carry)

    return lax.scan(body, jnp.float32(1), x, reverse=True)


AT = np.array([[0, 0], [2, 1], [9, -4]], np.int32)
PLACES = np.array([[0, 0], [1, 2], [2, 3], [-1, 0], [3, 0]], np.int32)
NEW = np.arange(50, dtype=np.float32).reshape(5, 2, 5)
CASES = {
    "log1p": (jnp.log1p, abs(TINY)),
    "expm1": (jnp.expm1, TINY),
    "erfc": (lax.erfc, TINY),
    "rsqrt, square, powers": (lambda x: lax.rsqrt(jnp.square(x) + 1) + lax.integer_pow(x, 3) + jnp.exp2(x), X),
    "is_finite": (jnp.isfinite, np.array([1, np.inf, -np.inf, np.nan], np.float32)),
    "clamp": (lambda x: lax.clamp(np.float32(-0.5), x, np.float32(0.3)), X),
    "round": (jnp.round, np.array([0.5, 1.5, 2.5, -0.5, -1.2], np.float32)),
    "integer division": (lambda x: (lax.div(x, jnp.int32(2)), lax.rem(x, jnp.int32(4)), x // 4, x % 4), WHOLE),
    "remainder": (lambda x: lax.rem(x, jnp.float32(0.7)), X),
    "select among three": (lambda x: lax.select_n(x % 3, x, 10 * x, -x), abs(WHOLE)),
    "booleans": (lambda x: ((x > 0) ^ (x < 1), ~(x != 3) | (x >= 5), (x > 0).any(0), (x > 0).all(1)), WHOLE),
    "bits": (lambda x: (x & 5, x | 8, x ^ 3, ~x), WHOLE),
    "unsigned": (lambda x: (x * np.uint32(2654435761), x + 7, x - 9, x % 10, x >> 16, x << 5, x ^ 3, x > 5), WIDE),
    "casts": (lambda x: (x.astype(jnp.int32), (x > 0).astype(jnp.float32), x.astype(bool)), 3 * X),
    "sums": (lambda x: (x.sum(1), x.max((0, 2)), x.min(), x.prod(2), jnp.argmin(x, 1), jnp.argmax(x, 2)), X),
    "cumsum": (lambda x: (jnp.cumsum(x, 1), lax.cumsum(x, 2, reverse=True)), X),
    "reverse": (lambda x: jnp.flip(x, (0, 2)), X),
    "slices": (lambda x: (x[:, 1:3], x[::2, :, 1::3], jnp.split(x, [1, 3], 1)), X),
    "pad": (lambda x: (lax.pad(x, np.float32(7), [(1, -1, 0), (-1, 2, 2), (0, 1, 1)])), X),
    "stacks": (lambda x: (jnp.stack([x, 2 * x], 1), jnp.concatenate([x, x[:, :0], x], 1)), X),
    "sort": (lambda x: (jnp.sort(x, 1), jnp.argsort(x % 1 > 0.5, axis=1, stable=True)), X),
    "top_k": (lambda x: lax.top_k(x, 3), np.round(X) + 0),
    "product": (lambda x: jnp.einsum("abc,dbc->da", x, x[:2]) + jnp.einsum("abc,abd->a", x, x)[None], X),
    "batched product": (lambda x: jnp.einsum("abc,bdc->bad", x, x.swapaxes(0, 1)), X),
    "rows": (lambda x, i: x[i], X, np.array([[2, 0], [-1, 1]], np.int32)),
    "columns": (lambda x, i: x[:, i, 2], X, np.array([3, 0, 0], np.int32)),
    "along an axis": (lambda x, i: jnp.take_along_axis(x, i, 1), X, np.array([[[0]], [[3]], [[1]]], np.int32)),
    "rows outside": (lambda x, i: x.at[i].get(mode="fill"), X, np.array([5, 0, -9], np.int32)),
    "integers outside": (lambda x, i: x.at[i].get(mode="fill"), WHOLE, np.array([5, 0], np.int32)),
    "windows": (windowed, X, AT),
    "batching dimensions": (batched, X, np.array([[3], [7], [0]], np.int32)),
    "scatter": (scattered, X, PLACES, NEW),
    "scatter, last row outside": (lambda x, i: x.at[i].set(1, mode="drop"), X, np.array([2, 3], np.int32)),
    "scatter-add": (lambda x, i: x.at[i, 1].add(2.0, mode="drop"), X, np.array([1, 1, 8, 0], np.int32)),
    "dynamic slice": (lambda x, i: lax.dynamic_slice(x, (i[0], i[1], 0), (2, 2, 5)), X, np.array([9, -3], np.int32)),
    "dynamic update": (
        lambda x, i: lax.dynamic_update_slice(x, x[:2, :2] * 0, (i[0], i[1], 0)), X, np.array([9, 1], np.int32)),
    "scan": (loop, X),
    "loop without items": (lambda x: lax.fori_loop(0, 4, lambda i, x: x * 0.5 + i, x), X),
    "transposed, then broadcast": (
        lambda x: jnp.broadcast_to(x[:, :1], X.shape).transpose(1, 0, 2) + x[0, :, None, :1], X),
    "broadcast at last": (lambda x: jnp.broadcast_to(x[:, :1], X.shape).sum(1) + jnp.broadcast_to(1.5, (3, 5)), X),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_primitive_computes_what_jax_does(name):
    function, *arrays = CASES[name]
    want = jax.tree.leaves(jax.jit(function)(*arrays))
    found = run(function, *arrays)
    assert len(found) == len(want)
    for one, other in zip(found, want):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6 if one.ndim else 1e-5)


def test_small_numbers_keep_their_digits():
    (log1p, expm1) = run(lambda x: (jnp.log1p(x), jnp.expm1(x)), TINY[:7])
    np.testing.assert_allclose(log1p, np.log1p(TINY[:7].astype(np.float64)), rtol=3e-7)
    np.testing.assert_allclose(expm1, np.expm1(TINY[:7].astype(np.float64)), rtol=3e-7)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lax.lgamma, "the primitive lgamma is not among"),
        (lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), "the primitive while is not among"),
        (lambda x: lax.sort((x, x), num_keys=2), "sort with several keys"),
        (lambda x: lax.round(x), "round with halves away from zero"),
    ],
)
def test_what_is_not_converted_is_named(function, message):
    with pytest.raises(ConfigError, match=message):
        run(function, X)


def test_what_constants_alone_decide_is_not_in_the_graph():
    g = Graph()
    x = Tensor((4,), np.dtype(np.float32), (4,), "x")
    trace(g, lambda x: x + jnp.cos(jnp.arange(4) * 2.0) * jnp.tri(4).sum(0), x)
    assert [node.op_type for node in g.nodes] == ["Add"]
