"""Mamba-2 and RG-LRU layers against their equations, token by token in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from slm.config import MixerConfig, ModelConfig
from slm.models.mixers import MIXERS, Context, configured

B, T, D, H = 2, 21, 12, 4
CFG = ModelConfig(width=D, heads=H, head_dim=6, mixer=MixerConfig(chunk=8), init_std=0.3)


@functools.cache
def layer(name, **changes):
    """(parameters far from their start, outputs) of one layer."""
    mixer = MIXERS[name].mixer(configured(MIXERS[name], CFG), jnp.float32)
    context = Context(jnp.broadcast_to(jnp.arange(T), (B, T)), None, {})
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    params = jax.jit(mixer.init)(jax.random.key(1), x, context)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), params)
    y, _ = jax.jit(lambda params, x: mixer.apply({"params": params}, x, context))(params, x)
    return jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, y))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def convolved(x, p):
    """The last tap of the kernel meets the present token."""
    W = len(p["kernel"])
    y = np.zeros_like(x) + p.get("bias", 0)
    for t in range(T):
        for back in range(min(W, t + 1)):
            y[:, t] += p["kernel"][W - 1 - back] * x[:, t - back]
    return y


def test_mamba2():
    p, x, y = layer("mamba2")
    K, V = 6, 12
    q, k, v = (silu(convolved(x @ p[n]["kernel"], p[f"{n}_conv"])) for n in ("query", "key", "value"))
    assert q.shape == k.shape == (B, T, K)  # one group for all heads
    v = v.reshape(B, T, H, V)
    dt = softplus(x @ p["step"]["kernel"] + p["bias"])
    state, out = np.zeros((B, H, K, V)), np.zeros((B, T, H, V))
    for t in range(T):
        decay = np.exp(-np.exp(p["decay"]) * dt[:, t])
        state = decay[..., None, None] * state + np.einsum("BK,BHV->BHKV", k[:, t], v[:, t] * dt[:, t, :, None])
        out[:, t] = np.einsum("BK,BHKV->BHV", q[:, t], state) + p["skip"][:, None] * v[:, t]
    gated = out.reshape(B, T, H * V) * silu(x @ p["gate"]["kernel"])
    normed = gated / np.sqrt((gated**2).mean(-1, keepdims=True) + CFG.norm_eps) * p["output_norm"]["scale"][0]
    np.testing.assert_allclose(y, normed @ p["out"]["kernel"], atol=2e-5 * np.abs(y).max())


def test_rglru():
    p, x, y = layer("rglru")
    V = 6
    u = convolved(x @ p["value"]["kernel"], p["value_conv"]).reshape(B, T, H, V)

    def gate(name):
        return sigmoid(np.einsum("BTHV,HVW->BTHW", u, p[name]["map"]) + p[name]["bias"])

    log_a = -8 * softplus(p["decay"]) * gate("forget_gate")
    room = np.sqrt(1 - np.exp(2 * log_a))
    room[:, 0] = 1
    h, out = np.zeros((B, H, V)), np.zeros((B, T, H, V))
    for t in range(T):
        h = np.exp(log_a[:, t]) * h + room[:, t] * gate("input_gate")[:, t] * u[:, t]
        out[:, t] = h
    z = x @ p["gate"]["kernel"]
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    np.testing.assert_allclose(y, (out.reshape(B, T, H * V) * gelu) @ p["out"]["kernel"], atol=2e-5 * np.abs(y).max())


def test_a_gate_of_rglru_may_underflow():
    """The factor sqrt(1 - a^2) has no slope where a is 1."""
    p, x, _ = layer("rglru")
    p["forget_gate"]["bias"] = p["forget_gate"]["bias"].copy()
    p["forget_gate"]["bias"][0, 0] = -200.0
    mixer = MIXERS["rglru"].mixer(configured(MIXERS["rglru"], CFG), jnp.float32)
    context = Context(jnp.broadcast_to(jnp.arange(T), (B, T)), None, {})
    p, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x))
    slopes = jax.jit(jax.grad(lambda p: mixer.apply({"params": p}, x, context)[0].sum()))(p)
    assert all(jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes))


def test_rglru_starts_with_slow_decays():
    """a^2 between 0.81 and 0.998 where the forget gate is fully open."""
    mixer = MIXERS["rglru"].mixer(configured(MIXERS["rglru"], CFG), jnp.float32)
    context = Context(jnp.zeros((1, 1), jnp.int32), None, {})
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)), context)["params"]
    squares = np.exp(-16 * softplus(np.asarray(params["decay"], np.float64)))
    assert 0.8 < squares.min() < 0.9 < squares.max() < 0.999
