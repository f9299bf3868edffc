"""Grids of a few bits against their definitions in float64, against GGUF's own quantizers, and packed bit for bit."""

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from slm.compress.schemes import Scheme
from slm.errors import ConfigError
from slm.models.quantized import GRIDS, NF4, pack, unpack
from slm.models.quantized_products import rounded_inputs

CASES = [
    Scheme(name, group, symmetric)
    for name in GRIDS
    for group in (None, 8)
    for symmetric in ((True, False) if name in ("int8", "int4", "int3", "int2") else (True,))
]
IDS = [f"{s.name}-{s.group_size}-{'sym' if s.symmetric else 'asym'}" for s in CASES]


def weights(inputs=-2, seed=0):
    """Of sizes from 0.1 to 30, with a group and a whole output of zeros."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, 24, 7)) * rng.choice([0.1, 1, 30], size=(3, 1, 7))
    w[0, :, 0] = w[1, 8:16] = 0
    w = w if inputs == -2 else w.swapaxes(1, 2)
    return jnp.asarray(w, jnp.float32)


def nearest(w, scale, zero, scheme):
    """The nearest of all points of the grid, found by looking at each, float64."""
    if scheme.name == "nf4":
        points = np.array(NF4)
    elif scheme.name == "fp8":
        points = np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        points = points[np.isfinite(points)]
    elif scheme.symmetric:
        points = np.arange(GRIDS[scheme.name].low, GRIDS[scheme.name].high + 1)
    else:
        points = np.arange({"int8": 256, "int4": 16, "int3": 8, "int2": 4}[scheme.name])
    restored = points * scale[..., None] + (0 if zero is None else zero[..., None])
    return np.abs(restored - w[..., None]).min(-1)


def spread(a, like):
    return None if a is None else np.repeat(np.asarray(a, np.float64), like.shape[-2] // a.shape[-2], -2)


@pytest.mark.parametrize("scheme", CASES, ids=IDS)
def test_weights_go_to_the_nearest_point_of_the_grid(scheme):
    w = weights()
    scale, zero = scheme.fit(w)
    error = np.abs(np.asarray(scheme.fake(w), np.float64) - w)
    least = nearest(np.asarray(w, np.float64), spread(scale, w), spread(zero, w), scheme)
    np.testing.assert_allclose(error, np.broadcast_to(least, error.shape), rtol=1e-4, atol=2e-5)
    if zero is None:
        assert not np.asarray(scheme.fake(w))[np.asarray(w) == 0].any()


@pytest.mark.parametrize("inputs", [-2, -1])
@pytest.mark.parametrize("scheme", CASES, ids=IDS)
def test_what_is_packed_restores_to_the_fake_weights_bit_for_bit(scheme, inputs):
    w = weights(inputs)[0]
    fake = np.asarray(scheme.fake(w, inputs=inputs))
    jitted = jax.jit(lambda w: scheme.fake(w, inputs=inputs))(w)
    packed = scheme.pack(w, inputs=inputs)
    again = jax.jit(lambda w: scheme.pack(w, inputs=inputs).astype(jnp.float32))(w)
    for found in (jitted, packed.astype(jnp.float32), again, jax.jit(lambda m: m.astype(jnp.float32))(packed)):
        np.testing.assert_array_equal(found, fake)
    assert packed.shape == w.shape
    if scheme.name != "ternary":  # whose mean is another one then
        np.testing.assert_array_equal(scheme.fake(jnp.asarray(fake), inputs=inputs), fake)
    scale, zero = scheme.fit(w, inputs)
    scale = scale * 1.01
    given = scheme.pack(w, scale, zero, inputs)
    np.testing.assert_array_equal(given.astype(jnp.float32), scheme.fake(w, scale, zero, inputs))


@pytest.mark.parametrize("scheme", CASES, ids=IDS)
def test_scales_are_those_of_the_conventions(scheme):
    """Each layer, output and group by itself, in float64."""
    w = np.asarray(weights(), np.float64)
    scale, zero = scheme.fit(jnp.asarray(w, jnp.float32))
    parts = w.reshape(3, -1, scheme.group_size or 24, 7)
    absolute = np.abs(parts).max(2)
    top = np.take_along_axis(parts, np.abs(parts).argmax(2)[:, :, None], 2)[:, :, 0]
    if scheme.name == "ternary":
        want = np.abs(parts).mean(2) if scheme.group_size else np.abs(w).mean((1, 2), keepdims=True)
    elif not scheme.symmetric:
        want = (parts.max(2) - parts.min(2)) / {"int8": 255, "int4": 15, "int3": 7, "int2": 3}[scheme.name]
        np.testing.assert_allclose(zero, parts.min(2), rtol=1e-3)
    else:
        of = {"int8": absolute / 127, "int4": top / -8, "int3": top / -4, "int2": top / -2, "nf4": absolute}
        want = (of | {"fp8": absolute / 448})[scheme.name]
    np.testing.assert_allclose(scale, want, rtol=1e-3 if scheme.group_size else 2e-5)


def test_scaled_weights_have_the_same_codes_and_channels_err_less_than_tensors():
    w = weights(seed=1)
    for scheme in CASES:
        np.testing.assert_array_equal(
            scheme.codes(w, *scheme.fit(w)), scheme.codes(w * 4, *scheme.fit(w * 4)), err_msg=str(scheme)
        )
    whole = Scheme("int8")
    per_tensor = whole.fake(w.reshape(3, -1, 1)).reshape(w.shape)
    assert jnp.square(whole.fake(w) - w).sum() < jnp.square(per_tensor - w).sum()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 13])
def test_codes_lie_in_the_bytes_where_the_docstring_says(bits, size):
    codes = np.random.default_rng(size).integers(0, 2**bits, (2, size, 5)).astype(np.uint8)
    for axis in (-2, -1):
        given = codes if axis == -2 else codes.swapaxes(1, 2)
        packed = np.asarray(pack(jnp.asarray(given), bits, axis))
        count, there = 8 // bits, np.moveaxis(packed, axis, 0)
        assert there.shape[0] == -(-size // count)
        for n in range(size):
            part, byte = divmod(n, there.shape[0])
            np.testing.assert_array_equal(
                (there[byte] >> (bits * part)) & (2**bits - 1), np.moveaxis(given, axis, 0)[n]
            )
        np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits, axis, size), given)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [(Scheme("int4", 32), "Q4_0"), (Scheme("int4", 32, False), "Q4_1"), (Scheme("int8", 32), "Q8_0")],
)
def test_a_gguf_file_already_lies_on_the_grid(scheme, kind):
    """Weights that the gguf package has quantized pass unchanged: same groups, levels and float16 scales (Q5)."""
    w = np.random.default_rng(3).normal(size=(10, 96)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    theirs = jnp.asarray(gguf.quants.dequantize(gguf.quants.quantize(w, number), number))
    np.testing.assert_array_equal(scheme.fake(theirs, inputs=-1), theirs)
    ours = np.asarray(scheme.fake(jnp.asarray(w), inputs=-1))
    assert np.square(ours - w).mean() == pytest.approx(np.square(theirs - w).mean(), rel=0.05)


def test_bytes_of_quantized_weights():
    """Q4: at most 0.30 and 0.17 of float32, scales included."""
    w = jnp.ones((2, 256, 128))
    most_of = {
        Scheme("int8"): 0.26,
        Scheme("int4", 32): 0.141,
        Scheme("int4", 32, False): 0.157,
        Scheme("int2", 32): 0.079,
        Scheme("ternary"): 0.063,
        Scheme("nf4", 64): 0.133,
    }
    for scheme, most in most_of.items():
        packed = scheme.pack(w)
        assert packed.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(packed))
        assert packed.nbytes <= most * w.nbytes, scheme


def test_activations_are_rounded_token_by_token():
    x = np.random.default_rng(0).normal(size=(4, 3, 16)) * np.array([1e-3, 1, 50, 0])[:, None, None]
    found = np.asarray(rounded_inputs(jnp.asarray(x, jnp.float32)))
    step = np.abs(x).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(found, np.round(x / np.where(step, step, 1)) * step, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "int5"}, "quantize.scheme = 'int5': one of int8, int4"),
        ({"name": "nf4", "symmetric": False}, "symmetric = false: nf4 has no zero point"),
        ({"name": "int8", "activations": "int4"}, "activations = 'int4': none or int8"),
        ({"name": "fp8", "activations": "int8"}, "needs weights that are integers, not fp8"),
        ({"name": "int4", "group_size": 0}, "group_size = 0: must be at least 1"),
    ],
)
def test_what_no_grid_has_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Scheme(**settings)
