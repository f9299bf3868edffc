"""RWKV-6's recurrence, and RWKV mixers against numpy float64 forms of the whole mixer, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import rwkv6_attention
from slm.config import MixerConfig, ModelConfig
from slm.models.mixers import Context, mixer
from slm.models.mixers.rwkv import published_rank
from slm.models.transformer import Transformer
from slm.training import rules

# The recurrence.

B, T, H, K, V, CUT = 2, 11, 2, 4, 3, 6  # the second document begins inside a chunk


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    shapes = {
        "q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "log_decay": (B, T, H, K), "bonus": (H, K),
        "initial_state": (B, H, K, V), "reset_state": (H, K, V),
    }  # fmt: skip
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return values | {"log_decay": -np.exp(1.5 * values["log_decay"])}


SEGMENTS = np.broadcast_to(np.where(np.arange(T) < CUT, 4, 2), (B, T))


def reference_attention(q, k, v, log_decay, bonus, initial_state, reset_state):
    """(out, final state) by the definition."""
    out, state = np.zeros((B, T, H, V)), initial_state.copy()
    for t in range(T):
        if t == CUT:
            state = np.broadcast_to(reset_state, state.shape)
        new = k[:, t, :, :, None] * v[:, t, :, None]
        out[:, t] = K**-0.5 * (q[:, t, :, :, None] * (state + bonus[..., None] * new)).sum(2)
        state = np.exp(log_decay[:, t])[..., None] * state + new
    return out, state


@functools.cache
def attention(form):
    """Jitted (arrays, cotangents of out and state) -> (outputs, gradients)."""

    def run(values, cotangents):
        f = lambda values: rwkv6_attention(**values, form=form, chunk=4, segment_ids=SEGMENTS)  # noqa: E731
        outputs, pull = jax.vjp(f, values)
        return outputs, pull(cotangents)[0]

    return jax.jit(run)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_rwkv6_attention_is_its_float64_definition_and_so_are_its_gradients(form):
    rng = np.random.default_rng(1)
    cotangents = (rng.normal(size=(B, T, H, V)), rng.normal(size=(B, H, K, V)))
    to_float32 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    outputs, grads = attention(form)(to_float32(arrays()), to_float32(cotangents))
    for actual, expected in zip(outputs, reference_attention(**arrays()), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    def scalar(values):
        return sum((a * b).sum() for a, b in zip(reference_attention(**values), cotangents, strict=True))

    for name, value in arrays().items():
        directions = rng.normal(size=(4, *value.shape))
        slopes = [
            (scalar(arrays() | {name: value + 1e-5 * d}) - scalar(arrays() | {name: value - 1e-5 * d})) / 2e-5
            for d in directions
        ]
        actual = (np.asarray(grads[name]) * directions).reshape(4, -1).sum(1)
        np.testing.assert_allclose(actual, slopes, rtol=0, atol=5e-5 * np.abs(slopes).max(), err_msg=name)


def test_rwkv6_attention_refuses_shapes_that_do_not_agree():
    values = arrays() | {"bonus": np.zeros((H, K + 1))}
    with pytest.raises(ValueError, match=r"shapes do not agree: .* bonus \(2, 5\); expected"):
        rwkv6_attention(**values)


# The mixers.

SWITCHES = MixerConfig(rank=3, learned_state=True, expand_v=1.5, chunk=4)
MODEL = ModelConfig(vocab_size=7, width=12, heads=2, head_dim=4, layers=3, init_std=0.5, mixer=SWITCHES)


@functools.cache
def inputs():
    at = np.broadcast_to(np.arange(T), (B, T))
    context = Context(jnp.asarray(np.where(at < CUT, at, at - CUT)), jnp.asarray(SEGMENTS), {}, 1)
    return jax.random.normal(jax.random.key(0), (B, T, MODEL.width)), context


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def low_rank(p, x, activation):
    return activation(x @ p["low"]["kernel"]) @ p["up"]["kernel"]


def head_norm(p, out, eps):
    centred = out - out.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def rwkv7_token(p, x, change, S):
    """(what the projection `out` reads, new state) of one token, with the state as the paper lays it out: (H, V, K)."""
    xs = [x + change * mix for mix in p["mix"]]
    r, k = ((xs[i] @ p[name]["kernel"]).reshape(2, 4) for i, name in ((0, "query"), (2, "key")))
    v = (xs[3] @ p["value"]["kernel"]).reshape(2, 6)
    w = np.exp(-np.exp(-0.5) * sigmoid(p["decay"] + low_rank(p["decay_low_rank"], xs[1], np.tanh).reshape(2, 4)))
    a = sigmoid(p["bias"] + low_rank(p["rate_low_rank"], xs[4], lambda x: x).reshape(2, 4))
    g = low_rank(p["gate_low_rank"], xs[5], sigmoid).reshape(2, 6)
    kappa = k * p["removal"]
    kappa /= np.sqrt((kappa**2).sum(-1, keepdims=True))
    k = k * (1 - p["replacement"] + p["replacement"] * a)  # lerp(1, a, replacement)
    out, new = np.zeros((2, 6)), np.zeros_like(S)
    for h in range(2):
        transition = np.diag(w[h]) - np.outer(kappa[h], a[h] * kappa[h])
        new[h] = S[h] @ transition + np.outer(v[h], k[h])
        out[h] = new[h] @ r[h]
    out = head_norm(p["output_norm"], out, 6e-5) + (r * k * p["bonus"]).sum(-1, keepdims=True) * v
    return out * g, new


def rwkv6_token(p, x, change, S):
    low = np.tanh((x + change * p["mix"][0]) @ p["mix_low"]["kernel"])
    xs = {
        name: x + change * (p["mix"][i + 1] + low[3 * i : 3 * i + 3] @ p[f"{name}_mix"]["kernel"])
        for i, name in enumerate(["decay", "key", "value", "query", "gate"])
    }
    r, k, v, g = ((xs[name] @ p[name]["kernel"]).reshape(2, -1) for name in ("query", "key", "value", "gate"))
    w = np.exp(-np.exp(p["decay"] + low_rank(p["decay_low_rank"], xs["decay"], np.tanh).reshape(2, 4)))
    out, new = np.zeros((2, 6)), np.zeros_like(S)
    for h in range(2):
        write = np.outer(v[h], k[h])
        out[h] = (S[h] + write * p["bonus"][h]) @ r[h]
        new[h] = S[h] * w[h] + write
    return head_norm(p["output_norm"], out, 6e-5) * g * sigmoid(g), new


@pytest.mark.parametrize(("name", "token"), [("rwkv7", rwkv7_token), ("rwkv6", rwkv6_token)])
def test_a_mixer_is_its_float64_form(name, token):
    module, (x, context) = mixer(name, MODEL, jnp.float32), inputs()
    params = jax.eval_shape(module.init, jax.random.key(1), x, context)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), jnp.float32), params)
    y, cache = jax.jit(lambda params, x: module.apply({"params": params}, x, context))(params, x)
    assert cache is None
    p, expected = jax.tree.map(lambda a: np.asarray(a, np.float64), params), np.zeros((B, T, MODEL.width))
    for b, t in np.ndindex(B, T):
        if t in (0, CUT):
            before, S = np.zeros(MODEL.width), p["state"].swapaxes(1, 2)
        now = np.asarray(x[b, t], np.float64)
        out, S = token(p, now, before - now, S)
        expected[b, t], before = out.reshape(-1) @ p["out"]["kernel"], now
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


LEAVES = ("mix", "decay", "bias", "removal", "replacement", "bonus", "output_norm", "decay_low_rank")


def test_parameters_begin_as_in_rwkv_lm():
    """In each layer, by the loops of that code."""
    C, N, L = MODEL.width, 6, 3
    for name in ("rwkv7", "rwkv6"):
        cfg = ModelConfig(vocab_size=1, width=C, heads=2, layers=L, mlp="none", attention=(name,))
        for rule_set in (rules.DECAY, rules.MUON, rules.SHARDING):
            rules.assign(rule_set, jax.eval_shape(Transformer(cfg).init, jax.random.key(0)))

        @jax.jit  # which leaves out what is not returned
        def init(key, cfg=cfg):
            mixing = Transformer(cfg).init(key)["blocks"]["0"]["mixer"]
            return {name: leaf for name, leaf in mixing.items() if name in LEAVES}

        stacked = init(jax.random.key(0))
        for layer in range(L):
            p = jax.tree.map(lambda a, i=layer: np.asarray(a)[i], stacked)
            deep, shallow = layer / (L - 1), 1 - layer / L
            assert all((leaf == 0).all() for leaf in (p["decay_low_rank"]["low"]["kernel"], p["output_norm"]["bias"]))
            scale = ((layer + 1) / L) ** 0.7 if name == "rwkv7" else 1
            np.testing.assert_allclose(p["output_norm"]["scale"], np.full((2, N), scale), rtol=1e-6)
            for n in range(C):
                h, i = divmod(n, N)
                zigzag = (i - (N - 1) / 2) / ((N - 1) / 2)
                zigzag *= abs(zigzag)
                linear, power = n / (C - 1) - 0.5, lambda e, n=n: 1 - (n / C) ** e
                if name == "rwkv7":
                    mix = [power(e * shallow) for e in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)]
                    expected = {
                        "decay": -6 + 6 * (n / (C - 1)) ** (1 + deep**0.3) + 0.5 + zigzag * 2.5,
                        "bias": -0.19 + zigzag * 0.3 + linear * 0.4,
                        "removal": 0.71 - linear * 0.1,
                        "replacement": 1.02,
                        "bonus": -0.04,
                    }
                else:
                    mix = [power(e * shallow) for e in (1, 1, 1, 1, 0.5, 0.5)]
                    mix[3] -= 0.3 * deep
                    expected = {
                        "decay": -6 + 5 * (n / (C - 1)) ** (0.7 + 1.3 * deep),
                        "bonus": deep * (1 - n / (C - 1)) + ((n + 1) % 3 - 1) * 0.1,
                    }
                np.testing.assert_allclose(p["mix"][:, n], mix, atol=1e-6)
                for leaf, value in expected.items():
                    np.testing.assert_allclose(p[leaf][h, i], value, atol=1e-5, err_msg=leaf)
    assert [published_rank(1024, f) for f in (2.5, 5.0)] == [64, 160]
    assert published_rank(16, 2.5) == 32
