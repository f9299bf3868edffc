"""Rotary position embedding (Su et al. 2021), half-split layout: dimension i turns with dimension i + K/2."""

import math

import jax
import jax.numpy as jnp

from slm.config import RopeConfig
from slm.errors import ConfigError


def _unstretched(frequencies, rope, length):
    return frequencies


def _linear(frequencies, rope, length):
    """Position interpolation (Chen et al. 2023): all wavelengths stretched alike."""
    return frequencies / rope.factor


def _llama3(frequencies, rope, length):
    """Llama 3.1: as YaRN, with a ramp that is linear in the turns that a dimension makes within the trained length."""
    turns = rope.original_length * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - rope.slow) / (rope.fast - rope.slow), 0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn(frequencies, rope, length):
    """YaRN (Peng et al. 2023, section 3.2): fast dimensions keep their wavelength, slow ones are stretched, and a ramp
    that is linear in the number of the dimension lies between."""
    half = frequencies.shape[0]

    def dimension(turns):
        return half * math.log(rope.original_length / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = dimension(rope.fast), dimension(rope.slow)
    if rope.whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    stretched = jnp.clip((jnp.arange(half) - low) / max(high - low, 0.001), 0, 1)
    return frequencies * (1 - stretched + stretched / rope.factor)


def _longrope(frequencies, rope, length):
    """LongRoPE (Ding et al. 2024): searched divisors, one set up to the trained length and one beyond."""
    sets = jnp.asarray(rope.short_factors), jnp.asarray(rope.long_factors)
    for name, values in zip(("short_factors", "long_factors"), sets):
        if values.shape != frequencies.shape:
            raise ConfigError(f"model.rope.{name} has {values.size} values: {frequencies.size} pairs rotate")
    return frequencies / jnp.where(length > rope.original_length, sets[1], sets[0])


SCALINGS = {"none": _unstretched, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
"""Name to (frequencies (K/2,), RopeConfig, length ()) -> frequencies (K/2,), where length is that of the longest
sequence of the call. A new scaling is one function and one entry."""


def rope_tables(positions_BxT, head_dim: int, rope: RopeConfig, local: bool = False):
    """cos and sin, each (B, T, 1, K/2) float32, for `apply_rope`; local: of layers with a window (rope.local_theta)."""
    theta = rope.local_theta if local else rope.theta
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if not local:
        frequencies = SCALINGS[rope.scaling](frequencies, rope, positions_BxT.max() + 1)
    angles = positions_BxT.astype(jnp.float32)[:, :, None, None] * frequencies
    magnitude = 1.0 if local else rope.magnitude
    # Computed once: XLA would otherwise fuse cosines and sines into every layer's use of them.
    return jax.lax.optimization_barrier((magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)))


def apply_rope(x_BxTxHxK, tables):
    """Turn each pair (x_i, x_{i+K/2}) by its position's angle; computed in float32, returned in x's dtype."""
    cos, sin = tables
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxK.dtype)


def grown_queries(q_BxTxHxK, positions_BxT, rope: RopeConfig):
    """Queries times 1 + query_growth ln(1 + floor(position / original_length)), so that attention stays sharp over more
    keys than in training (Llama 4, Ministral 3)."""
    beyond = jnp.floor(positions_BxT.astype(jnp.float32) / rope.original_length)
    growth = 1 + rope.query_growth * jnp.log1p(jnp.maximum(beyond, 0))
    return (q_BxTxHxK * growth[:, :, None, None]).astype(q_BxTxHxK.dtype)
