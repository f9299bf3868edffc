"""The decoder: layouts, counts, decode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.errors import ConfigError
from slm.models.counts import abstract_parameters, cache_bytes, flops_per_token, parameter_counts
from slm.models.rope import apply_rope, rope_tables
from slm.models.transformer import Transformer

BASE = ModelConfig(vocab_size=61, width=32, layers=2, heads=4)
VARIANTS = {
    "plain": BASE,
    "pattern with a tail": dataclasses.replace(
        BASE, layers=5, kv_heads=2, attention=("window", "softmax", "window"), mixer=MixerConfig(window=5)
    ),
    "gpt2": dataclasses.replace(
        BASE,
        position="learned",
        max_length=24,
        norm="layernorm",
        bias=("qkv", "out", "mlp", "norm"),
        mlp="gelu",
        tied=False,
        mixer=MixerConfig(qk_norm="none"),
    ),
    "capped": dataclasses.replace(BASE, mixer=MixerConfig(softcap=5.0), logit_softcap=5.0, mlp="geglu", head_dim=16),
}


def tokens(batch=2, length=20):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, BASE.vocab_size)


def forward(cfg, params, x, **kwargs):
    model = Transformer(cfg)
    return model.logits(params, model.hidden(params, x, **kwargs)[0])


def closed_form(m: ModelConfig) -> int:
    """Parameters by the textbook formula, independent of the module code."""
    K, G = m.head_dim or m.width // m.heads, m.kv_heads or m.heads
    F = m.mlp_width or -(-(8 * m.width // 3 if "glu" in m.mlp else 4 * m.width) // 32) * 32
    b, norms = int(bool(m.bias)), 1 + int(bool(m.bias) and m.norm == "layernorm")
    attention = 2 * m.width * m.heads * K + 2 * m.width * G * K + b * (m.heads * K + 2 * G * K + m.width)
    attention += 2 * K if m.mixer.qk_norm != "none" else 0
    mlp = (3 if "glu" in m.mlp else 2) * m.width * F + b * ((2 if "glu" in m.mlp else 1) * F + m.width)
    total = m.vocab_size * m.width * (1 if m.tied else 2) + m.layers * (attention + mlp + 2 * norms * m.width)
    return total + norms * m.width + (m.max_length * m.width if m.position == "learned" else 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_is_the_closed_form_and_the_real_tree(name):
    cfg = VARIANTS[name]
    params = Transformer(cfg).init(jax.random.key(0))
    assert parameter_counts(cfg)["total"] == sum(a.size for a in jax.tree.leaves(params)) == closed_form(cfg)


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_agree_with_the_compiler(name):
    """XLA also counts norms and activations, and the masked half of attention, so the two agree only closely."""
    cfg = dataclasses.replace(VARIANTS[name], width=64, scan=False)
    x = jnp.zeros((1, 16), jnp.int32)
    compiled = jax.jit(lambda p: forward(cfg, p, x)).lower(abstract_parameters(cfg)).compile()
    ours = flops_per_token(cfg, 16)["forward"] * 16
    assert 0.8 < ours / compiled.cost_analysis()["flops"] < 1.05


@pytest.mark.parametrize("name", VARIANTS)
def test_cache_bytes_are_those_of_the_real_cache(name):
    cfg = VARIANTS[name]
    cache = Transformer(cfg).init_cache(3, 24, jnp.bfloat16)
    assert cache_bytes(cfg, 3, 24) == sum(a.nbytes for a in jax.tree.leaves(cache))
    K, G = cfg.head_dim or cfg.width // cfg.heads, cfg.kv_heads or cfg.heads
    slots = sum(5 if cfg.attention[i % len(cfg.attention)] == "window" else 24 for i in range(cfg.layers))
    assert cache_bytes(cfg, 3, 24) == 3 * slots * (2 * G * K * 2 + 4)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("split", [1, 13])
def test_prefill_and_decode_equal_forward(name, split):
    cfg = VARIANTS[name]
    model, x = Transformer(cfg), tokens()
    params = model.init(jax.random.key(0))
    cache, outs = model.init_cache(2, 20), []
    positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
    step = jax.jit(lambda c, x, p: model.hidden(params, x, positions=p, cache=c))
    for start, stop in [(0, split), *((t, t + 1) for t in range(split, 20))]:
        hidden, cache = step(cache, x[:, start:stop], positions[:, start:stop])
        outs.append(model.logits(params, hidden))
    np.testing.assert_allclose(jnp.concatenate(outs, 1), forward(cfg, params, x), atol=2e-6)


def test_decode_ignores_padding():
    """Rows of different lengths, padded on the right with position -1, decode as each would alone."""
    cfg = VARIANTS["pattern with a tail"]
    model, x = Transformer(cfg), tokens()
    params = model.init(jax.random.key(0))
    lengths = jnp.array([[14], [9]])
    at = jnp.arange(14)[None]
    _, cache = model.hidden(params, x[:, :14], positions=jnp.where(at < lengths, at, -1), cache=model.init_cache(2, 20))
    following = jnp.take_along_axis(x, lengths, 1)
    hidden, _ = model.hidden(params, following, positions=lengths, cache=cache)
    full = forward(cfg, params, x)
    expected = jnp.take_along_axis(full, lengths[..., None], 1)
    np.testing.assert_allclose(model.logits(params, hidden), expected, atol=2e-6)


def test_rope_is_a_rotation_by_relative_position():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 2, 1, 8))

    def turning(position, **scaling):
        return rope_tables(jnp.array([[position, position]]), 8, RopeConfig(theta=100.0, **scaling))

    def dot(i, j):
        turned = [apply_rope(x, turning(p)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum(-1)

    np.testing.assert_allclose(dot(3, 1), dot(13, 11), rtol=1e-4)
    assert float(jnp.abs(dot(3, 1) - dot(3, 2)).max()) > 1e-3
    stretched = apply_rope(q, turning(8, scaling="linear", factor=4.0))
    np.testing.assert_allclose(stretched, apply_rope(q, turning(2)), rtol=1e-5)


def test_default_positions_of_segments_do_not_matter_but_given_ones_do():
    """Rotary attention sees differences of positions only: restarting them per document must not change anything."""
    params = Transformer(BASE).init(jax.random.key(0))
    x = tokens()
    segments = jnp.where(jnp.arange(20) < 9, 1, 2) * jnp.ones((2, 1), jnp.int32)
    restarted = jnp.where(jnp.arange(20) < 9, jnp.arange(20), jnp.arange(20) - 9) * jnp.ones((2, 1), jnp.int32)
    a = forward(BASE, params, x, segment_ids=segments)
    b = forward(BASE, params, x, segment_ids=segments, positions=restarted)
    np.testing.assert_allclose(a, b, atol=1e-5)
    learned = dataclasses.replace(BASE, position="learned", max_length=20)
    params_learned = Transformer(learned).init(jax.random.key(0))
    a, b = (forward(learned, params_learned, x, segment_ids=segments, **at) for at in ({}, {"positions": restarted}))
    np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(forward(BASE, params, x, positions=restarted) - forward(BASE, params, x)).max()) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"attention": ("sofmax",)}, "did you mean softmax"), ({"vocab_size": 0}, "model.vocab_size"),
     ({"position": "learned"}, "model.max_length")],
)  # fmt: skip
def test_bad_models_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Transformer(dataclasses.replace(BASE, **change))
