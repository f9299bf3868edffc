"""Softmax attention of every implementation against a naive float64 form."""

import contextlib
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import cached_attention, choose_implementation, softmax_attention, spans
from slm.attention.forget import cumulative_forget
from slm.models.counts import product_flops

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


# Cases for blocks that run in loops, as those of long sequences do.
LOOPED = (
    "grouped", "bidirectional", "window, bidirectional", "window and sinks", "more sinks than window",
    "window, sinks and segments, bidirectional", "hard forget and segments", "everything",
)  # fmt: skip
KINDS = [(case, kind) for case in CASES for kind in ("xla", "blocked", "looped")[: 3 if case in LOOPED else 2]]


@contextlib.contextmanager
def short_loops():
    """At T = 150: nine blocks and the rest of one, in loops for at most two lengths of spans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "BLOCK", 16)
        patch.setattr(spans, "LOOPS", 2)
        yield


DIRECTION = np.asarray(jax.random.normal(jax.random.key(9), (B, T, H, V)))
FLOATS = ("q", "k", "v", "sink_logits", "log_forget")


def arguments(case):
    """(float inputs by name, the others by name)."""
    q, k, v, options = inputs(**CASES[case])
    options |= {"q": q, "k": k, "v": v}
    return {name: options.pop(name) for name in FLOATS if name in options}, options


@functools.cache
def evaluate(case, kind):
    """Output, and gradients of its product with DIRECTION by name."""
    floats, options = arguments(case)
    options["implementation"] = "blocked" if kind == "looped" else kind

    def both(floats):
        out, pullback = jax.vjp(lambda floats: softmax_attention(**floats, **options), floats)
        return out, pullback(DIRECTION)[0]

    with short_loops() if kind == "looped" else contextlib.nullcontext():
        traced = jax.jit(both).trace(floats)
    assert (" scan[" in str(traced.jaxpr)) == (kind == "looped")
    return traced.lower().compile()(floats)


@pytest.mark.parametrize(("case", "kind"), KINDS)
def test_equals_naive_float64(case, kind):
    floats, options = arguments(case)
    expected = naive(**floats, **options)
    np.testing.assert_allclose(evaluate(case, kind)[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case, kind in KINDS if kind != "xla"])
def test_blocked_gradients_equal_autodiff_of_the_dense_form(case, kind):
    dense, blocked = evaluate(case, "xla")[1], evaluate(case, kind)[1]
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


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"window": 20, "sinks": 3}])
def test_loops_are_causal_to_the_bit(options):
    """Also across documents; forwards and backwards."""
    q, k, v, _ = inputs()
    ids = jnp.broadcast_to(jnp.arange(T) // 83, (B, T))
    f = lambda *x: softmax_attention(*x, segment_ids=ids, implementation="blocked", **options)  # noqa: E731
    pull = lambda weights, *x: jax.vjp(f, *x)[1](weights)  # noqa: E731
    with short_loops():
        forward, backward = jax.jit(f).lower(q, k, v).compile(), jax.jit(pull).lower(DIRECTION, q, k, v).compile()
    at = np.arange(T)
    for t in [0, 15, 16, 70, 82, 83, 144, T - 1]:
        sees = (at >= t) & (at // 83 == t // 83)
        if options:
            sees &= (at - t < options["window"]) | (t % 83 < options.get("sinks", 0))
        others = (x.at[:, t].add(1.0) for x in (q, k, v))
        changed = (np.asarray(forward(*others)) != np.asarray(forward(q, k, v))).any((0, 2, 3))
        np.testing.assert_array_equal(changed, sees)
        # What the output at t owes to keys and values: the same relation, the other way round.
        d_q, d_k, d_v = backward(jnp.where((at == t)[:, None, None], DIRECTION, 0), q, k, v)
        seen = (at <= t) & (at // 83 == t // 83)
        if options:
            seen &= (t - at < options["window"]) | (at % 83 < options.get("sinks", 0))
        np.testing.assert_array_equal((np.asarray(d_v) != 0).any((0, 2, 3)), seen)
        assert not np.asarray(d_k)[:, ~seen].any()
        assert not np.asarray(d_q)[:, at != t].any()


SHAPES = [
    spans.Shape(causal, window, sinks, None, 1.0)
    for causal in (True, False)
    for window, sinks in [(None, 0), (1, 0), (100, 0), (100, 4), (4, 300), (3000, 0)]
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 128, 512, 1024, 1500, 4096])
def test_spans_hold_all_that_is_visible_and_little_else(shape, length):
    i, j = np.arange(length)[:, None], np.arange(length)
    visible = np.asarray(spans.visible(i, j, shape.causal, shape.window)) | np.zeros((length, length), bool)
    first, last = np.argmax(visible, 1), length - 1 - np.argmax(visible[:, ::-1], 1)
    if not shape.causal:  # a document may begin at any query
        last = np.maximum(last, np.minimum(np.arange(length) + shape.sinks, length) - 1)
    taken, queries = 0, []
    for loop in spans.loops(length, shape):
        for start, key in zip(loop.starts, loop.firsts, strict=True):
            rows = slice(start, start + loop.size)
            queries += range(length)[rows]
            assert 0 <= key <= first[rows].min()
            assert last[rows].max() < key + loop.length <= length
            taken += loop.size * loop.length
    assert queries == list(range(length))
    exact = (last - first + 1).sum()
    # Half a block too much at either end of a span, and what `LOOPS` says of those that are not as long as a window.
    rounded = length * min(length, max(shape.window or length, shape.sinks)) / 16 if length > 1024 else 0
    assert taken <= exact + length * spans.BLOCK * (1 if shape.causal else 2) + rounded


def test_programs_of_long_sequences_stay_small():
    def program(length, **options):
        x = jax.ShapeDtypeStruct((1, length, 1, K), "float32")
        f = lambda q, k, v: softmax_attention(q, k, v, implementation="blocked", **options).sum()  # noqa: E731
        return jax.jit(jax.grad(f, (0, 1, 2))).trace(x, x, x)

    for options in ({}, {"window": 300}, {"window": 5000, "sinks": 4}, {"window": 300, "causal": False}):
        sizes = [str(program(length, **options).jaxpr).count("dot_general") for length in (4096, 32768)]
        assert sizes[1] <= max(sizes[0], 7 * spans.LOOPS)
    for options in ({"causal": False}, {"window": 300}):  # the quickest to compile
        memory = program(8192, **options).lower().compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.1 * 4 * 8192**2


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


@pytest.mark.parametrize(("window", "sinks"), [(30, 0), (30, 4), (200, 3), (1, 0)])
def test_long_prefills_with_a_window_read_no_more_than_it(window, sinks):
    """Part of the text is in a cache already, in slots of any order; the rest comes in one call, padded at its end."""
    keys = jax.random.split(jax.random.key(0), 3)
    end, before = 700, 210
    q, k, v = (jax.random.normal(key, (1, end, H, K)) for key in keys)
    expected = jax.jit(functools.partial(softmax_attention, window=window, sinks=sinks))(q, k, v)
    for start in (0, before):
        order = np.random.default_rng(0).permutation(before)
        kept = [jnp.pad(x[:, order], ((0, 0), (0, 0), (0, 0), (0, 0))) for x in (k, v)]
        old = jnp.asarray(np.where(order < start, order, -1))[None]
        pad = ((0, 0), (0, 20), (0, 0), (0, 0))
        new = [jnp.pad(x[:, start:], pad) for x in (q, k, v)]
        at = jnp.pad(jnp.arange(start, end)[None], ((0, 0), (0, 20)), constant_values=-1)
        seen = [jnp.concatenate([x, y], 1) for x, y in zip(kept, new[1:], strict=True)]
        cached = jax.jit(functools.partial(cached_attention, window=window, sinks=sinks, old=before))
        arrays = new[0], *seen, at, jnp.concatenate([old, at], 1)
        np.testing.assert_allclose(cached(*arrays)[:, : end - start], expected[:, start:], rtol=2e-5, atol=2e-6)
    every = jax.jit(functools.partial(cached_attention, window=window, sinks=sinks))
    flops, all_of_it = (product_flops(f, *arrays) for f in (cached, every))
    # Of the 700 + 210 keys a block of 128 queries meets the 210 old ones, the sinks, and 128 + window - 1.
    assert flops == pytest.approx(all_of_it * (210 + sinks + 127 + window) / seen[0].shape[1])


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


def test_tokamax_is_asked_for_the_same_attention(monkeypatch):
    """Its function is jax.nn's with a soft cap, which this stand-in leaves out: the package itself is optional."""

    def stand_in(q, k, v, *, logits_soft_cap, **options):
        assert logits_soft_cap is None
        return jax.nn.dot_product_attention(q, k, v, implementation="xla", **options)

    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(dot_product_attention=stand_in))
    q, k, v, options = inputs(segments=True)
    v = v[..., :K]
    for wanted in (
        {},
        {"window": 3},
        {"window": 3, "causal": False},
        {"scale": 0.7},
        {"segment_ids": options["segment_ids"]},
    ):
        ours = softmax_attention(q, k, v, implementation="tokamax", **wanted)
        np.testing.assert_allclose(
            ours, softmax_attention(q, k, v, implementation="xla", **wanted), rtol=2e-5, atol=2e-6
        )
    with pytest.raises(ValueError, match="cannot serve sinks"):
        softmax_attention(q, k, v, implementation="tokamax", sinks=2)
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ValueError, match="pip install tokamax"):
        softmax_attention(q, k, v, implementation="tokamax")
