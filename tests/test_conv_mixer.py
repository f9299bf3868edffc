"""Gated short convolutions against loops over tokens. Causality, documents and decoding: test_invariants.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.counts import cache_bytes, flops_per_token, parameter_counts
from slm.models.mixers import Context, mixer
from slm.models.transformer import Transformer

D, T = 12, 9
BASE = ModelConfig(vocab_size=31, width=D, layers=2, heads=2)


def layer(row, **switches):
    """(y (T, D), float64 parameters, float64 x (T, D)) of one mixer."""
    cfg = dataclasses.replace(BASE, attention=(row,), mixer=MixerConfig(**switches))
    module, context = mixer(row, cfg, jnp.float32), Context(jnp.arange(T)[None], None, {})
    x = jax.random.normal(jax.random.key(2), (1, T, D))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, context)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(0, 0.5, p.shape), shapes)["params"]
    y, _ = module.apply({"params": jax.tree.map(jnp.float32, params)}, x, context)
    return np.asarray(y)[0], params, np.asarray(x, np.float64)[0]


def filtered(x, kernel):
    """y_t = sum_w kernel_{W-1-w} x_{t-w}."""
    W = len(kernel)
    return np.stack([sum(kernel[W - 1 - w] * x[t - w] for w in range(min(W, t + 1))) for t in range(len(x))])


@pytest.mark.parametrize("width", [None, 1, 4])
def test_base_conv_is_its_equation(width):
    y, p, x = layer("base_conv", conv=width)
    assert p["conv"]["kernel"].shape == (width or 3, D)
    gate = x @ p["gate"]["kernel"] + p["gate"]["bias"]
    np.testing.assert_allclose(y, (filtered(x, p["conv"]["kernel"]) + p["bias"]) * gate, rtol=1e-4, atol=1e-5)


def test_short_conv_is_its_equation():
    y, p, x = layer("short_conv")
    before, after, h = (x @ p[name]["kernel"] for name in ("input_gate", "output_gate", "value"))
    expected = (after * filtered(before * h, p["conv"]["kernel"])) @ p["out"]["kernel"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("row", "matrices", "vectors"), [("base_conv", 1, 2), ("short_conv", 4, 0)])
def test_sizes_are_the_closed_forms(row, matrices, vectors):
    cfg = dataclasses.replace(BASE, attention=(row,))
    other = dataclasses.replace(BASE, attention=("softmax",), mixer=MixerConfig(qk_norm="none"))
    more = parameter_counts(cfg)["total"] - parameter_counts(other)["total"]
    assert more == 2 * ((matrices - 4) * D * D + vectors * D + 3 * D)
    assert cache_bytes(cfg, 5, 10, jnp.bfloat16) == cache_bytes(cfg, 5, 10_000, jnp.bfloat16) == 2 * 5 * 2 * D * 2
    attending = flops_per_token(other, 1)["forward"] - 2 * 4 * D
    expected = attending + 2 * 2 * ((matrices - 4) * D * D + 3 * D)
    assert flops_per_token(cfg, 10)["forward"] == pytest.approx(expected)


def test_base_conv_begins_with_the_uniform_filters_of_torch():
    model = Transformer(dataclasses.replace(BASE, width=96, attention=("base_conv",)))
    params = jax.jit(model.init)(jax.random.key(0))
    for leaf in (params["blocks"]["0"]["mixer"]["conv"]["kernel"], params["blocks"]["0"]["mixer"]["bias"]):
        assert 0.5 < np.abs(leaf).max() < 3**-0.5
        assert abs(leaf.mean()) < 0.1


@pytest.mark.parametrize("row", ["base_conv", "short_conv"])
def test_no_convolution_is_no_layer(row):
    model = Transformer(dataclasses.replace(BASE, attention=(row,), mixer=MixerConfig(conv=0)))
    with pytest.raises(ConfigError, match=r"model\.mixer\.conv = 0"):
        jax.eval_shape(model.init, jax.random.key(0))
