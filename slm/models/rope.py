"""Rotary position embedding (Su et al. 2021), half-split layout: dimension i turns with dimension i + K/2."""

import jax
import jax.numpy as jnp


def _linear(frequencies, factor):
    """Position interpolation (Chen et al. 2023): all wavelengths stretched alike."""
    return frequencies / factor


SCALINGS = {"none": lambda frequencies, factor: frequencies, "linear": _linear}
"""Name to (frequencies (K/2,), factor) -> frequencies (K/2,). A new scaling is one function and one entry."""


def rope_tables(positions_BxT, head_dim: int, theta: float, scaling: str = "none", factor: float = 1.0):
    """cos and sin, each (B, T, 1, K/2) float32, for `apply_rope`."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    frequencies = SCALINGS[scaling](frequencies, factor)
    angles = positions_BxT.astype(jnp.float32)[:, :, None, None] * frequencies
    # Computed once: XLA would otherwise fuse cosines and sines into every layer's use of them.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def apply_rope(x_BxTxHxK, tables):
    """Turn each pair (x_i, x_{i+K/2}) by its position's angle; computed in float32, returned in x's dtype."""
    cos, sin = tables
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxK.dtype)
