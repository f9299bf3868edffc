"""Delta-rule mixers against numpy float64 forms of the whole mixer, one token at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.errors import ConfigError
from slm.models.counts import parameter_counts
from slm.models.mixers import MIXERS, Context, configured, layer_pattern, mixer
from slm.models.mixers.delta import ROWS
from slm.models.rope import rope_tables
from slm.models.transformer import Transformer
from slm.training import rules

B, T, CUT = 2, 11, 6  # the second document begins inside a chunk
MODEL = ModelConfig(vocab_size=7, width=12, heads=2, head_dim=8, layers=2, init_std=0.5)
EVERYTHING = MixerConfig(
    qk_norm="rms", rope_fraction=0.5, gate="sigmoid", gate_rank=3, gate_first=True, output_norm="full", conv=2,
    learned_state=True, expand_k=1.0, expand_v=1.5, groups=1, negative_eigenvalues=True, householders=3,
)  # fmt: skip
CASES = {
    "delta": ("delta", MixerConfig()),
    "gated_delta": ("gated_delta", MixerConfig()),
    "gated_delta, grouped values": ("gated_delta_negative", MixerConfig(groups=1)),
    "delta_product": ("delta_product", MixerConfig()),
    "kda": ("kda", MixerConfig()),
    "kda, all switches": ("kda", dataclasses.replace(EVERYTHING, rank=5)),
}


def model_of(case):
    name, switches = CASES[case]
    return name, dataclasses.replace(MODEL, attention=(name,), mixer=dataclasses.replace(switches, chunk=4))


def inputs():
    """(x, context of two documents)."""
    at = np.broadcast_to(np.arange(T), (B, T))
    positions = jnp.asarray(np.where(at < CUT, at, at - CUT))
    context = Context(
        positions, jnp.asarray(np.where(at < CUT, 1, 2)), {4: rope_tables(positions, 4, RopeConfig(theta=100.0))}
    )
    return jax.random.normal(jax.random.key(0), (B, T, MODEL.width)), context


@functools.cache
def outputs(case, dtype=jnp.float32):
    """(cfg with all switches, random parameters, y)."""
    name, cfg = model_of(case)
    module, (x, context) = mixer(name, cfg, dtype), inputs()
    params = jax.eval_shape(module.init, jax.random.key(1), x, context)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), jnp.float32), params)
    y, cache = jax.jit(lambda params, x: module.apply({"params": params}, x, context))(params, x.astype(dtype))
    assert cache is None
    return configured(MIXERS[name], cfg), params, y


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x, scale, axes=-1):
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6) * scale


def turn(x, position, size=4, theta=100.0):
    """Rotary position of one vector's first `size` dimensions."""
    angle = position * theta ** (-np.arange(0, size, 2) / size)
    a, b = x[: size // 2], x[size // 2 : size]
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate([*turned, x[size:]])


def reference(cfg, params, x_TxD):
    """One document, token by token and head by head."""
    m, p = cfg.mixer, jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    H, N, G = cfg.heads, m.householders, m.groups or cfg.heads
    K, V = round(m.expand_k * cfg.head_dim), round(m.expand_v * cfg.head_dim)
    S = p["state"].copy() if m.learned_state else np.zeros((H, K, V))
    x_TxD, ys = np.asarray(x_TxD, np.float64), []

    def features(name, t):
        out = 0
        for w in range(min(m.conv, t + 1)):
            out = out + x_TxD[t - w] @ p[name]["kernel"] * p[f"{name}_conv"]["kernel"][m.conv - 1 - w]
        return out * sigmoid(out)

    def prepared(name, vector, t):
        if m.qk_norm == "l2":
            vector = vector / np.sqrt((vector**2).sum() + 1e-6)
        if m.qk_norm == "rms":
            vector = rms(vector, p[f"{name}_norm"]["scale"])
        return turn(vector, t) if m.rope_fraction else vector

    for t, x in enumerate(x_TxD):
        q, k = features("query", t).reshape(G, K), features("key", t).reshape(G, N, K)
        v = features("value", t).reshape(H, N, V)
        beta = sigmoid(x @ p["beta"]["kernel"]).reshape(H, N) * (2 if m.negative_eigenvalues else 1)
        out = np.zeros((H, V))
        for h in range(H):
            g = h // (H // G)
            if "step_down" in p:
                logits = (x @ p["step_down"]["kernel"] @ p["step"]["kernel"]).reshape(H, K)[h] + p["bias"][h]
                S[h] *= np.exp(-np.exp(p["decay"][h]) * np.log1p(np.exp(logits)))[:, None]
            elif "step" in p:
                logit = (x @ p["step"]["kernel"])[h] + p["bias"][h]
                S[h] *= np.exp(-np.exp(p["decay"][h]) * np.log1p(np.exp(logit)))
            for n in range(N):
                key = prepared("key", k[g, n], t)
                S[h] += beta[h, n] * np.outer(key, v[h, n] - S[h].T @ key)
            out[h] = S[h].T @ prepared("query", q[g], t) * K**-0.5
        gate = 1.0
        if m.gate != "none":
            low = x @ p["gate_down"]["kernel"] if m.gate_rank else x
            logits = (low @ p["gate"]["kernel"]).reshape(H, V)
            gate = sigmoid(logits) * (logits if m.gate == "silu" else 1)
        scale = p["output_norm"]["scale"]
        normed = rms if m.output_norm == "head" else lambda o, s: rms(o, s.reshape(H, V), (0, 1))
        out = normed(out * gate, scale) if m.gate_first else normed(out, scale) * gate
        ys.append(out.reshape(-1) @ p["out"]["kernel"])
    return np.stack(ys)


@pytest.mark.parametrize("case", CASES)
def test_a_mixer_is_its_float64_form(case):
    cfg, params, y = outputs(case)
    x, _ = inputs()
    expected = [np.concatenate([reference(cfg, params, d) for d in (row[:CUT], row[CUT:])]) for row in x]
    np.testing.assert_allclose(y, np.stack(expected), rtol=0, atol=2e-5 * np.abs(expected).max())


def test_decoding_is_the_float64_form_with_all_switches():
    """Prefill with padding behind it, prefill that continues, then single tokens."""
    case = "kda, all switches"
    cfg, params, _ = outputs(case)
    module, (x, context) = mixer(*model_of(case), jnp.float32), inputs()

    @jax.jit
    def extend(x, positions, cache):
        rope = {4: rope_tables(positions, 4, RopeConfig(theta=100.0))}
        return module.apply(
            {"params": params}, x, context.replace(positions=positions, segment_ids=None, rope=rope), cache
        )

    cache, ys, at = module.init_cache(cfg, B, T, jnp.float32), [], 0
    for length, padding in ((4, 1), (5, 0), (1, 0), (1, 0)):
        positions = np.broadcast_to(np.r_[at : at + length, [-1] * padding], (B, length + padding))
        piece = np.pad(x[:, at : at + length], ((0, 0), (0, padding), (0, 0)), constant_values=9.0)
        y, cache = extend(piece, positions, cache)
        ys.append(y[:, :length])
        at += length
    assert at == T
    expected = np.stack([reference(cfg, params, row) for row in x])
    np.testing.assert_allclose(np.concatenate(ys, 1), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_switches_of_one_case_are_all_that_there_are():
    has = {name for name, value in vars(MIXERS["kda"].defaults).items() if value is not None}
    assert {name for name, value in vars(CASES["kda, all switches"][1]).items() if value is not None} | {
        "chunk",
        "implementation",
    } == has


def test_half_precision_keeps_gates_and_states_in_float32():
    _, params, exact = outputs("kda")
    _, _, rounded = outputs("kda", jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rounded, np.float32) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05
    name, cfg = model_of("kda")
    _, context = inputs()
    module = MIXERS[name].mixer(configured(MIXERS[name], cfg), jnp.bfloat16)
    cache = module.init_cache(module.cfg, B, T, jnp.bfloat16)
    assert {a.dtype for a in cache.values()} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    x = jnp.zeros((B, T, MODEL.width), jnp.bfloat16)
    decode = lambda: module.apply({"params": params}, x, context.replace(segment_ids=None), cache)[1]  # noqa: E731
    new = jax.eval_shape(decode)
    assert {k: (a.shape, a.dtype) for k, a in new.items()} == {k: (a.shape, a.dtype) for k, a in cache.items()}


def test_decays_begin_as_published():
    """exp(decay) uniform in (0.01, 16) or (1, 16), softplus(bias) log-uniform in (0.001, 0.1)."""
    for name, low in (("gated_delta", 0.01), ("kda", 1.0)):
        module, (x, context) = mixer(name, dataclasses.replace(MODEL, heads=512, head_dim=2), jnp.float32), inputs()

        @jax.jit  # which leaves out all that is not returned
        def init(key, module=module, x=x, context=context):
            params = module.init(key, x, context)["params"]
            return params["decay"], params["bias"]

        decay, bias = init(jax.random.key(0))
        rates, steps = np.exp(decay), np.log1p(np.exp(bias))
        assert low <= rates.min() < low + 0.3
        assert 15.7 < rates.max() <= 16
        assert abs(rates.mean() - (low + 16) / 2) < 1
        assert 0.00099 < steps.min() < 0.0011
        assert 0.09 < steps.max() < 0.101
        assert abs(np.log10(steps).mean() + 2) < 0.1


def test_parameters_are_as_many_as_published_and_have_one_rule_each():
    """In multiples of D^2: 4 of attention without a gate, 6 of fla with one, more for N keys and values."""
    D = 512
    small = {"delta": 0.05, "gated_delta": 0.1, "gated_delta_negative": 0.1, "delta_product": 0.1, "kda": 0.6}
    large = {"delta": 4, "gated_delta": 6, "gated_delta_negative": 6, "delta_product": 8.25, "kda": 4}
    for name in ROWS:
        cfg = ModelConfig(vocab_size=1, width=D, heads=8, layers=1, mlp="none", attention=(name,))
        mixing = parameter_counts(cfg)["blocks"] / D**2
        assert large[name] < mixing < large[name] + small[name], name
        params = jax.eval_shape(Transformer(cfg).init, jax.random.key(0))
        for rule_set in (rules.DECAY, rules.SHARDING):
            rules.assign(rule_set, params)
        kinds = dict(zip(rules.paths(params), jax.tree.leaves(rules.assign(rules.MUON, params)), strict=True))
        assert {p.split("/")[3] for p, kind in kinds.items() if "_conv" in p and kind == "adamw"} == {
            "query_conv",
            "key_conv",
            "value_conv",
        }


def test_hybrids_are_three_recurrent_layers_to_one_exact():
    for name, linear, exact in (
        ("qwen3_next", "gated_delta", "gated_softmax"),
        ("olmo_hybrid", "gated_delta_negative", "softmax"),
    ):
        cfg = dataclasses.replace(MODEL, attention=(name,), layers=8)
        assert layer_pattern(cfg) == (linear, linear, linear, exact)
        cache = jax.eval_shape(functools.partial(Transformer(cfg).init_cache, 1, 5))
        assert ["key" in cache["blocks"][str(i)] for i in range(4)] == [False, False, False, True]


def test_what_cannot_be_is_one_clear_error():
    x, context = inputs()
    for switches, words in (
        (MixerConfig(groups=3), r"model\.mixer\.groups = 3 must divide model\.heads = 2"),
        (MixerConfig(implementation="cudnn"), r"implementation = cudnn: a backend of softmax attention"),
    ):
        module = mixer("gated_delta", dataclasses.replace(MODEL, mixer=switches), jnp.float32)
        with pytest.raises(ConfigError, match=words):
            jax.eval_shape(module.init, jax.random.key(0), x, context)
