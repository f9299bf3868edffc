"""Mixers of linear attention: sizes, switches, errors. Causality, documents and decoding: test_invariants.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.counts import cache_bytes, flops_per_token, parameter_counts
from slm.models.mixers import Context, mixer
from slm.models.mixers.linear import ROWS, layers_features
from slm.models.transformer import Transformer

D, H, K, T = 16, 2, 8, 20
BASE = ModelConfig(vocab_size=31, width=D, layers=2, heads=H, init_std=0.3)


def config(row, **switches):
    return dataclasses.replace(BASE, attention=(row,), mixer=MixerConfig(**switches))


# Row to (features M, columns of the state, parameters besides the four matrices of D x D).
SIZES = {
    "linear": (K, K + 1, 0),
    "relu_linear": (K, K + 1, 0),
    "performer": (256, K + 1, 0),
    "cosformer": (2 * K, K + 1, 0),
    "hedgehog": (2 * K, K + 1, 2 * H * K * K),
    # q and k have 16 dimensions instead of 8
    "based": (1 + 16 + 136, K + 1, 2 * D * H * 8),
    "rebased": (136, K + 1, 2 * D * H * 8 + 4 * H * 16),
}


@pytest.mark.parametrize("row", ROWS)
def test_sizes_are_the_closed_forms(row):
    M, columns, extra = SIZES[row]
    cfg = config(row)
    assert cache_bytes(cfg, 3, 50) == cache_bytes(cfg, 3, 4000) == 3 * 2 * 4 * H * M * columns
    other = parameter_counts(dataclasses.replace(BASE, attention=("softmax",), mixer=MixerConfig(qk_norm="none")))
    assert parameter_counts(cfg)["total"] - other["total"] == 2 * extra
    none = flops_per_token(dataclasses.replace(BASE, attention=("softmax",)), 1)["forward"] - 2 * 4 * H * K
    maps = {"performer": 4 * H * 256 * K, "hedgehog": 4 * H * K * K, "based": 4 * D * H * 8, "rebased": 4 * D * H * 8}
    expected = none + 2 * (4 * H * M * columns + maps.get(row, 0))
    assert flops_per_token(cfg, 50)["forward"] == pytest.approx(expected)


EVERYTHING = {
    "conv": 3, "qk_norm": "rms", "rope_fraction": 0.5, "gate": "silu", "gate_rank": 3, "gate_first": True,
    "output_norm": "head", "learned_state": True, "expand_k": 0.5, "expand_v": 1.5, "normalize": True, "chunk": 8,
    "feature_dim": 6,
}  # fmt: skip


def has(row, values):
    return {name: value for name, value in values.items() if getattr(ROWS[row].defaults, name) is not None}


def randomised(model):
    """Parameters that are nowhere zero, states above all."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), jnp.float32), shapes)


def tokens():
    return jax.random.randint(jax.random.key(1), (1, T), 0, BASE.vocab_size)


DOCUMENTS = {
    "segment_ids": np.where(np.arange(T) < 9, 1, 2)[None],
    "positions": np.where(np.arange(T) < 9, np.arange(T), np.arange(T) - 9)[None],
}


@pytest.mark.parametrize("row", ["linear", "performer"])
def test_with_every_switch_on_decoding_and_packing_equal_the_forward_pass(row):
    """`linear` in its unnormalised form, whose state has one column less."""
    switches = has(row, EVERYTHING) | ({"normalize": False} if row == "linear" else {})
    model = Transformer(config(row, **switches))
    params, x = randomised(model), tokens()
    hidden = jax.jit(lambda x, **rows: model.hidden(params, x, **rows)[0])
    whole, packed = hidden(x), hidden(x, **DOCUMENTS)
    np.testing.assert_allclose(packed[:, 9:], hidden(x[:, 9:]), atol=2e-5)
    np.testing.assert_allclose(packed[:, :9], whole[:, :9], atol=2e-5)

    step = jax.jit(lambda cache, x, positions: model.hidden(params, x, positions=positions, cache=cache))
    cache, outs = model.init_cache(1, T), []
    for start, stop in [(0, 11), *((t, t + 1) for t in range(11, T))]:
        out, cache = step(cache, x[:, start:stop], jnp.arange(start, stop)[None])
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, 1), whole, atol=2e-5)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == cache_bytes(model.cfg, 1, T, jnp.float32)


def layer(row, context=None, **switches):
    """(jitted x -> y of one mixer, its random parameters, x)."""
    module = mixer(row, config(row, **switches), jnp.float32)
    at = jnp.arange(T)[None]
    context = context or Context(at, None, {})
    x = jax.random.normal(jax.random.key(2), (1, T, D))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, context)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), jnp.float32), shapes)
    return jax.jit(lambda params, x: module.apply({"params": params}, x, context)[0]), params, x


CHANGES = [
    ("linear", {"feature_map": "dpfp"}), ("linear", {"normalize": False}), ("linear", {"conv": 2}),
    ("linear", {"qk_norm": "l2"}), ("linear", {"output_norm": "full"}), ("linear", {"gate": "sigmoid"}),
    ("linear", {"feature_map": "taylor2"}), ("performer", {"feature_seed": 1}), ("performer", {"feature_dim": 32}),
    ("cosformer", {"horizon": 20}), ("based", {"feature_map": "relu"}),
]  # fmt: skip


@functools.cache
def by_default(row):
    f, params, x = layer(row)
    return np.asarray(f(params, x))


@pytest.mark.parametrize(("row", "change"), CHANGES)
def test_a_switch_changes_the_layer(row, change):
    f, params, x = layer(row, **change)
    out = np.asarray(f(params, x))
    assert np.isfinite(out).all()
    assert np.abs(out - by_default(row)).max() > 1e-3


def test_based_is_its_equation():
    """1 + s + s^2/2 with s = q . k / sqrt(16), in float64."""
    f, params, x = layer("based")
    p = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in params.items()}
    h = np.asarray(x, np.float64)[0]
    q, k, v = ((h @ p[name]).reshape(T, H, -1) for name in ("query", "key", "value"))
    s = np.einsum("THK,SHK->HTS", q, k) / 4
    weights = np.tril(1 + s + s**2 / 2)
    out = np.einsum("HTS,SHV->THV", weights / weights.sum(-1, keepdims=True), v).reshape(T, D) @ p["out"]
    np.testing.assert_allclose(f(params, x)[0], out, rtol=1e-4, atol=1e-5)


def test_performer_approximates_the_softmax_layer_of_its_parameters():
    f, params, x = layer("performer", feature_dim=1024)
    exact, *_ = layer("softmax", qk_norm="none", rope_fraction=0.0)
    modest = params | {name: {"kernel": params[name]["kernel"] * 0.3} for name in ("query", "key")}
    expected, size = exact(modest, x), float(jnp.abs(exact(modest, x)).max())
    assert np.abs(f(modest, x) - expected).max() < 0.03 * size
    assert np.abs(exact(params, x) - expected).max() > 0.3 * size  # queries and keys matter


def test_performer_layers_have_features_of_their_own_that_a_seed_draws():
    drawn = layers_features(0, 3, K, 20)
    assert drawn.shape == (3, 20, K)
    assert len(np.unique(drawn)) == drawn.size
    assert not np.isin(layers_features(1, 3, K, 20), drawn).any()
    np.testing.assert_array_equal(layers_features(0, 5, K, 20)[:3], drawn)  # of the layer's number, not of the depth
    outs = []
    for depth in (0, 1):
        f, params, x = layer("performer", Context(jnp.arange(T)[None], None, {}, jnp.int32(depth)), feature_dim=16)
        outs.append(np.asarray(f(params, x)))
    assert np.abs(outs[0] - outs[1]).max() > 1e-3


def test_a_learned_state_is_what_documents_begin_with():
    """Zeros at first, which is no learned state; then it moves the first outputs of each document."""
    f, params, x = layer("linear", learned_state=True)
    begun = params | {"state": jnp.zeros((H, K, K))}
    without = layer("linear")[0]({name: leaf for name, leaf in params.items() if name != "state"}, x)
    np.testing.assert_allclose(f(begun, x), without, atol=1e-6)
    grads = jax.grad(lambda p: f(p, x).sum())(begun)
    assert np.abs(grads["state"]).min() > 0
    assert params["state"].shape == (H, K, K)
    assert (np.abs(f(params, x) - f(begun, x)).max(-1)[0] > 1e-4).all()


@pytest.mark.parametrize(
    ("row", "switches", "message"),
    [("linear", {"feature_map": "taylor"}, "did you mean taylor2"),
     ("based", {"feature_map": "xyzzy"}, "no map 'xyzzy': one of identity, elu1"),
     ("linear", {"feature_map": "silu"}, "normalize = false"),
     ("linear", {"implementation": "blocked"}, "implementation = blocked"),
     ("cosformer", {"horizon": 10}, "20 tokens exceed model.mixer.horizon = 10")],
)  # fmt: skip
def test_bad_switches_are_refused(row, switches, message):
    model = Transformer(config(row, **switches))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: model.hidden(model.init(jax.random.key(0)), jnp.zeros((1, T), jnp.int32)))
    if row == "cosformer":
        with pytest.raises(ConfigError, match=message):
            model.init_cache(1, T)


@pytest.mark.parametrize(
    ("row", "switches", "message"),
    [("performer", {"feature_map": "relu"}, "feature_map"), ("linear", {"horizon": 8}, "horizon"),
     ("performer", {"normalize": False}, "normalize"), ("linformer", {}, "linformer sees the future"),
     ("nystrom", {}, "nystrom_attention")],
)  # fmt: skip
def test_switches_and_mechanisms_that_there_are_not_are_refused(row, switches, message):
    with pytest.raises(ConfigError, match=message):
        Transformer(config(row, **switches))


def test_signed_maps_serve_unnormalised():
    f, params, x = layer("linear", feature_map="silu", normalize=False, output_norm="head")
    assert np.isfinite(f(params, x)).all()
