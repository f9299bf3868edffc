"""Products of layers in float8 against numpy's; which products they are, and what a trained run is, in test_step.py."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from slm.config import Experiment, check, override
from slm.errors import ConfigError
from slm.models.float8 import BACKWARD, FORWARD, float8, float8_product
from slm.models.transformer import Transformer
from slm.training import precision


def rounded(x, dtype):
    """x on the grid of `dtype` with its largest element at the grid's end, by numpy."""
    scale = np.abs(x).max() / np.float32(ml_dtypes.finfo(dtype).max)
    return (x / scale).astype(dtype).astype(np.float32) * scale


def test_runs_in_one_program_have_scales_of_their_own():
    x, w = jax.random.normal(jax.random.key(0), (2, 3, 8)) * jnp.array([1, 1e-12])[:, None, None], jnp.ones((2, 8, 4))
    together = jax.vmap(float8_product)(x, w)
    np.testing.assert_allclose(together, [float8_product(*one) for one in zip(x, w, strict=True)], rtol=1e-6)
    assert np.abs(together[1]).min() > 0


def test_a_product_and_its_gradients_are_those_of_rounded_tensors():
    rng = np.random.default_rng(0)
    sizes = {(24, 64): 1, (64, 16): 1e-3, (24, 16): 1e-6}  # far from 1, where nothing would be left without scales
    x, w, d = (rng.normal(scale=size, size=shape).astype(np.float32) for shape, size in sizes.items())
    out, pull_back = jax.vjp(float8_product, x, w)
    d_x, d_w = pull_back(d)
    x8, w8, d8 = rounded(x, FORWARD), rounded(w, FORWARD), rounded(d, BACKWARD)
    for ours, theirs, exact in ((out, x8 @ w8, x @ w), (d_x, d8 @ w8.T, d @ w.T), (d_w, x8.T @ d8, x.T @ d)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
        # Rounding errs by up to 1/16 of a number in E4M3, 1/8 in E5M2; on average by less.
        assert 0.01 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 0.125


@pytest.mark.parametrize(("dtype", "largest", "between"), [(FORWARD, 448, 8), (BACKWARD, 57344, 4)])
def test_codes_fill_the_format(dtype, largest, between):
    x = np.geomspace(1e-9, 3e-3, 4000, dtype=np.float32)
    codes, scale = float8(x, dtype)
    codes = np.asarray(codes).astype(np.float32)
    assert codes[-1] == codes.max() == largest
    np.testing.assert_allclose(scale, 3e-3 / largest, rtol=1e-6)
    assert ((np.unique(codes) >= 32) & (np.unique(codes) < 64)).sum() == between  # 2^(bits of the mantissa)


def test_zeros_stay_zero_and_an_overflow_is_seen():
    for x in (jnp.zeros((2, 3)), jnp.zeros((0, 3)), jnp.full((2, 3), 1e-38)):
        out = float8_product(x, jnp.ones((3, 4)))
        assert out.shape == (len(x), 4)
        assert np.all(np.abs(out) < 1e-30)
    for bad in (jnp.inf, jnp.nan):
        assert not np.isfinite(float8_product(jnp.ones((2, 3)).at[0, 0].set(bad), jnp.ones((3, 4)))).any()


# A convolution's filter is called kernel too; `forget` is a layer that computes in float32.
@pytest.mark.parametrize(("mechanism", "products"), [("softmax", 7), ("short_conv", 7), ("mla", 9), ("forgetting", 7)])
def test_marked_kernels_serve_every_layer(mechanism, products):
    shape = Experiment().model
    shape = override(Experiment(), {"model.attention": (mechanism,), "model.vocab_size": 31, "model.layers": 1,
                                    "model.width": 32, "model.heads": 2}).model  # fmt: skip
    model = Transformer(shape, jnp.bfloat16)

    def loss(params):
        view = precision.cast(precision.float8_kernels(params), jnp.bfloat16)
        return model.hidden(view, jnp.zeros((1, 8), jnp.int32))[0].astype(jnp.float32).sum()

    params = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(jax.eval_shape(jax.grad(loss), params)) == jax.tree.structure(params)
    text = str(jax.make_jaxpr(loss)(params))
    assert text.count("name=float8_product") == products


def test_fp8_with_rounded_weights_is_refused():
    with pytest.raises(ConfigError, match=r"train.precision = fp8 with quantize.scheme = int4: .*= bfloat16"):
        check(override(Experiment(), {"train.precision": "fp8", "quantize.scheme": "int4"}))
