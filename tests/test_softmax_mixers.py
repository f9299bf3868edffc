"""Softmax mixers against their formulas in float64, and their caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.errors import ConfigError
from slm.models.mixers import MIXERS, Context, check_mechanisms, configured
from slm.models.mixers.cache import store
from slm.models.mixers.softmax import mean_keys
from slm.models.rope import rope_tables

B, T, D, H, G, K = 2, 24, 16, 4, 2, 8
MODEL = ModelConfig(width=D, layers=2, heads=H, kv_heads=G, head_dim=K)
CASES = {
    "softmax": ("softmax", {}),
    "gate, a quarter rotates": ("gated_softmax", {}),
    "silu gate of low rank, half rotates": ("softmax", {"gate": "silu", "gate_rank": 3, "rope_fraction": 0.5}),
    "unit length, no positions": ("nope_softmax", {"qk_norm": "l2"}),
    "learned sinks and soft cap": ("sink_softmax", {"softcap": 1.5, "qk_norm": "none"}),
    "window and first tokens": ("streaming", {"window": 6, "sinks": 3}),
}


def made(name, **switches):
    """(mixer, its resolved switches, parameters far from tiny, inputs, context)."""
    row = MIXERS[name]
    cfg = configured(row, dataclasses.replace(MODEL, attention=(name,), mixer=MixerConfig(**switches)))
    size = row.mixer.rotary_size(cfg)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    context = Context(positions, None, {size: rope_tables(positions, size, RopeConfig(theta=10_000.0))} if size else {})
    mixer, x = row.mixer(cfg, jnp.float32), jax.random.normal(jax.random.key(0), (B, T, D))
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), x, context))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), jnp.float32), shapes)
    return mixer, cfg.mixer, params, x, context


def turned(x, size):
    """Rotary positions on the first `size` dimensions."""
    angles = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, size, 2) / max(size, 1))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def formula(m, params, x):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    q, k, v = ((x @ p[name]["kernel"]).reshape(B, T, -1, K) for name in ("query", "key", "value"))
    scale = K**-0.5
    if m.qk_norm == "rms":
        q, k = (
            a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"]
            for a, name in ((q, "query_norm"), (k, "key_norm"))
        )
    if m.qk_norm == "l2":
        q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
        scale = K**0.5
    size = round(m.rope_fraction * K)
    q, k = turned(q, size), turned(k, size)
    i, j = np.indices((T, T))
    seen = (j <= i) & ((i - j < (m.window or T)) | (j < (m.sinks or 0)))
    out = np.zeros((B, T, H, K))
    for h in range(H):
        logits = scale * q[:, :, h] @ k[:, :, h // (H // G)].swapaxes(1, 2)
        if m.softcap:
            logits = m.softcap * np.tanh(logits / m.softcap)
        weights = np.where(seen, np.exp(logits), 0)
        total = weights.sum(-1, keepdims=True) + (np.exp(p["sink"][h]) if m.sink_logits else 0)
        out[:, :, h] = weights / total @ v[:, :, h // (H // G)]
    out = out.reshape(B, T, H * K)
    if m.gate != "none":
        inner = x @ p["gate_down"]["kernel"] if m.gate_rank else x
        logits = inner @ p["gate"]["kernel"]
        out = out / (1 + np.exp(-logits)) * (logits if m.gate == "silu" else 1)
    return out @ p["out"]["kernel"]


@pytest.mark.parametrize("case", CASES)
def test_equals_its_formula(case):
    name, switches = CASES[case]
    mixer, m, params, x, context = made(name, **switches)
    y, _ = jax.jit(lambda p: mixer.apply({"params": p}, x, context))(params)
    expected = formula(m, params, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_each_switch_changes_the_output():
    """Else the formula above could leave one out on both sides."""
    mixer, _, params, x, context = made("sink_softmax", softcap=1.5, gate="sigmoid")

    def output(**switches):
        cfg = dataclasses.replace(mixer.cfg, mixer=dataclasses.replace(mixer.cfg.mixer, **switches))
        return mixer.clone(cfg=cfg).apply({"params": params}, x, context)[0]

    base = output()
    for switch in [{"softcap": 0.0}, {"gate": "silu"}, {"sink_logits": False}, {"rope_fraction": 0.0}, {"window": 5}]:
        assert jnp.abs(output(**switch) - base).max() > 1e-3, switch


@pytest.mark.parametrize(("length", "window", "sinks"), [(9, None, 0), (9, 20, 4), (9, 3, 0), (9, 3, 2), (9, 7, 5)])
def test_mean_keys_counts_what_is_seen(length, window, sinks):
    i, j = np.indices((length, length))
    seen = (j <= i) & ((i - j < (window or length)) | (j < sinks))
    assert mean_keys(length, window, sinks) == pytest.approx(seen.sum() / length)


@pytest.mark.parametrize(("slots", "sinks"), [(7, 2), (5, 0), (20, 2), (3, 4)])
def test_a_full_cache_keeps_the_first_and_the_latest_tokens(slots, sinks):
    length = slots if slots in (20, 3) else 17  # a cache as long as the text, or a ring
    cache = {"positions": jnp.full((1, slots), -1), "key": jnp.zeros((1, slots, 1))}
    write = jax.jit(functools.partial(store, sinks=sinks))
    at = 0
    for piece in [1, 9, 1, 3, 3, 3]:
        positions = np.arange(at, min(at + piece, length))
        at += len(positions)
        padded = np.pad(positions, (0, 9 - len(positions)), constant_values=-1)[None]
        cache = write(cache, {"positions": padded, "key": padded[..., None] * 10.0})
        kept = sorted(int(p) for p in cache["positions"][0] if p >= 0)
        assert kept == sorted({p for p in range(at) if p < sinks or p >= at - (slots - sinks)})
        np.testing.assert_array_equal(
            cache["key"][0, :, 0], np.where(cache["positions"][0] >= 0, cache["positions"][0] * 10.0, 0)
        )


def test_a_windowed_cache_is_bounded():
    for name, length, slots in [("window", 1000, 6), ("streaming", 1000, 9), ("window", 4, 4), ("softmax", 1000, 1000)]:
        switches = {"softmax": {}, "window": {"window": 6}, "streaming": {"window": 6, "sinks": 3}}[name]
        mixer = made(name, **switches)[0]
        cache = mixer.init_cache(mixer.cfg, 2, length, jnp.bfloat16)
        assert cache["key"].shape == cache["value"].shape == (2, slots, G, K)


def test_impossible_switches_are_refused(monkeypatch):
    for name, switches, problem in [
        ("softmax", {"window": 5}, "window"),
        ("softmax", {"latent_dim": 5}, "latent_dim"),
        ("window", {"conv": 4}, "conv"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            check_mechanisms(dataclasses.replace(MODEL, attention=(name,), mixer=MixerConfig(**switches)))
    # Another layer of the pattern has the switch.
    check_mechanisms(dataclasses.replace(MODEL, attention=("softmax", "window"), mixer=MixerConfig(window=5)))
    with pytest.raises(ConfigError, match="pallas"):
        made("softmax", implementation="pallas")
    for name, switches in [("streaming", {}), ("softmax", {"softcap": 3.0}), ("forgetting", {}), ("mla", {})]:
        with pytest.raises(ConfigError, match="cudnn"):
            made(name, implementation="cudnn", **switches)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tokamax"):
        made("softmax", implementation="tokamax")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name, switches in [("streaming", {}), ("forgetting", {}), ("softmax", {"sink_logits": True})]:
        with pytest.raises(ConfigError, match="tokamax serves"):
            made(name, implementation="tokamax", **switches)
