"""The differential mixer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import state_bytes
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.mixers import MIXERS, Context, configured

B, T, D, H, G, K = 2, 20, 16, 4, 2, 4
ROW = MIXERS["differential"]
# No rotary positions: those of test_softmax_mixers.py.
MODEL = ModelConfig(
    width=D, layers=2, heads=H, kv_heads=G, attention=("differential",), mixer=MixerConfig(rope_fraction=0.0)
)


def made(cfg=MODEL):
    mixer = ROW.mixer(configured(ROW, cfg), jnp.float32)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    context = Context(jnp.broadcast_to(jnp.arange(T), (B, T)), None, {})
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), x, context))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), jnp.float32), shapes)
    return mixer, params, x, context


def formula(params, x, layer, sink=None):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    q, k = ((x @ p[name]["kernel"]).reshape(B, T, -1, K) for name in ("query", "key"))
    v = (x @ p["value"]["kernel"]).reshape(B, T, G // 2, 2 * K)

    def weights(h, g):
        logits = np.where(np.tri(T, dtype=bool), q[:, :, h] @ k[:, :, g].swapaxes(1, 2) / np.sqrt(K), -np.inf)
        total = np.exp(logits).sum(-1, keepdims=True) + (0 if sink is None else np.exp(np.float64(sink[h])))
        return np.exp(logits) / total

    first = 0.8 - 0.6 * np.exp(-0.3 * layer)
    lq1, lk1, lq2, lk2 = p["mix"]
    share = np.exp(lq1 @ lk1) - np.exp(lq2 @ lk2) + first
    out = np.zeros((B, T, H // 2, 2 * K))
    for h in range(H // 2):
        g = h // (H // G)
        out[:, :, h] = (weights(2 * h, 2 * g) - share * weights(2 * h + 1, 2 * g + 1)) @ v[:, :, g]
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6) * p["output_norm"]["scale"] * (1 - first)
    return out.reshape(B, T, H * K) @ p["out"]["kernel"]


def test_equals_its_formula_at_each_depth():
    mixer, params, x, context = made()
    forward = jax.jit(lambda layer: mixer.apply({"params": params}, x, context.replace(layer=layer))[0])
    for layer in (0, 3):
        expected = formula(params, x, layer)
        np.testing.assert_allclose(forward(layer), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert jnp.abs(forward(0) - forward(3)).max() > 1e-2


def test_learned_sinks_go_with_their_heads():
    mixer, params, x, context = made(dataclasses.replace(MODEL, mixer=MixerConfig(rope_fraction=0.0, sink_logits=True)))
    expected = formula(params, x, 0, params["sink"])
    forward = jax.jit(lambda: mixer.apply({"params": params}, x, context)[0])
    np.testing.assert_allclose(forward(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_it_is_as_large_as_softmax_attention_and_so_is_its_cache():
    mixer, params, *_ = made()
    kernels = sum(params[name]["kernel"].size for name in ("query", "key", "value", "out"))
    assert kernels == D * (H + 2 * G + H) * K
    cache = jax.eval_shape(lambda: mixer.init_cache(mixer.cfg, 1, 100, jnp.bfloat16))
    assert state_bytes(cache) == 100 * (2 * 2 * G * K + 4)


def test_heads_must_come_in_pairs():
    for heads, kv_heads in [(3, 1), (4, 1)]:
        with pytest.raises(ConfigError, match="make them even"):
            made(dataclasses.replace(MODEL, head_dim=K, heads=heads, kv_heads=kv_heads))
