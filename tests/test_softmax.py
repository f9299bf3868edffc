"""Softmax attention of every implementation against a naive float64 form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import cached_attention, choose_implementation, softmax_attention

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
    "everything": {"window": 30, "sinks": 2, "softcap": 3.0, "segments": True, "sink_logits": True, "groups": 2},
}


def inputs(groups=H, segments=False, sink_logits=False, seed=0, **options):
    keys = jax.random.split(jax.random.key(seed), 6)
    q = jax.random.normal(keys[0], (B, T, H, K)) * 2
    k = jax.random.normal(keys[1], (B, T, groups, K))
    v = jax.random.normal(keys[2], (B, T, groups, V))
    if segments:
        options["segment_ids"] = jnp.cumsum(jax.random.bernoulli(keys[3], 0.05, (B, T)), 1)
    if sink_logits:
        options["sink_logits"] = jax.random.normal(keys[4], (H,))
    return q, k, v, options


def naive(q, k, v, *, causal=True, window=None, sinks=0, sink_logits=None, softcap=None, scale=None, segment_ids=None):
    """One (batch, head, query) at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    segment_ids = None if segment_ids is None else np.asarray(segment_ids)
    for b, i, h in np.ndindex(*q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        seen = [
            j
            for j in range(k.shape[1])
            if (j <= i or not causal)
            and (window is None or abs(i - j) < window or j < sinks)
            and (segment_ids is None or segment_ids[b, i] == segment_ids[b, j])
        ]
        logits = scale * k[b, seen, g] @ q[b, i, h]
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        total = np.exp(logits).sum() + (0 if sink_logits is None else np.exp(np.float64(sink_logits[h])))
        out[b, i, h] = np.exp(logits) / total @ v[b, seen, g]
    return out


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
@pytest.mark.parametrize("case", CASES)
def test_equals_naive_float64(case, implementation):
    q, k, v, options = inputs(**CASES[case])
    out = softmax_attention(q, k, v, implementation=implementation, **options)
    np.testing.assert_allclose(out, naive(q, k, v, **options), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_blocked_gradients_equal_autodiff_of_the_dense_form(case):
    q, k, v, options = inputs(**CASES[case])
    sink = options.pop("sink_logits", jnp.zeros(H))
    uses_sink = "sink_logits" in CASES[case]
    direction = jax.random.normal(jax.random.key(9), (B, T, H, V))

    def loss(q, k, v, sink, implementation):
        extra = {"sink_logits": sink} if uses_sink else {}
        return (softmax_attention(q, k, v, implementation=implementation, **extra, **options) * direction).sum()

    dense, blocked = (jax.grad(loss, (0, 1, 2, 3))(q, k, v, sink, name) for name in ("xla", "blocked"))
    largest = max(float(jnp.abs(a).max()) for a in dense)
    for a, b in zip(dense, blocked):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest)
    assert uses_sink == bool(jnp.abs(dense[3]).max() > 0)


def test_blocked_skips_what_no_query_sees():
    shapes = [jax.ShapeDtypeStruct((1, 512, 1, n), "float32") for n in (K, K, V)]

    def flops(**options):
        compiled = jax.jit(lambda q, k, v: softmax_attention(q, k, v, **options)).lower(*shapes).compile()
        return compiled.cost_analysis()["flops"]

    # 128 + 15 of 512 keys for a window of 16, (128 + 256 + 384 + 512) / 4 of 512 when merely causal
    assert flops(implementation="blocked", window=16) < 0.35 * flops(implementation="xla", window=16)
    assert flops(implementation="blocked") < 0.7 * flops(implementation="xla")


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
    for window in (None, 10):
        out = cached_attention(q, keys, values, positions, slots, window=window)
        np.testing.assert_allclose(out, softmax_attention(q, k, v, window=window), rtol=2e-5, atol=2e-6)


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
    with pytest.raises(ValueError, match="implementation"):
        softmax_attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="shapes do not agree"):
        softmax_attention(q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(ValueError, match="window"):
        softmax_attention(q, k, v, window=0)
