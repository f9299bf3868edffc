"""Grids: which numbers of few bits stand for a weight. Pure functions of arrays, for rounding in and after training.

Conventions. Symmetric integers of b < 8 bits have codes -2^(b-1) ... 2^(b-1) - 1, and a scale, of either sign, that
maps the weight of largest magnitude to the lowest code exactly, as GGUF's Q4_0 has it: all 2^b codes are used. 8 bits
have -127 ... 127, as Q8_0. Asymmetric ones have codes 0 ... 2^b - 1 and a float zero, the smallest weight (Q4_1; HQQ,
Badri & Shaji 2023): an integer zero point cannot hold such a grid. Ties round to even. Zero is always on a symmetric
grid. Rounding what lies on a grid changes nothing, but for ternary weights, whose scale is a mean.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import ConfigError
from slm.models.quantized import BITS, NF4, QuantizedMatrix, pack, restore, spread

LARGEST_FP8 = 448.0
"""Of float8_e4m3fn."""


@dataclass(frozen=True)
class Scheme:
    """A grid. Raises ConfigError for one that does not exist."""

    name: str
    """A key of slm.models.quantized.BITS."""
    group_size: int | None = None
    """Inputs that share a scale; None: all of an output (nf4: 64; ternary: all of a matrix)."""
    symmetric: bool = True
    """False: integers with a float zero."""
    activations: str | None = None
    """int8: round what the matrix is multiplied with, too."""
    axis: int = -2
    """Of the inputs: -2 of a kernel, -1 of an embedding."""

    def __post_init__(self):
        if self.name not in BITS:
            raise ConfigError(f"scheme = {self.name!r}: one of {', '.join(BITS)}")
        if not self.symmetric and not self.name.startswith("int"):
            raise ConfigError(f"symmetric = false: {self.name} has no zero point; use int8 to int2")
        if self.group_size is not None and self.group_size < 2:
            raise ConfigError(
                f"group_size = {self.group_size}: must be at least 2, or None for all inputs of an output"
            )
        if self.activations not in (None, "int8"):
            raise ConfigError(f"activations = {self.activations!r}: int8, or None")
        if self.activations and (self.name != "int8" or self.group_size or not self.symmetric):
            raise ConfigError(
                "activations = int8: products of integers need scheme = int8, symmetric, with one scale an output"
            )

    @property
    def bits(self) -> int:
        """Of a code, without what it is padded to."""
        return 3 if self.name == "int3" else BITS[self.name]

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest code of integers."""
        if self.name == "ternary":
            return -1, 1
        if not self.symmetric:
            return 0, 2**self.bits - 1
        return (-127, 127) if self.name == "int8" else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def groups(self, inputs: int, name: str = "a matrix") -> int:
        """Scales that an output with so many inputs has. Raises ConfigError where groups do not divide them."""
        size = self.group_size or (64 if self.name == "nf4" and inputs % 64 == 0 else inputs)
        if inputs % size:
            raise ConfigError(f"group_size = {size} does not divide the {inputs} inputs of {name}")
        return inputs // size

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(scale, zero) of weights (..., in, out): see QuantizedMatrix for their shapes."""
        w = w.astype(jnp.float32)
        if self.name == "ternary" and self.group_size is None:
            return jnp.maximum(jnp.abs(w).mean((-2, -1), keepdims=True), 1e-8), None  # BitNet b1.58, equations 1 to 3
        grouped, axis = self._grouped(w)
        if self.name == "ternary":
            scale, zero = jnp.maximum(jnp.abs(grouped).mean(axis), 1e-8), None
        elif not self.symmetric:
            zero = grouped.min(axis)
            scale = (grouped.max(axis) - zero) / self.range[1]
        elif self.name in ("int8", "nf4", "fp8"):
            scale, zero = jnp.abs(grouped).max(axis) / {"int8": 127, "nf4": 1, "fp8": LARGEST_FP8}[self.name], None
        else:
            high, low = grouped.max(axis), grouped.min(axis)
            scale, zero = jnp.where(-low > high, low, high) / self.range[0], None
        return self.stored(scale), None if zero is None else self.stored(zero)

    def stored(self, scale: jax.Array) -> jax.Array:
        """A scale or zero as it is kept, and as codes are chosen by: those of groups in half precision."""
        return scale.astype(jnp.float16) if scale.shape[self.axis] > 1 else scale.astype(jnp.float32)

    def codes(self, w: jax.Array, scale: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        """The nearest codes to weights, as floats (of nf4: numbers of its values)."""
        w = w.astype(jnp.float32)
        if zero is not None:
            w = w - spread(zero, w.shape, self.axis)
        scale = spread(scale, w.shape, self.axis)
        w = w / jnp.where(scale == 0, 1, scale)
        if self.name == "nf4":
            return (w[..., None] > jnp.asarray((NF4[1:] + NF4[:-1]) / 2)).sum(-1).astype(jnp.float32)
        if self.name == "fp8":
            return jnp.clip(w, -LARGEST_FP8, LARGEST_FP8).astype(jnp.float8_e4m3fn).astype(jnp.float32)
        return jnp.clip(jnp.round(w), *self.range)

    def restore(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        """Weights of codes, float32."""
        return restore(codes, scale, zero, self.name, self.axis)

    def fake(self, w: jax.Array, scale: jax.Array | None = None, zero: jax.Array | None = None) -> jax.Array:
        """Weights rounded to the grid, float32. None: the grid that `fit` gives."""
        if scale is None:
            scale, zero = self.fit(w)
        return self.restore(self.codes(w, scale, zero), scale, zero)

    def pack(self, w: jax.Array, scale: jax.Array | None = None, zero: jax.Array | None = None) -> QuantizedMatrix:
        """Weights as they are stored: `fake` of them, exactly."""
        if scale is None:
            scale, zero = self.fit(w)
        codes = pack(self.codes(w, scale, zero), self.name, self.axis, zero is None)
        return QuantizedMatrix(codes, scale, zero, self.name, self.axis, w.shape[self.axis], self.activations)

    def spread(self, scale: jax.Array, w: jax.Array) -> jax.Array:
        """Scales as they multiply `w`."""
        return spread(scale, w.shape, self.axis)

    def _grouped(self, w: jax.Array) -> tuple[jax.Array, int]:
        """(weights with an axis for each group, the axis inside a group)."""
        at, shape = w.ndim + self.axis, list(w.shape)
        groups = self.groups(shape[at])
        shape[at : at + 1] = [groups, shape[at] // groups]
        return w.reshape(shape), at + 1


def effective_bits(params: Any) -> float:
    """Bits that a weight of the quantized matrices takes, scales and zeros included; 32 without any."""
    found = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    matrices = [leaf for leaf in found if isinstance(leaf, QuantizedMatrix)]
    stored = sum(leaf.nbytes for matrix in matrices for leaf in jax.tree.leaves(matrix))
    return 8 * stored / sum(int(np.prod(m.shape)) for m in matrices) if matrices else 32.0
