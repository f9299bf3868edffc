"""Block-sparse attention against a dense float64 form with the same mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import cached_sparse_attention, softmax_attention, sparse_attention
from slm.attention.block_table import block_table
from slm.attention.patterns import causal, chunked, dilated, full, global_tokens, parse, reach, window
from slm.attention.sparse import blocks_computed

B, T, H, G, K, V = 2, 70, 4, 2, 8, 12  # five blocks of 16, of which the last is cut short
BLOCK = 16
jitted = jax.jit(sparse_attention, static_argnames=("pattern", "block"))
jitted_cached = jax.jit(cached_sparse_attention, static_argnames="pattern")

CASES = {
    "causal": {},
    "window(20)": {},
    "causal & (window(20) | global_tokens(4))": {"scale": 0.7},
    "causal & random_blocks(2, 8, 1)": {},
    "dilated(3, 6)": {"segments": True},
    "causal & fixed(12, 3)": {"documents": True},
    "causal & (window(5) | global_tokens(20) | chunked(9))": {"documents": True},
    "window(7) | global_tokens(3)": {"documents": True},
    "causal & ~window(9)": {"segments": True, "softcap": 2.0},
    "an array": {"softcap": 1.5, "scale": 1.0},
}


@functools.cache
def inputs(groups=G):
    """q, k, v and a direction for the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, H, K), (B, T, groups, K), (B, T, groups, V), (B, T, H, V)]
    return [jax.random.normal(key, shape) * (2 if n == 0 else 1) for n, (key, shape) in enumerate(zip(keys, shapes))]


@functools.cache
def packed():
    """(segment_ids, positions) of documents of different lengths, one of them longer than two blocks."""
    rng = np.random.default_rng(0)
    begins = (rng.random((B, T)) < 0.07) & (np.abs(np.arange(T) - 35) > 20)
    begins[:, 0] = True
    starts = np.maximum.accumulate(np.where(begins, np.arange(T), 0), 1)
    return np.cumsum(begins, 1), np.arange(T) - starts


def request(case):
    """(keyword arguments, the mask (B, T, T) that they mean)."""
    options, (ids, positions) = dict(CASES[case]), packed()
    array = np.random.default_rng(1).random((T, T)) < 0.03
    pattern = array if case == "an array" else parse(case)
    at = np.broadcast_to(np.arange(T), (B, T))
    segments, documents = (options.pop(name, False) for name in ("segments", "documents"))
    if documents:
        at = options["positions"] = positions
    mask = np.broadcast_to(array, (B, T, T)) if case == "an array" else pattern(at[:, :, None], at[:, None])
    if segments or documents:
        options["segment_ids"] = ids
        mask = mask & (ids[:, :, None] == ids[:, None])
    return options | {"pattern": pattern}, mask


def dense(q, k, v, d_out, mask, scale=K**-0.5, softcap=None):
    """Output, and what d_out owes to q, k and v, in float64."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    R = q.shape[2] // k.shape[2]
    ks, vs = np.repeat(k, R, 2), np.repeat(v, R, 2)
    logits = scale * np.einsum("BTHK,BSHK->BHTS", q, ks)
    slope = scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
        slope = scale * (1 - (logits / softcap) ** 2)
    weights = np.where(mask[:, None], np.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    weights /= np.where(total > 0, total, 1)
    out = np.einsum("BHTS,BSHV->BTHV", weights, vs)
    d_weights = np.einsum("BTHV,BSHV->BHTS", d_out, vs)
    d_logits = slope * weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    d_k, d_v = np.einsum("BHTS,BTHK->BSHK", d_logits, q), np.einsum("BHTS,BTHV->BSHV", weights, d_out)
    d_k, d_v = (x.reshape(B, T, k.shape[2], R, -1).sum(3) for x in (d_k, d_v))
    return out, (np.einsum("BHTS,BSHK->BTHK", d_logits, ks), d_k, d_v)


def error(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@functools.cache
def results(case):
    *qkv, d_out = inputs()
    options, mask = request(case)

    @jax.jit
    def run(*qkv):
        out, pull = jax.vjp(lambda *x: sparse_attention(*x, block=BLOCK, **options), *qkv)
        return out, pull(d_out)

    return *run(*qkv), mask, options


@pytest.mark.parametrize("case", CASES)
def test_equals_dense_float64_forwards_and_backwards(case):
    out, grads, mask, options = results(case)
    numbers = {name: value for name, value in options.items() if name in ("scale", "softcap")}
    expected, expected_grads = dense(*inputs(), mask, **numbers)
    assert error(out, expected) < 2e-6
    for a, b in zip(grads, expected_grads, strict=True):
        assert error(a, b) < 5e-6
    # The blocks were of use: neither all nor none were computed.
    if case != "causal":
        assert 0.02 < mask.mean() < 0.6


def test_a_query_that_sees_nothing_gives_zeros_and_owes_nothing():
    for case in ("causal & ~window(9)", "an array"):
        out, grads, mask, _ = results(case)
        blind = ~mask.any(-1)
        assert blind.any()
        assert not np.asarray(out)[blind].any()
        assert not np.asarray(grads[0])[blind].any()
    q, k, v, _ = inputs()
    value, grads = jax.jit(jax.value_and_grad(lambda q: sparse_attention(q, k, v, pattern=~full).sum()))(q)
    assert value == 0
    assert not grads.any()


def test_enormous_logits_stay_finite():
    q, k, v, d_out = inputs()

    def loss(q):
        return (
            sparse_attention(1e4 * q, k, v, pattern=causal & (window(5) | global_tokens(2)), block=BLOCK) * d_out
        ).sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(q)).all()


def test_one_block_for_everything_equals_softmax_attention():
    q, k, v, _ = inputs(groups=1)
    pattern = causal & (window(9) | global_tokens(3))
    expected = softmax_attention(q, k, v, window=9, sinks=3, implementation="xla")
    np.testing.assert_allclose(jitted(q, k, v, pattern=pattern, block=128), expected, rtol=2e-5, atol=2e-6)


def products(jaxpr):
    """FLOPs of matrix products, each as often as its scan repeats it."""
    total = 0
    for equation in jaxpr.eqns:
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * np.prod([equation.invars[0].aval.shape[n] for n in contracted])
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            total += repeats * products(inner) if hasattr(inner, "eqns") else 0
    return total


def largest(jaxpr):
    """Elements of the largest array."""
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            sizes += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(sizes, default=0)


def traced(pattern, length, documents=False):
    """Jaxpr of forward and backward pass."""

    def loss(q, k, v, at):
        more = {"segment_ids": at, "positions": at} if documents else {}
        return sparse_attention(q, k, v, pattern=pattern, **more).sum()

    shape = jax.ShapeDtypeStruct((1, length, 2, 32), "float32")
    at = jax.ShapeDtypeStruct((1, length), "int32")
    return jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(shape, shape, shape, at).jaxpr


def test_only_visible_blocks_are_computed():
    pairs = 7 * 2 * 2 * 32 * 64**2  # seven products (forward 2, backward 5) of two heads, for one pair of blocks
    for text in [
        "causal & window(130)",
        "causal & (window(65) | global_tokens(4))",
        "chunked(128)",
        "local_blocks(64, 1)",
    ]:
        kept = block_table(parse(text), 4096, 64).kept
        assert kept == blocks_computed(parse(text), 4096)
        assert kept < 300 < 2048
        assert kept * pairs <= products(traced(parse(text), 4096)) < 1.15 * kept * pairs, text
    # Documents: the same blocks and those of the first tokens.
    pattern = causal & (window(65) | global_tokens(4))
    kept = blocks_computed(pattern, 4096, documents=True)
    assert kept == block_table(causal & window(65), 4096, 64).kept + 2 * 64
    assert kept * pairs <= products(traced(pattern, 4096, documents=True)) < 1.15 * kept * pairs


def test_memory_grows_with_length_not_with_its_square():
    sizes = [largest(traced(causal & (window(65) | global_tokens(4)), length)) for length in (2048, 8192)]
    assert sizes[1] <= 4.2 * sizes[0]


def test_dilated_positions_are_computed_where_they_are_dense():
    """In the order of the text nearly every block of the window has a visible pair."""
    pattern = causal & dilated(64, 8)
    assert blocks_computed(pattern, 4096) == 8 * block_table(causal & window(64), 512, 64).kept
    assert blocks_computed(pattern, 4096) < 0.3 * block_table(pattern, 4096, 64).kept
    assert blocks_computed(dilated(3, 6), T, block=BLOCK) < block_table(dilated(3, 6), T, BLOCK).kept  # a case above
    assert blocks_computed(dilated(3, 50), 100) == block_table(dilated(3, 50), 100, 64).kept  # too short to gain


def test_half_precision_accumulates_in_float32():
    half = [x.astype(jnp.bfloat16) for x in inputs()]
    pattern = causal & window(20)
    out = jitted(*half[:3], pattern=pattern, block=BLOCK)
    assert out.dtype == jnp.bfloat16
    at = np.arange(T)
    mask = np.broadcast_to(pattern(at[:, None], at), (B, T, T))
    expected, _ = dense(*(x.astype(jnp.float32) for x in half), mask)
    assert error(out.astype(jnp.float32), expected) < 0.01


def test_cached_attention_reads_slots_in_any_order():
    q, k, v, _ = inputs()
    order = np.random.default_rng(0).permutation(T)
    at = jnp.broadcast_to(jnp.arange(T), (B, T))
    pad = ((0, 0), (0, 5), (0, 0), (0, 0))
    keys, values = (jnp.pad(x[:, order], pad, constant_values=7.0) for x in (k, v))
    slots = jnp.pad(at[:, order], ((0, 0), (0, 5)), constant_values=-1)
    for text in ("causal & (window(9) | global_tokens(3))", "causal & ~window(9)", "causal & random_blocks(2, 8)"):
        expected = jitted(q, k, v, pattern=parse(text), block=BLOCK)
        out = jitted_cached(q, keys, values, at, slots, pattern=parse(text))
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6, err_msg=text)
    # In pieces of 128, with a query per key and once more as many.
    twice = [jnp.concatenate([x, x], 1) for x in (q, at)]
    out = jitted_cached(twice[0], keys, values, twice[1], slots, pattern=parse(text))
    np.testing.assert_allclose(out, jnp.concatenate([expected, expected], 1), rtol=2e-5, atol=2e-6)


def test_what_reach_drops_is_not_seen():
    q, k, v, _ = inputs()
    pattern = causal & (window(9) | global_tokens(3) | chunked(5))
    n, W = reach(pattern)
    at, now = np.arange(T), T - 1
    kept = (at < n) | (now - at < W)
    assert kept.sum() == n + W < T
    last = q[:, now:], k[:, kept], v[:, kept], jnp.full((B, 1), now), jnp.broadcast_to(at[kept], (B, n + W))
    out = jitted_cached(*last, pattern=pattern)
    expected = jitted(q, k, v, pattern=pattern, block=BLOCK)[:, now:]
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


def test_wrong_requests_are_refused():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="shapes do not agree"):
        sparse_attention(q, k[:, :5], v, pattern=causal)
    with pytest.raises(ValueError, match="segment_ids has shape"):
        sparse_attention(q, k, v, pattern=causal, segment_ids=jnp.zeros((B, 3), int))
    with pytest.raises(ValueError, match="give segment_ids"):
        sparse_attention(q, k, v, pattern=causal, positions=jnp.zeros((B, T), int))
    with pytest.raises(ValueError, match="implementation = 'cudnn'"):
        sparse_attention(q, k, v, pattern=causal, implementation="cudnn")
    with pytest.raises(ValueError, match="block = 0"):
        sparse_attention(q, k, v, pattern=causal, block=0)
    with pytest.raises(ValueError, match="3 x 3 booleans for T = 70"):
        sparse_attention(q, k, v, pattern=np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="mask function"):
        sparse_attention(q, k, v, pattern="causal")
    with pytest.raises(ValueError, match="before tracing"):
        jax.jit(lambda mask: sparse_attention(q, k, v, pattern=mask))(np.ones((T, T), bool))
