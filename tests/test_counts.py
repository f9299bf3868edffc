"""Counting products, and models of equal size."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from slm.attention import state_bytes
from slm.config import ModelConfig
from slm.errors import ConfigError
from slm.models.counts import cache_bytes, parameter_counts, product_flops, with_parameters

X = jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 8**3


def test_products_are_counted_wherever_they_hide():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=10)[0]

    assert product_flops(loop, X) == 10 * PRODUCT
    assert product_flops(jax.jit(jax.checkpoint(lambda x: x @ x)), X) == PRODUCT
    assert product_flops(jax.vmap(lambda x: x @ x), jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)) == 3 * PRODUCT
    assert product_flops(lambda x: jax.lax.cond(x[0, 0] > 0, loop, lambda x: x @ x, x), X) == 10 * PRODUCT
    # Forward, and one product for each of two operands.
    assert product_flops(jax.grad(lambda x: jnp.sin(x @ x).sum()), X) == 3 * PRODUCT
    assert product_flops(lambda x: x + 1, X) == 0


def test_a_model_gets_the_parameters_of_another():
    small = ModelConfig(vocab_size=64, layers=2, width=32)
    for cfg in (small, dataclasses.replace(small, attention=("window",), kv_heads=1)):
        matched = with_parameters(cfg, 40_000, multiple=4)
        assert abs(parameter_counts(matched)["total"] - 40_000) <= 400
        assert matched.mlp_width % 4 == 0
        assert dataclasses.replace(matched, mlp_width=None) == cfg


@pytest.mark.parametrize(("changes", "total", "message"), [
    ({}, 5_000, "no mlp_width gives .* softmax 5,000 parameters: the nearest is 8"),
    ({"mlp": "none"}, 40_000, "model.mlp = none"),
])  # fmt: skip
def test_sizes_that_cannot_be(changes, total, message):
    with pytest.raises(ConfigError, match=message):
        with_parameters(ModelConfig(vocab_size=64, layers=2, width=32, **changes), total)


def test_state_bytes_count_every_array_in_its_own_type():
    cache = {"key": jnp.zeros((2, 3), jnp.bfloat16), "positions": jnp.zeros((2,), jnp.int32)}
    assert state_bytes(cache) == 2 * 6 + 4 * 2
    assert state_bytes(jax.eval_shape(lambda: cache)) == 20
    # one layer of 16 slots: keys and values of 2 heads of 16 in bfloat16, and positions
    cfg = ModelConfig(vocab_size=8, layers=3, width=32, heads=2)
    assert cache_bytes(cfg, 5, 16) == 3 * 5 * 16 * (2 * 2 * 16 * 2 + 4)
