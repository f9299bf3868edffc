"""Decaying mixers against numpy float64 forms of the whole mixer, one token at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.errors import ConfigError
from slm.models.counts import cache_bytes, flops_per_token
from slm.models.mixers import MIXERS, Context, configured, mixer
from slm.models.mixers.decay import ROWS, bounded
from slm.models.rope import rope_tables
from slm.models.transformer import Transformer
from slm.training import rules

B, T, CUT = 2, 11, 6  # the second document begins inside a chunk
H, D, HEAD, LAYERS, LAYER = 2, 12, 8, 4, 2
MODEL = ModelConfig(vocab_size=7, width=D, heads=H, head_dim=HEAD, layers=LAYERS, init_std=0.5)
EVERYTHING = MixerConfig(
    qk_norm="rms", rope_fraction=0.5, gate="silu", gate_rank=3, gate_first=True, output_norm="full", conv=2,
    learned_state=True, expand_k=1.0, expand_v=1.5,
)  # fmt: skip
CASES = {name: (name, MixerConfig()) for name in ROWS} | {
    "gla, all switches": ("gla", dataclasses.replace(EVERYTHING, rank=5)),
    "lightning, all switches": ("lightning", EVERYTHING),
}


def model_of(case):
    name, switches = CASES[case]
    return name, dataclasses.replace(MODEL, attention=(name,), mixer=dataclasses.replace(switches, chunk=4))


def context_of(positions, segment_ids):
    rope = {size: rope_tables(positions, size, RopeConfig(theta=100.0)) for size in (4, 8)}
    return Context(positions, segment_ids, rope, LAYER)


def inputs():
    """(x, context of two documents)."""
    at = np.broadcast_to(np.arange(T), (B, T))
    context = context_of(jnp.asarray(np.where(at < CUT, at, at - CUT)), jnp.asarray(np.where(at < CUT, 1, 2)))
    return jax.random.normal(jax.random.key(0), (B, T, D)), context


@functools.cache
def outputs(case):
    """(cfg with all switches, random parameters, y)."""
    name, cfg = model_of(case)
    module, (x, context) = mixer(name, cfg, jnp.float32), inputs()
    params = jax.eval_shape(module.init, jax.random.key(1), x, context)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), jnp.float32), params)
    y, cache = jax.jit(lambda params, x: module.apply({"params": params}, x, context))(params, x)
    assert cache is None
    return configured(MIXERS[name], cfg), params, y


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, scale, axes=-1):
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6) * scale


def turn(x, position, size, theta=100.0):
    """Rotary position of the heads' first `size` dimensions."""
    angle = position * theta ** (-np.arange(0, size, 2) / size)
    a, b = x[:, : size // 2], x[:, size // 2 : size]
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate([*turned, x[:, size:]], -1)


def decay_and_key(name, p, x, k):
    """(factor of the state (H, 1) or (H, K), key (H, K)), by the papers' formulas."""
    h = np.arange(H)[:, None]
    if name == "retnet":
        return 1 - 2.0 ** (-5 - h), k
    if name == "lightning":
        return np.exp(-((1 / 2 ** (8 / H)) ** (h + 1)) * (1 - LAYER / (LAYERS - 1 + 1e-5) + 1e-5)), k
    if name == "simple_gla":
        return sigmoid(x @ p["forget"]["kernel"] + p["bias"])[:, None] ** (1 / 16), k
    if name == "gla":
        logits = (x @ p["forget_down"]["kernel"] @ p["forget"]["kernel"]).reshape(p["bias"].shape) + p["bias"]
        return sigmoid(logits) ** (1 / 16), k
    bound = sigmoid(np.log((LAYER / LAYERS) / (1 - LAYER / LAYERS)) + p["decay"])
    f = bound + (1 - bound) * sigmoid(k)
    return f, 1 - f


def reference(name, cfg, params, x_TxD):
    """One document, token by token."""
    m, p = cfg.mixer, jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    K, V = round(m.expand_k * HEAD), round(m.expand_v * HEAD)
    S = p["state"].copy() if m.learned_state else np.zeros((H, K, V))
    x_TxD, ys = np.asarray(x_TxD, np.float64), []
    size = 2 * round(m.rope_fraction * K / 2)

    def heads(which, t):
        out = x_TxD[t] @ p[which]["kernel"]
        if m.conv:
            kernel = p[f"{which}_conv"]["kernel"]
            out = sum(x_TxD[t - w] @ p[which]["kernel"] * kernel[m.conv - 1 - w] for w in range(min(m.conv, t + 1)))
        activated = {"lightning": True, "hgrn2": which == "query"}.get(name, m.conv > 0)
        return (silu(out) if activated else out).reshape(H, -1)

    def prepared(which, vectors, t):
        return turn(rms(vectors, p[f"{which}_norm"]["scale"]) if m.qk_norm == "rms" else vectors, t, size)

    for t, x in enumerate(x_TxD):
        q, (decay, k), v = heads("query", t), decay_and_key(name, p, x, heads("key", t)), heads("value", t)
        S = decay[..., None] * S + prepared("key", k, t)[..., None] * v[:, None]
        out = np.einsum("hk,hkv->hv", prepared("query", q, t), S) * (1 if name == "lightning" else K**-0.5)
        gate = 1.0
        if m.gate != "none":
            logits = (x @ p["gate_down"]["kernel"] if m.gate_rank else x) @ p["gate"]["kernel"]
            gate = {"silu": silu, "sigmoid": sigmoid}[m.gate](logits).reshape(H, V)
        scale = p["output_norm"]["scale"]
        normed = rms if m.output_norm == "head" else lambda o, s: rms(o, s.reshape(H, V), (0, 1))
        out = normed(out * gate, scale) if m.gate_first else normed(out, scale) * gate
        ys.append(out.reshape(-1) @ p["out"]["kernel"])
    return np.stack(ys)


@pytest.mark.parametrize("case", CASES)
def test_a_mixer_is_its_float64_form(case):
    cfg, params, y = outputs(case)
    x, _ = inputs()
    name = CASES[case][0]
    expected = [np.concatenate([reference(name, cfg, params, d) for d in (row[:CUT], row[CUT:])]) for row in x]
    np.testing.assert_allclose(y, np.stack(expected), rtol=0, atol=2e-5 * np.abs(expected).max())


def test_decoding_is_the_forward_pass_with_all_switches():
    """Prefill with padding behind it, prefill that continues, then single tokens; a learned state begins it."""
    case = "gla, all switches"
    cfg, params, y = outputs(case)
    module, (x, _) = mixer(*model_of(case), jnp.float32), inputs()
    x = x[:, :CUT]

    @jax.jit
    def extend(x, positions, cache):
        return module.apply({"params": params}, x, context_of(positions, None), cache)

    cache, ys, at = module.init_cache(cfg, B, T, jnp.float32), [], 0
    for length, padding in ((3, 1), (2, 0), (1, 0)):
        positions = np.pad(np.arange(at, at + length), (0, padding), constant_values=-1)
        piece = jnp.pad(x[:, at : at + length], ((0, 0), (0, padding), (0, 0)), constant_values=7.0)
        out, cache = extend(piece, jnp.broadcast_to(positions, (B, len(positions))), cache)
        ys.append(out[:, :length])
        at += length
    np.testing.assert_allclose(np.concatenate(ys, 1), y[:, :CUT], atol=2e-5 * np.abs(y).max())


def test_a_learned_state_is_found_by_every_document_and_learned():
    _, params, _ = outputs("lightning, all switches")
    module, (x, context) = mixer(*model_of("lightning, all switches"), jnp.float32), inputs()

    def first_of_the_second(state):
        y, _ = module.apply({"params": params | {"state": state}}, x, context)
        return y[:, CUT].sum()

    grad = jax.jit(jax.grad(first_of_the_second))(params["state"])
    assert grad.shape == (H, HEAD, HEAD * 3 // 2)
    assert (grad != 0).all()


def test_hgrn2_bounds_what_it_forgets_by_depth():
    """f is at least layer / layers; at the first layer anything goes, and no gradient is NaN."""
    logits, offset = 60 * jax.random.normal(jax.random.key(3), (B, T, H, HEAD)), jnp.zeros((H, HEAD))

    @jax.jit
    def with_gradients(layer):
        (key, log_f), pull = jax.vjp(lambda *a: bounded(*a, layer, LAYERS), logits, offset)
        return key, log_f, pull((jnp.ones_like(key), jnp.ones_like(key)))

    for layer in range(LAYERS):
        key, log_f, grads = with_gradients(layer)
        f = np.exp(np.asarray(log_f, np.float64))
        np.testing.assert_allclose(f, 1 - key, atol=1e-6)
        assert abs(f.min() - layer / LAYERS) < 1e-6
        assert log_f.max() <= 0
        assert all(np.isfinite(g).all() for g in grads)
        assert (grads[1] == 0).all() == (layer == 0)
    assert with_gradients(0)[1].min() < -50  # 1 - key would be 0


@pytest.mark.parametrize("name", ROWS)
def test_the_state_has_one_size_whatever_the_length(name):
    cfg = dataclasses.replace(MODEL, attention=(name,))
    m = ROWS[name].defaults
    K, V = round(m.expand_k * HEAD), round(m.expand_v * HEAD)
    state, conv = H * K * V * 4, (m.conv - 1) * H * (2 * K + V) * 2 if m.conv else 0
    for length in (8, 4096):
        assert cache_bytes(cfg, 3, length) == 3 * LAYERS * (state + conv)
    assert flops_per_token(cfg, 8) == flops_per_token(cfg, 4096)


def test_every_parameter_has_one_rule():
    for name in ROWS:
        cfg = dataclasses.replace(MODEL, attention=(name,), tied=False)
        params = jax.eval_shape(Transformer(cfg).init, jax.random.key(0))
        for rule_set in (rules.DECAY, rules.MUON, rules.SHARDING):
            rules.assign(rule_set, params)


def test_a_backend_of_softmax_is_refused():
    x, context = inputs()
    module = mixer("retnet", dataclasses.replace(MODEL, mixer=MixerConfig(implementation="blocked")), jnp.float32)
    with pytest.raises(ConfigError, match="implementation = blocked: a backend of softmax attention"):
        jax.eval_shape(module.init, jax.random.key(0), x, context)
