"""Softmax attention of every implementation against a naive float64 form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import cached_attention, choose_implementation, softmax_attention
from slm.attention.forget import cumulative_forget

B, T, H, K, V = 2, 150, 4, 8, 12  # T spans two blocks and fills neither

CASES = {
    "causal": {},
    "bidirectional": {"causal": False},
    "grouped": {"groups": 2},
    "multi-query": {"groups": 1},
    "window": {"window": 20},
    "window of one": {"window": 1},
    "window, bidirectional": {"window": 20, "causal": False},
    "window and sinks": {"window": 20, "sinks": 3},
    "sink logits": {"sink_logits": True, "groups": 2},
    "softcap": {"softcap": 2.0},
    "segments": {"segments": True},
    "scale": {"scale": 0.7},
    "window, sinks and segments": {"window": 20, "sinks": 3, "segments": True},
    "more sinks than window": {"window": 4, "sinks": 25, "segments": True},
    "more sinks than block, bidirectional": {"window": 4, "sinks": 140, "causal": False},
    "window, sinks and segments, bidirectional": {"window": 4, "sinks": 25, "segments": True, "causal": False},
    "forget": {"log_forget": 0.3, "groups": 2},
    "hard forget and segments": {"log_forget": 15.0, "segments": True},
    "sums of gates near -30000": {"log_forget": 400.0, "groups": 1},
    "everything": {
        "window": 30, "sinks": 2, "softcap": 3.0, "segments": True, "sink_logits": True, "groups": 2, "log_forget": 0.3,
    },
}  # fmt: skip


def inputs(groups=H, segments=False, sink_logits=False, log_forget=None, seed=0, **options):
    """Half of the gates are -`log_forget` on average, the others near 0."""
    keys = jax.random.split(jax.random.key(seed), 6)
    q = jax.random.normal(keys[0], (B, T, H, K)) * 2
    k = jax.random.normal(keys[1], (B, T, groups, K))
    v = jax.random.normal(keys[2], (B, T, groups, V))
    if segments:
        options["segment_ids"] = jnp.cumsum(jax.random.bernoulli(keys[3], 0.05, (B, T)), 1)
    if sink_logits:
        options["sink_logits"] = jax.random.normal(keys[4], (H,))
    if log_forget:
        hard = jax.random.bernoulli(keys[5], 0.5, (B, T, H))
        options["log_forget"] = -jax.random.uniform(keys[3], (B, T, H)) * jnp.where(hard, 2 * log_forget, 0.1)
    return q, k, v, options


def naive(
    q, k, v, *, causal=True, window=None, sinks=0, sink_logits=None, softcap=None, scale=None, segment_ids=None,
    log_forget=None,
):  # fmt: skip
    """One head of one row at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    i, j = np.indices((q.shape[1], q.shape[1]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        ids = np.zeros(q.shape[1]) if segment_ids is None else np.asarray(segment_ids)[b]
        first = np.array([np.flatnonzero(ids == one)[0] for one in ids])
        seen = (ids[:, None] == ids) & ((j <= i) | (not causal))
        if window is not None:
            seen &= (abs(i - j) < window) | (j - first < sinks)
        g = h * k.shape[2] // q.shape[2]
        logits = scale * q[b, :, h] @ k[b, :, g].T
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if log_forget is not None:
            sums = np.cumsum(np.asarray(log_forget, np.float64)[b, :, h])
            logits = logits + sums[:, None] - sums
        logits = np.where(seen, logits, -np.inf)
        top = logits.max(1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(1, keepdims=True)
        if sink_logits is not None:
            total = total + np.exp(np.float64(sink_logits[h]) - top)
        out[b, :, h] = weights / total @ v[b, :, g]
    return out


DIRECTION = np.asarray(jax.random.normal(jax.random.key(9), (B, T, H, V)))
FLOATS = ("q", "k", "v", "sink_logits", "log_forget")


def arguments(case):
    """(float inputs by name, the others by name)."""
    q, k, v, options = inputs(**CASES[case])
    options |= {"q": q, "k": k, "v": v}
    return {name: options.pop(name) for name in FLOATS if name in options}, options


@functools.cache
def evaluate(case, implementation):
    """Output, and gradients of its product with DIRECTION by name."""
    floats, options = arguments(case)

    @jax.jit
    def both(floats):
        f = lambda floats: softmax_attention(**floats, implementation=implementation, **options)  # noqa: E731
        out, pullback = jax.vjp(f, floats)
        return out, pullback(DIRECTION)[0]

    return both(floats)


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
@pytest.mark.parametrize("case", CASES)
def test_equals_naive_float64(case, implementation):
    floats, options = arguments(case)
    expected = naive(**floats, **options)
    np.testing.assert_allclose(evaluate(case, implementation)[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_blocked_gradients_equal_autodiff_of_the_dense_form(case):
    dense, blocked = evaluate(case, "xla")[1], evaluate(case, "blocked")[1]
    assert set(dense) == set(arguments(case)[0])
    for name, a in dense.items():
        largest = float(jnp.abs(a).max())
        assert (largest > 1e-2) == (case != "window of one" or name == "v")
        np.testing.assert_allclose(blocked[name], a, rtol=0, atol=5e-5 * max(largest, 0.1), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_finite_differences_in_float64(case):
    floats, options = arguments(case)
    floats = {name: np.asarray(x, np.float64) for name, x in floats.items()}
    rng = np.random.default_rng(0)
    for name, x in floats.items():
        towards = rng.normal(size=x.shape)

        def loss(step, name=name, x=x, towards=towards):
            return (naive(**floats | {name: x + step * towards}, **options) * DIRECTION).sum()

        expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
        for implementation in ("xla", "blocked"):
            grad = np.asarray(evaluate(case, implementation)[1][name], np.float64)
            # A sum of random signs is about as large as the norm.
            atol = 5e-5 * max(np.linalg.norm(grad), 1)
            np.testing.assert_allclose((grad * towards).sum(), expected, rtol=0, atol=atol, err_msg=name)


def test_forget_gates_may_be_hard_everywhere():
    """With every gate at -15 the gates' gradients are what rounding of the largest weights would drown."""
    q, k, v, _ = inputs()
    f = lambda g, name: (softmax_attention(q, k, v, log_forget=g, implementation=name) * DIRECTION).sum()  # noqa: E731
    gates = np.full((B, T, H), -15.0)
    towards = np.random.default_rng(0).normal(size=gates.shape)
    loss = lambda step: (naive(q, k, v, log_forget=gates + step * towards) * DIRECTION).sum()  # noqa: E731
    expected = (loss(1e-4) - loss(-1e-4)) / 2e-4
    for name in ("xla", "blocked"):
        grad = jax.jit(jax.grad(f), static_argnums=1)(gates, name)
        assert (grad[:, 0] == 0).all()
        np.testing.assert_allclose((grad * towards).sum(), expected, rtol=0, atol=2e-4 * np.linalg.norm(grad))


def test_running_sums_of_gates_keep_small_differences_of_large_sums():
    rng = np.random.default_rng(0)
    gates = np.where(rng.random((1, 4096, 2)) < 0.9, -15.0, -1e-3 * rng.random((1, 4096, 2))).astype(np.float32)
    begins = np.zeros((1, 4096), bool)
    begins[0, [0, 3000]] = True
    # In one go, and continued after 1000 tokens.
    sums = jax.jit(cumulative_forget)
    whole = sums(gates, begins)
    head = sums(gates[:, :1000], begins[:, :1000])
    tail = sums(gates[:, 1000:], begins[:, 1000:], start=head[:, -1])
    expected = np.cumsum(gates.astype(np.float64), 1)
    for got in (whole[:, :3000], jnp.concatenate([head, tail], 1)[:, :3000]):
        steps = (got[:, 9:, :, 0] - got[:, :-9, :, 0]) + (got[:, 9:, :, 1] - got[:, :-9, :, 1])
        np.testing.assert_allclose(steps, expected[:, 9:3000] - expected[:, :2991], rtol=2e-7)
    assert (whole[:, 3000] == 0).all()
    np.testing.assert_allclose(whole[:, 3001:, :, 0], np.cumsum(gates[:, 3001:].astype(np.float64), 1), rtol=2e-7)


def test_blocked_skips_what_no_query_sees():
    shapes = [jax.ShapeDtypeStruct((1, 512, 1, n), "float32") for n in (K, K, V)]

    def flops(**options):
        compiled = jax.jit(lambda q, k, v: softmax_attention(q, k, v, **options)).lower(*shapes).compile()
        return compiled.cost_analysis()["flops"]

    # 128 + 15 of 512 keys for a window of 16, (128 + 256 + 384 + 512) / 4 of 512 when merely causal
    assert flops(implementation="blocked", window=16) < 0.35 * flops(implementation="xla", window=16)
    assert flops(implementation="blocked") < 0.7 * flops(implementation="xla")
    ids = jnp.arange(512)[None] // 200
    sinks = {"window": 16, "sinks": 4, "segment_ids": ids}
    assert flops(implementation="blocked", **sinks) < 0.35 * flops(implementation="xla", **sinks)


def test_half_precision_accumulates_in_float32():
    q, k, v, _ = inputs()
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    for implementation in ("xla", "blocked"):
        out = softmax_attention(*half, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        exact = naive(*[np.asarray(x, np.float32) for x in half])
        np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=0.02, atol=0.02)


def test_cached_attention_reads_slots_in_any_order():
    q, k, v, _ = inputs(groups=2)
    order = jax.random.permutation(jax.random.key(3), T)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    pad = ((0, 0), (0, 5), (0, 0), (0, 0))
    keys, values = (jnp.pad(x[:, order], pad, constant_values=7.0) for x in (k, v))
    slots = jnp.pad(positions[:, order], ((0, 0), (0, 5)), constant_values=-1)
    gates = -jax.random.uniform(jax.random.key(4), (B, T, H))
    forget = jax.jit(cumulative_forget)(gates, positions == 0)
    forgets = {"query_forget": forget, "key_forget": jnp.pad(forget[:, order], pad, constant_values=7.0)}
    cached = jax.jit(cached_attention, static_argnames="window")
    for options, same in [
        ({"window": 10}, {"window": 10}),
        (forgets, {"log_forget": gates}),
    ]:
        expected = jax.jit(lambda q, same=same: softmax_attention(q, k, v, **same))(q)
        for start in (0, T - 1):  # by blocks of queries, and one alone
            new = {"query_forget": options["query_forget"][:, start:]} if "query_forget" in options else {}
            out = cached(q[:, start:], keys, values, positions[:, start:], slots, **options | new)
            np.testing.assert_allclose(out, expected[:, start:], rtol=2e-5, atol=2e-6)


def test_long_prefills_take_queries_by_blocks():
    S = 1024
    arrays = [jax.ShapeDtypeStruct((1, S, H, K), "float32")] * 3 + [jax.ShapeDtypeStruct((1, S), "int32")] * 2
    memory = jax.jit(cached_attention).lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.6 * 4 * H * S * S  # one matrix of logits


def test_auto_chooses_by_platform_and_request():
    half = (1, 512, 4, 64), jnp.bfloat16
    assert choose_implementation(*half, platform="gpu") == "cudnn"
    assert choose_implementation(*half, extras=True, platform="gpu") == "blocked"
    assert choose_implementation((1, 512, 4, 64), jnp.float32, platform="gpu") == "blocked"
    assert choose_implementation(*half, platform="cpu") == "blocked"
    assert choose_implementation((1, 64, 4, 64), jnp.float32, platform="cpu") == "xla"


def test_a_backend_that_cannot_serve_refuses():
    q, k, v, options = inputs(segments=True)
    with pytest.raises(ValueError, match="cannot serve"):
        softmax_attention(q, k, v, implementation="cudnn", **options)
    with pytest.raises(ValueError, match="cannot serve"):
        softmax_attention(q, k, v, implementation="cudnn")  # V != K
    with pytest.raises(ValueError, match="cannot serve"):
        softmax_attention(q, k, k, implementation="cudnn", log_forget=jnp.zeros((B, T, H)))
    with pytest.raises(ValueError, match="causal"):
        softmax_attention(q, k, v, causal=False, log_forget=jnp.zeros((B, T, H)))
    with pytest.raises(ValueError, match="log_forget has shape"):
        softmax_attention(q, k, v, log_forget=jnp.zeros((B, T, 1)))
    with pytest.raises(ValueError, match="implementation"):
        softmax_attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="shapes do not agree"):
        softmax_attention(q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(ValueError, match="window"):
        softmax_attention(q, k, v, window=0)
