"""The forgetting mixer; its engine is tested in test_softmax.py."""

import jax
import jax.numpy as jnp
import numpy as np

from slm.attention import state_bytes
from slm.config import ModelConfig
from slm.models.mixers import MIXERS, Context, configured

B, T, D, H, G, K = 2, 20, 16, 4, 2, 4
ROW = MIXERS["forgetting"]
CFG = configured(ROW, ModelConfig(width=D, layers=2, heads=H, kv_heads=G, attention=("forgetting",)))
MIXER = ROW.mixer(CFG, jnp.float32)
CONTEXT = Context(jnp.broadcast_to(jnp.arange(T), (B, T)), None, {})


def made(bias):
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    shapes = jax.eval_shape(lambda: MIXER.init(jax.random.key(0), x, CONTEXT))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), jnp.float32), shapes)
    params["forget"]["bias"] += bias
    return params, x


@jax.jit
def forward(params, x):
    return MIXER.apply({"params": params}, x, CONTEXT)[0]


def formula(params, x):
    """Equation 4 with the product of gates written out, one query and key at a time, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    q, k, v = ((x @ p[name]["kernel"]).reshape(B, T, -1, K) for name in ("query", "key", "value"))
    gates = 1 / (1 + np.exp(-(x @ p["forget"]["kernel"] + p["forget"]["bias"])))
    out = np.zeros((B, T, H, K))
    for b, i, h in np.ndindex(B, T, H):
        g = h // (H // G)
        weights = [
            gates[b, j + 1 : i + 1, h].prod() * np.exp(q[b, i, h] @ k[b, j, g] / np.sqrt(K)) for j in range(i + 1)
        ]
        out[b, i, h] = np.array(weights) @ v[b, : i + 1, g] / np.sum(weights)
    return out.reshape(B, T, H * K) @ p["out"]["kernel"]


def test_equals_its_formula():
    params, x = made(bias=1.0)
    assert set(params) == {"query", "key", "value", "forget", "out"}  # FoX (LLaMA): no norms, no gate
    expected = formula(params, x)
    np.testing.assert_allclose(forward(params, x), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_closed_gates_leave_each_token_alone_and_open_ones_forget_nothing():
    params, x = made(bias=-60.0)
    v = jnp.repeat((x @ params["value"]["kernel"]).reshape(B, T, G, K), H // G, 2).reshape(B, T, H * K)
    np.testing.assert_allclose(forward(params, x), v @ params["out"]["kernel"], atol=1e-5)
    params, x = made(bias=60.0)
    swapped = x.at[:, [2, 5]].set(x[:, [5, 2]])
    # Without forgetting, the order of the past is not known.
    np.testing.assert_allclose(forward(params, x)[:, 6:], forward(params, swapped)[:, 6:], atol=1e-5)
    params, x = made(bias=0.0)
    assert jnp.abs(forward(params, x)[:, 6:] - forward(params, swapped)[:, 6:]).max() > 1e-2


def test_the_cache_holds_two_floats_a_key_and_head_besides_keys_and_values():
    cache = jax.eval_shape(lambda: MIXER.init_cache(CFG, 1, 100, jnp.bfloat16))
    assert state_bytes(cache) == 100 * (2 * 2 * G * K + 2 * 4 * H + 4)


def test_one_row_may_begin_while_another_goes_on():
    """Running sums continue where a row's cache ends, and start anew at position 0."""
    params, x = made(bias=0.0)
    expected = forward(params, x)
    cache = MIXER.init_cache(CFG, B, T, jnp.float32)
    step = jax.jit(lambda x, positions, cache: MIXER.apply({"params": params}, x, Context(positions, None, {}), cache))
    # Row 0 is 7 tokens ahead of row 1, which is padded meanwhile.
    for at, length in [(0, 7), (7, 1), (8, 5)]:
        here = jnp.arange(at, at + length)
        other = jnp.where(here - 7 >= 0, here - 7, -1)
        rows = jnp.stack([x[0, here], x[1, jnp.maximum(other, 0)]])
        out, cache = step(rows, jnp.stack([here, other]), cache)
        np.testing.assert_allclose(out[0], expected[0, here], atol=1e-5)
        if at >= 7:
            np.testing.assert_allclose(out[1], expected[1, other], atol=1e-5)
