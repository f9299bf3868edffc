"""What attention remembers, in int8: against the numbers that were stored, and in every mechanism that can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import state_bytes
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.mixers import MIXERS
from slm.models.mixers.cache import empty_slots, remember, store
from slm.models.transformer import Transformer

B, T, G, K = 2, 12, 2, 16
SERVED = [name for name, row in MIXERS.items() if row.mixer.int8_cache]
REFUSED = [name for name, row in MIXERS.items() if row.mixer.int8_cache is False]


def transformer(*attention, **switches):
    model = ModelConfig(
        vocab_size=31,
        width=32,
        layers=len(attention),
        heads=4,
        kv_heads=2,
        attention=attention,
        mixer=MixerConfig(**switches),
    )
    return Transformer(model)


def logits(model, cache_dtype, pieces):
    """Of all of `T` tokens, read through the cache in pieces of these lengths."""
    params = model.init(jax.random.key(0))
    params = jax.tree.map(lambda a: 3 * a, params)  # so that attention is not nearly uniform
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 31)
    cache, out, start = model.init_cache(B, T, cache_dtype), [], 0
    step = jax.jit(lambda cache, tokens, at: model.hidden(params, tokens, positions=at, cache=cache))
    for length in pieces:
        at = jnp.broadcast_to(jnp.arange(start, start + length), (B, length))
        hidden, cache = step(cache, tokens[:, start : start + length], at)
        out.append(model.logits(params, hidden))
        start += length
    return np.concatenate(out, 1), cache


def test_integers_are_the_nearest_ones_to_what_was_stored():
    rng = np.random.default_rng(0)
    key = rng.normal(size=(B, T, G, K)) * np.exp(rng.normal(size=(B, T, G, 1)) * 3)
    key[0, 3, 1] = 0  # no scale at all
    at = jnp.broadcast_to(jnp.arange(T), (B, T))
    cache = store(empty_slots(B, T, jnp.int8, key=(G, K)), {"key": jnp.asarray(key), "positions": at})
    assert cache["key"].dtype == jnp.int8
    np.testing.assert_array_equal(np.abs(cache["key"]).max(-1)[np.abs(key).max(-1) > 0], 127)
    seen, _ = remember(cache, {"key": jnp.asarray(key[:, -1:]), "positions": at[:, -1:]})
    assert set(seen) == {"key", "positions"}
    half_a_step = np.abs(key).max(-1, keepdims=True) / 127 / 2
    assert (np.abs(seen["key"] - key) <= half_a_step * 1.001).all()
    assert (np.asarray(seen["key"])[0, 3, 1] == 0).all()


@pytest.mark.parametrize("name", SERVED)
def test_every_mechanism_that_can_decodes_nearly_the_same(name):
    model = transformer(name)
    full, _ = logits(model, None, (8, 4))
    eight, cache = logits(model, jnp.int8, (8, 4))
    assert cache["blocks"]["0"]["key"].dtype == jnp.int8
    error = np.sqrt(np.square(eight - full).mean() / np.square(full).mean())
    assert 1e-5 < error < 0.02


def test_a_window_keeps_what_early_tokens_of_a_call_still_see():
    model = transformer("window", window=4)
    whole, _ = logits(model, jnp.int8, (T,))
    one_by_one, _ = logits(model, jnp.int8, (1,) * T)
    np.testing.assert_allclose(whole, one_by_one, atol=2e-5 * np.abs(whole).max())


def test_only_keys_and_values_become_integers():
    hybrid = transformer("gated_delta", "softmax", conv=4)
    cache = hybrid.init_cache(1, 64, jnp.int8)
    dtypes = {name: a.dtype.name for layer in cache["blocks"].values() for name, a in layer.items()}
    assert dtypes.pop("key") == dtypes.pop("value") == "int8"
    assert set(dtypes.values()) == {"float32", "int32"}
    # A token costs G (K + V) bytes and 2 G scales; half of bfloat16 but for those.
    small, large = (state_bytes(transformer("softmax").init_cache(1, length, jnp.int8)) for length in (64, 65))
    assert large - small == 2 * (8 + 8) + 2 * 2 * 4 + 4


@pytest.mark.parametrize(
    ("dtype", "message"), [("int4x", "no such dtype"), ("int32", "need float32, bfloat16 or int8")]
)
def test_another_dtype_is_refused(dtype, message):
    with pytest.raises(ConfigError, match=f"cache_dtype = {dtype}.*{message}" if dtype == "int32" else message):
        transformer("softmax").init_cache(1, 8, dtype)


@pytest.mark.parametrize("name", REFUSED)
def test_a_mechanism_that_cannot_says_so(name):
    with pytest.raises(ConfigError, match=f"cache_dtype = int8: layers of {name} cannot"):
        transformer(name).init_cache(1, 128, jnp.int8)
