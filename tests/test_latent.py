"""Multi-head latent attention: expanded in training, absorbed in decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import state_bytes
from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.models.mixers import MIXERS, Context, configured
from slm.models.rope import rope_tables

B, T, D, H, K, L, P = 2, 20, 16, 4, 6, 10, 4


@functools.cache
def made(name, **switches):
    row = MIXERS[name]
    sizes = MixerConfig(latent_dim=L, rope_dim=P, **switches)
    cfg = configured(row, ModelConfig(width=D, layers=2, heads=H, head_dim=K, attention=(name,), mixer=sizes))
    mixer, x = row.mixer(cfg, jnp.float32), jax.random.normal(jax.random.key(0), (B, T, D))
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), x, context(mixer, 0, T)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), jnp.float32), shapes)
    return mixer, params, x, jax.jit(lambda x: mixer.apply({"params": params}, x, context(mixer, 0, T))[0])


def context(mixer, start, stop):
    size, positions = mixer.rotary_size(mixer.cfg), jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))
    return Context(positions, None, {size: rope_tables(positions, size, RopeConfig(theta=100.0))} if size else {})


def turned(x):
    angles = np.arange(T)[:, None] * 100.0 ** (-np.arange(0, P, 2) / P)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., : P // 2], x[..., P // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def formula(name, params, x):
    """Equations 9-19 of DeepSeek-V2, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    rms = lambda a, scale: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * scale  # noqa: E731
    source = x
    if "query_latent" in p:
        source = rms(x @ p["query_latent"]["kernel"], p["query_latent_norm"]["scale"])
    q = (source @ p["query"]["kernel"]).reshape(B, T, H, K + P)
    c = rms(x @ p["latent"]["kernel"], p["latent_norm"]["scale"])
    k, v = ((c @ p[part]["kernel"]).reshape(B, T, H, K) for part in ("key_up", "value_up"))
    k_rope, q_rope = (x @ p["key_rope"]["kernel"])[:, :, None], q[..., K:]
    if name == "mla":
        k_rope, q_rope = turned(k_rope), turned(q_rope)
    out = np.zeros((B, T, H, K))
    for h in range(H):
        logits = q[:, :, h, :K] @ k[:, :, h].swapaxes(1, 2) + q_rope[:, :, h] @ k_rope[:, :, 0].swapaxes(1, 2)
        weights = np.where(np.tri(T, dtype=bool), np.exp(logits / np.sqrt(K + P)), 0)
        out[:, :, h] = weights / weights.sum(-1, keepdims=True) @ v[:, :, h]
    return out.reshape(B, T, H * K) @ p["out"]["kernel"]


@pytest.mark.parametrize(("name", "query_latent"), [("mla", 0), ("mla", 7), ("nope_mla", 0)])
def test_equals_its_formula(name, query_latent):
    _, params, x, forward = made(name, query_latent_dim=query_latent)
    assert ("query_latent" in params) == bool(query_latent)
    expected = formula(name, params, x)
    np.testing.assert_allclose(forward(x), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_absorbed_decoding_equals_the_expanded_forward_pass():
    """With a soft cap and learned sinks, to which an offset of all logits would not be the same."""
    mixer, params, x, forward = made("mla", softcap=2.0, sink_logits=True)
    expected, cache = forward(x), mixer.init_cache(mixer.cfg, B, T, jnp.float32)
    step = jax.jit(lambda x, context, cache: mixer.apply({"params": params}, x, context, cache))
    for start, stop in [(0, 9), (9, 10), (10, 19), (19, T)]:
        out, cache = step(x[:, start:stop], context(mixer, start, stop), cache)
        np.testing.assert_allclose(out, expected[:, start:stop], atol=2e-5 * float(jnp.abs(expected).max()))


def test_the_cache_is_one_latent_and_one_rotated_key_a_token():
    for heads in (1, 16):
        cfg = ModelConfig(width=D, heads=heads, head_dim=K, attention=("mla",), mixer=MixerConfig(latent_dim=L))
        cfg = configured(MIXERS["mla"], cfg)
        cache = jax.eval_shape(lambda cfg=cfg: MIXERS["mla"].mixer.init_cache(cfg, 1, 100, jnp.bfloat16))
        assert state_bytes(cache) == 100 * (2 * (L + K // 2) + 4)


def test_without_positions_the_order_of_the_past_is_not_known():
    for name, same in [("nope_mla", True), ("mla", False)]:
        _, _, x, forward = made(name, query_latent_dim=0)
        swapped = x.at[:, [2, 5]].set(x[:, [5, 2]])
        change = jnp.abs(forward(x) - forward(swapped))[:, 6:].max()
        assert (change < 1e-4) == same
