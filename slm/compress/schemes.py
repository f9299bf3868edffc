"""Grids of a few bits and the scales that fit weights to them: pure functions of arrays, under jit or not.

Conventions. Codes are rounded to nearest, halves to even.
- Symmetric int8: scale = largest |w| / 127, codes -127..127, as GGUF's Q8_0.
- Symmetric int4, int3, int2: scale = the w of largest |w| / -8, -4, -2, with its sign, codes -8..7, -4..3, -2..1, as
  GGUF's Q4_0: the largest weight is restored exactly; weights of nearly that size and the other sign lose up to a step.
- Asymmetric: code 0 stands for the smallest weight, a float, and the highest code for the largest, as GGUF's Q4_1.
- nf4: scale = largest |w|. fp8: largest |w| / 448. ternary: mean |w| (BitNet b1.58, Ma et al. 2024, 2402.17764).
Scales of groups are rounded to float16 before codes are chosen; those of outputs are float32 of 16 bits of precision.
So code x scale is exact, and no compiler's fused multiply-add changes the sum with a zero. A matrix that is on its grid
stays, fake(fake(w)) = fake(w), where scales are normal numbers of float16; but not with ternary, whose mean changes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from slm.errors import ConfigError
from slm.models.quantized import GRIDS, LEVELS, QuantizedMatrix, from_codes, restore, spread

INTEGERS = tuple(LEVELS)
"""Schemes that may be asymmetric."""


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantized. Weights w are (..., in, out) for inputs = -2, or (..., out, in) for -1.

    Scales and zeros have w's shape with one entry for each group of inputs, or one in all; zero is None for symmetric
    schemes. Raises ConfigError for what a grid cannot have.
    """

    name: Literal["int8", "int4", "int3", "int2", "nf4", "ternary", "fp8"]
    group_size: int | None = None
    """Inputs that share a scale; None: all of an output (ternary: all of the matrix)."""
    symmetric: bool = True
    activations: Literal["none", "int8"] = "none"

    def __post_init__(self):
        if self.name not in GRIDS:
            raise ConfigError(f"quantize.scheme = {self.name!r}: one of {', '.join(GRIDS)}")
        if not self.symmetric and self.name not in INTEGERS:
            raise ConfigError(
                f"quantize.symmetric = false: {self.name} has no zero point, only {', '.join(INTEGERS)} do; set it true"
            )
        if self.activations not in ("none", "int8"):
            raise ConfigError(f"quantize.activations = {self.activations!r}: none or int8")
        if self.activations == "int8" and self.name in ("nf4", "fp8"):
            raise ConfigError(
                f"quantize.activations = int8 needs weights that are integers, not {self.name}: use int8 or int4"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"quantize.group_size = {self.group_size}: must be at least 1, or none for one an output")

    def check(self, name: str, size: int) -> None:
        """Raises ConfigError if groups do not divide the `size` inputs of the matrix `name`."""
        if self.group_size and size % self.group_size:
            raise ConfigError(
                f"quantize.group_size = {self.group_size} does not divide the {size} inputs of {name}: choose one that "
                f"does, such as {max(g for g in range(1, self.group_size) if size % g == 0)}, or skip this matrix"
            )

    @property
    def range(self) -> tuple[int, int]:
        """Lowest and highest code of integers."""
        grid = GRIDS[self.name]
        return (grid.low, grid.high) if self.symmetric else (0, LEVELS[self.name])

    @property
    def bits(self) -> int:
        """That a code takes when stored."""
        return GRIDS[self.name].bits

    def fit(self, w: jax.Array, inputs: int = -2) -> tuple[jax.Array, jax.Array | None]:
        """(scale, zero) of float weights, float32, rounded as they are stored."""
        w = w.astype(jnp.float32)
        grid, axis = GRIDS[self.name], inputs % w.ndim
        if self.name == "ternary" and self.group_size is None:
            return self.stored(_mean(jnp.abs(w), (-1, -2), True))
        groups = w.shape[axis] // (self.group_size or w.shape[axis])
        # (..., groups, inputs of a group, ...)
        parts = w.reshape(*w.shape[:axis], groups, -1, *w.shape[axis + 1 :])
        axis += 1
        if not self.symmetric:
            low, high = parts.min(axis), parts.max(axis)
            return self.stored((high - low) * jnp.float32(1 / LEVELS[self.name]), low)
        if self.name == "ternary":
            return self.stored(_mean(jnp.abs(parts), axis))
        high, low = parts.max(axis), parts.min(axis)
        largest = jnp.maximum(jnp.abs(high), jnp.abs(low))
        if self.name in ("int8", "nf4", "fp8"):
            return self.stored(largest * jnp.float32(1 / (1 if grid.table else grid.high)))
        # Of equally large weights the positive one, so that the order of weights does not matter.
        return self.stored(jnp.where(high >= -low, high, low) * jnp.float32(1 / grid.low))

    def stored(self, scale, zero=None) -> tuple[jax.Array, jax.Array | None]:
        """A scale and zero as they are stored, in float32: for those that are not of `fit`, such as learned ones."""
        scale = scale.astype(jnp.float32)
        if self.group_size:
            return tuple(None if a is None else _half(a) for a in (scale, zero))
        return jax.lax.reduce_precision(scale, 8, 15), None if zero is None else zero.astype(jnp.float32)

    def codes(self, w, scale, zero=None, inputs: int = -2) -> jax.Array:
        """Codes (float32, w's shape) of the nearest points of the grid. Scales of groups, or of w's inputs one by one.

        Integers; for nf4 numbers of table entries; for fp8 numbers that float8_e4m3fn has.
        """
        grid, size = GRIDS[self.name], w.shape[inputs]
        scale = spread(scale, size, inputs)
        # By the reciprocal, since compilers turn some divisions into that and others not.
        x = w.astype(jnp.float32)
        x = (x if zero is None else x - spread(zero, size, inputs)) * jnp.where(scale == 0, 0, 1 / _nonzero(scale))
        if zero is not None:
            return jnp.clip(jnp.round(x), 0, LEVELS[self.name])
        if grid.table:
            middles = [jnp.float32((a + b) / 2) for a, b in zip(grid.table, grid.table[1:])]
            return sum((x > middle).astype(jnp.float32) for middle in middles)
        x = jnp.clip(x, grid.low, grid.high)
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32) if self.name == "fp8" else jnp.round(x)

    def restore(self, codes, scale, zero=None, inputs: int = -2) -> jax.Array:
        """Float32 weights from codes."""
        return restore(codes, scale, zero, self.name, inputs)

    def fake(self, w, scale=None, zero=None, inputs: int = -2) -> jax.Array:
        """w rounded to the grid, float32: of these scales, as they are stored, or of its own."""
        scale, zero = self.fit(w, inputs) if scale is None else self.stored(scale, zero)
        return self.restore(self.codes(w, scale, zero, inputs), scale, zero, inputs)

    def pack(self, w, scale=None, zero=None, inputs: int = -2) -> QuantizedMatrix:
        """w quantized: what it restores to equals `fake` of the same arguments bit for bit."""
        scale, zero = self.fit(w, inputs) if scale is None else self.stored(scale, zero)
        codes = self.codes(w, scale, zero, inputs)
        return from_codes(codes, scale, zero, self.name, self.group_size, self.activations, inputs)


def _half(a: Any) -> jax.Array:
    """Rounded to float16. Not by astype, there and back, which XLA may take for nothing and leave out."""
    a = jnp.clip(a.astype(jnp.float32), -65504, 65504)
    return jnp.where(jnp.abs(a) < 2**-14, jnp.round(a * 2**24) * 2**-24, jax.lax.reduce_precision(a, 5, 10))


def _mean(a, axes, keepdims: bool = False) -> jax.Array:
    # Apart from what stands around it, which could change the order of the sum.
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(a).mean(axes, keepdims=keepdims))


def _nonzero(scale):
    return jnp.where(scale == 0, 1, scale)
