"""Grids against plain numpy: where codes lie, how far weights move, what stays where it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.compress.schemes import Scheme
from slm.errors import ConfigError
from slm.models.quantized import NF4, pack, unpack

SCHEMES = [
    Scheme("int8"), Scheme("int8", 8), Scheme("int4"), Scheme("int4", 8), Scheme("int4", 8, symmetric=False),
    Scheme("int3", 4), Scheme("int2", 8), Scheme("int2", 8, symmetric=False), Scheme("nf4"), Scheme("nf4", 8),
    Scheme("fp8"), Scheme("fp8", 8), Scheme("int8", symmetric=False),
]  # fmt: skip
IDS = [f"{s.name}-{s.group_size}-{'sym' if s.symmetric else 'zero'}" for s in SCHEMES]


def weights(shape=(3, 24, 5), seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1, shape[2]))), jnp.float32)


def by_hand(column, scheme):
    """Codes and values of one group of one output, float64, by the words of the module."""
    w = np.asarray(column, np.float64)
    half = (lambda x: float(np.float16(x))) if scheme.group_size else float
    if scheme.name == "nf4":
        scale = half(np.abs(w).max())
        return np.array([NF4[np.abs(NF4 - x / scale).argmin()] * scale for x in w])
    if scheme.name == "fp8":
        scale = half(np.abs(w).max() / 448)
        return np.asarray(jnp.asarray(w / scale, jnp.float32).astype(jnp.float8_e4m3fn).astype(jnp.float32)) * scale
    bits = int(scheme.name[3:])
    if not scheme.symmetric:
        zero, scale = half(w.min()), half((w.max() - w.min()) / (2**bits - 1))
        return np.clip(np.round((w - zero) / scale), 0, 2**bits - 1) * scale + zero
    if bits == 8:
        scale = half(np.abs(w).max() / 127)
        return np.clip(np.round(w / scale), -127, 127) * scale
    scale = half(w[np.abs(w).argmax()] / -(2 ** (bits - 1)))
    return np.clip(np.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize("axis", [-2, -1])
def test_weights_go_where_the_definition_says(scheme, axis):
    w = weights()
    size = scheme.group_size or 24
    turned = jnp.swapaxes(w, -1, -2) if axis == -1 else w
    found = Scheme(scheme.name, scheme.group_size, scheme.symmetric, axis=axis).fake(turned)
    found = np.swapaxes(found, -1, -2) if axis == -1 else np.asarray(found)
    for layer in range(3):
        for out in range(5):
            for first in range(0, 24, size):
                group = slice(first, first + size)
                want = by_hand(w[layer, group, out], scheme)
                # A weight between two codes may go either way by rounding of float32.
                off = np.abs(found[layer, group, out] - want) > 1e-5 * np.abs(want).max()
                assert off.mean() <= 0.05


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_properties(scheme):
    w = weights(seed=1).at[0, :8, 0].set(0).at[1, 3, 1].set(0)
    q = scheme.fake(w)
    scale, zero = scheme.fit(w)
    steps = np.abs(np.asarray(scheme.spread(scale, w)))
    error = np.abs(np.asarray(q - w))
    if scheme.name.startswith("int"):
        # Half a step, and up to a whole one at the end that symmetric integers lack; half precision of the grid.
        lost = 1.0 if scheme.symmetric and scheme.name != "int8" else 0.5
        assert (error <= steps * lost + 2e-3 * np.abs(w).max()).all()
    # What lies on the grid stays.
    np.testing.assert_allclose(scheme.fake(q), q, atol=1e-6 * np.abs(w).max())
    # Larger weights, larger codes; zero stays zero where the grid has one.
    np.testing.assert_allclose(scheme.fake(w * 4), q * 4, rtol=1e-5, atol=1e-6)
    if scheme.symmetric:
        assert not np.asarray(q)[np.asarray(w) == 0].any()
    assert scale.dtype == (jnp.float16 if scheme.groups(24) > 1 else jnp.float32)
    assert (zero is None) == scheme.symmetric
    np.testing.assert_allclose(jax.jit(scheme.fake)(w), q, atol=1e-6)


def test_finer_grids_are_closer():
    w = weights((1, 64, 32))
    error = {(name, size): float(jnp.square(Scheme(name, size).fake(w) - w).mean())
             for name in ("int8", "int4", "int3", "int2") for size in (None, 16)}  # fmt: skip
    for size in (None, 16):
        values = [error[name, size] for name in ("int8", "int4", "int3", "int2")]
        assert values == sorted(values)
    assert all(error[name, 16] < error[name, None] for name in ("int4", "int3", "int2"))


def test_ternary_is_the_mean_and_three_codes():
    w = weights()
    scheme = Scheme("ternary")
    scale, _ = scheme.fit(w)
    np.testing.assert_allclose(scale, np.abs(w).mean((1, 2), keepdims=True), rtol=1e-6)
    want = np.clip(np.round(np.asarray(w) / np.asarray(scale)), -1, 1) * np.asarray(scale)
    np.testing.assert_allclose(scheme.fake(w), want, rtol=1e-6)


def test_weights_on_a_grid_with_a_float_zero_are_kept():
    """As those of a GGUF file in Q4_1 are: an integer zero point would lose them (COMPRESSION E-Q5)."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (2, 4, 32, 6))
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    scale = np.exp(rng.normal(size=(2, 4, 1, 6))).astype(np.float16)
    zero = rng.normal(size=(2, 4, 1, 6)).astype(np.float16)
    w = jnp.asarray((codes * scale.astype(np.float32) + zero.astype(np.float32)).reshape(2, 128, 6))
    scheme = Scheme("int4", 32, symmetric=False)
    np.testing.assert_allclose(scheme.fake(w), w, atol=2e-6 * np.abs(w).max())
    np.testing.assert_array_equal(scheme.codes(w, *scheme.fit(w)), codes.reshape(2, 128, 6))
    assert np.abs(Scheme("int4", 32).fake(w) - w).max() > 0.1


@pytest.mark.parametrize("format", ["int8", "int4", "int3", "int2", "nf4", "ternary"])
@pytest.mark.parametrize("inputs", [1, 7, 8, 10])
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_stored_and_found_again(format, inputs, axis, symmetric):
    scheme = Scheme(format, symmetric=symmetric or not format.startswith("int"))
    low, high = (0, 15) if format == "nf4" else scheme.range
    shape = (3, inputs, 5) if axis == -2 else (3, 5, inputs)
    codes = np.random.default_rng(0).integers(int(low), int(high) + 1, shape)
    stored = pack(jnp.asarray(codes, jnp.float32), format, axis, scheme.symmetric)
    assert stored.shape[axis] == -(-inputs * (4 if format == "int3" else scheme.bits) // 8)
    np.testing.assert_array_equal(unpack(stored, format, axis, inputs, scheme.symmetric), codes)


def test_what_is_no_grid_is_refused():
    for settings, message in [
        ({"name": "int16"}, "scheme = 'int16'"), ({"name": "fp8", "symmetric": False}, "no zero point"),
        ({"name": "int8", "group_size": 1}, "group_size = 1"),
        ({"name": "int4", "activations": "int8"}, "scheme = int8"),
        ({"name": "int8", "activations": "fp4"}, "activations = 'fp4'"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Scheme(**settings)
