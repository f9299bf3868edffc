"""Mixers over mask patterns. What holds of every mixer is in test_invariants.py; here are patterns that bite sooner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import state_bytes
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.mixers import HYBRIDS, MIXERS, configured
from slm.models.mixers.sparse import ROWS
from slm.models.transformer import Transformer

T, CUT = 75, 41  # two blocks, the second document beginning in the first
PATTERNS = {
    "window(9) | global_tokens(3) | chunked(7)": 3 + 9,
    "fixed(12, 3) | random_blocks(1, 8)": T,
    "~window(4) & window(20)": 20,  # the first tokens see nothing
}


def model_of(mixer="sparse", **switches):
    return Transformer(
        ModelConfig(
            vocab_size=40, layers=2, width=16, heads=4, kv_heads=2, init_std=0.2, attention=(mixer,),
            mixer=MixerConfig(**switches),
        )
    )  # fmt: skip


def settings(mixer, **switches):
    return configured(MIXERS[mixer], model_of(mixer, **switches).cfg)


@functools.cache
def parameters():
    return jax.jit(model_of(pattern="causal").init)(jax.random.key(0))


@functools.cache
def tokens():
    return jax.random.randint(jax.random.key(1), (1, T), 0, 40)


def hidden(params, tokens, model, **rows):
    return np.asarray(jax.jit(lambda params, tokens: model.hidden(params, tokens, **rows)[0][0])(params, tokens))


@functools.cache
def forward(pattern):
    return hidden(parameters(), tokens(), model_of(pattern=pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_are_what_each_is_alone(pattern):
    at = np.arange(T)[None]
    rows = {"segment_ids": np.where(at < CUT, 1, 2), "positions": np.where(at < CUT, at, at - CUT)}
    model = model_of(pattern=pattern)
    packed = hidden(parameters(), tokens(), model, **rows)
    alone = hidden(parameters(), tokens()[:, CUT:], model)
    np.testing.assert_allclose(packed[CUT:], alone, atol=5e-5)
    np.testing.assert_allclose(packed[:CUT], forward(pattern)[:CUT], atol=5e-5)
    assert np.abs(packed[CUT:] - forward(pattern)[CUT:]).max() > 1e-2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_equals_the_forward_pass_with_no_more_cache_than_the_pattern_reaches(pattern):
    model, params, outs, at = model_of(pattern=pattern), parameters(), [], 0
    cache = model.init_cache(1, T)
    assert cache["blocks"]["0"]["key"].shape[2] == PATTERNS[pattern]

    @jax.jit
    def extend(piece, start, cache):
        return model.hidden(params, piece, positions=start + jnp.arange(piece.shape[1])[None], cache=cache)

    for length in (30, 25, *[1] * 20):
        out, cache = extend(tokens()[:, at : at + length], at, cache)
        outs.append(out[0])
        at += length
    np.testing.assert_allclose(np.concatenate(outs), forward(pattern), atol=5e-5)


def test_each_pattern_is_another_model():
    outs = [forward(pattern) for pattern in PATTERNS]
    outs += [forward("window(9)"), forward("full")]
    for n, one in enumerate(outs):
        assert all(np.abs(one - other).max() > 1e-2 for other in outs[:n])


@pytest.mark.parametrize("switches", [{"qk_norm": "l2", "softcap": 0.1}, {"gate": "sigmoid", "rope_fraction": 0.0}])
def test_switches_are_those_of_softmax(switches):
    sparse, dense, plain = model_of(pattern="full", **switches), model_of("softmax", **switches), model_of("softmax")
    params = parameters_like(dense)
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(sparse.init, jax.random.key(0)))
    expected = hidden(params, tokens(), dense)
    np.testing.assert_allclose(hidden(params, tokens(), sparse), expected, atol=1e-4)
    if "gate" not in switches:
        assert np.abs(hidden(parameters_like(plain), tokens(), plain) - expected).max() > 1e-2


def parameters_like(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), shapes)


def test_wrong_patterns_and_backends_are_named():
    def start(**switches):
        jax.eval_shape(model_of(**switches).init, jax.random.key(0))

    with pytest.raises(ConfigError, match=r"model\.mixer\.pattern: .*did you mean window"):
        start(pattern="windw(3)")
    with pytest.raises(ConfigError, match=r"model\.mixer\.pattern: .*at least 1"):
        start(pattern="window(0)")
    cfg = settings("sparse", implementation="cudnn")
    with pytest.raises(ConfigError, match=r"model\.mixer\.implementation = cudnn"):
        MIXERS["sparse"].mixer.backend(cfg, 128, jnp.float32, "gpu", False)


def test_backend_tells_the_share_of_blocks():
    cfg = settings("sparse", pattern="window(65)")  # 2 of N blocks, N (N + 1) / 2 of causal attention
    mixer = MIXERS["sparse"].mixer
    assert mixer.backend(cfg, 64 * 9, jnp.float32, "cpu", False) == "xla, 38% of the causal blocks"
    assert mixer.backend(settings("fixed_pattern"), 1024, jnp.float32, "cpu", True).startswith("xla, 100%")


def test_flops_count_visible_pairs():
    mixer = MIXERS["sparse"].mixer
    length, per_pair = 300, 4 * 16
    window, full = (settings("sparse", pattern=pattern) for pattern in ("window(9)", "full"))
    assert mixer.flops_per_token(window, length) == pytest.approx(per_pair * (9 - 36 / length))
    assert mixer.flops_per_token(full, length) == pytest.approx(per_pair * (length + 1) / 2)


def test_defaults_reach_and_cache_what_they_say():
    slots = {"sparse": 132, "local_blocks": 128, "dilated": 253, "longformer": 257, "chunked_local": 256}
    for mixer in ROWS:
        cache = jax.eval_shape(lambda m=mixer: model_of(m).init_cache(1, 1000))
        per_slot = 2 * (2 * 2 * 4 * 4 + 4)  # layers; keys and values of two heads of four float32, and a position
        assert state_bytes(cache) == per_slot * slots.get(mixer, 1000), mixer
    assert set(HYBRIDS["llama4"]) == {"chunked_local", "nope_softmax"}
