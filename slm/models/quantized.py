"""Matrices of a few bits a weight, with scales, for running a model, not for training it.

A weight is restored as `code * scale`, or `code * scale + zero`, from a code of its scheme's grid (`GRIDS`). Scales lie
along the inputs of a matrix: one for each output, one for each group of inputs and output, or one for the matrix.

Codes of fewer than 8 bits are packed along the inputs, 2 or 4 in a byte: of n inputs (padded to a multiple), byte j
holds inputs j, j + n/2 (or j, j + n/4, j + 2n/4, j + 3n/4), the first in its lowest bits. So unpacking joins whole
pieces and moves no single weight.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import ConfigError


class Grid(NamedTuple):
    """The codes that a weight may have."""

    bits: int
    """That a code takes when stored."""
    low: int
    """Lowest integer around zero; without a sign (asymmetric), integers go from 0 to high - low or, for int8, 255."""
    high: int
    table: tuple[float, ...] = ()
    """What codes stand for where they do not stand for themselves."""


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution with an exact zero (QLoRA, Dettmers et al. 2023, 2305.14314, appendix E)."""
GRIDS = {
    "int8": Grid(8, -127, 127),
    "int4": Grid(4, -8, 7),
    "int3": Grid(4, -4, 3),
    "int2": Grid(2, -2, 1),
    "ternary": Grid(2, -1, 1),
    "nf4": Grid(4, 0, 15, NF4),
    "fp8": Grid(8, -448, 448),
}
"""Scheme to grid. Three bits are stored in four; fp8 is float8_e4m3fn (2209.05433)."""
LEVELS = {"int8": 255, "int4": 15, "int3": 7, "int2": 3}
"""Highest code of the asymmetric schemes, whose codes begin at 0."""


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class QuantizedMatrix:
    """Stands wherever a kernel (..., in, out) or an embedding (V, D) stands among parameters.

    In paths of parameters it looks like a dict, so that rules by name hold. `lax.scan`, `jax.vmap` and slices of the
    leading axes by tree.map give matrices of the rest.
    """

    values: jax.Array
    """Codes: int8 (int8 around zero), uint8 (int8 from zero, and packed codes), or float8_e4m3fn."""
    scale: jax.Array
    """float16 for groups, else float32: of the matrix's shape, with as many inputs as there are groups, or 1; the
    outputs of ternary without groups are 1 too."""
    zero: jax.Array | None
    """What code 0 stands for, like scale; None: zero."""
    scheme: str
    """A name in GRIDS."""
    group_size: int | None = None
    """Inputs that share a scale; None: all."""
    activations: str = "none"
    """int8: what the matrix is multiplied with is rounded too, each token by its own largest (W8A8)."""
    inputs: int = -2
    """Axis of the inputs: -2 of a kernel, -1 of an embedding, which is read by rows."""
    size: int = 0
    """Inputs, without those that fill up the last bytes."""

    def tree_flatten_with_keys(self):
        children = [(jax.tree_util.DictKey(name), getattr(self, name)) for name in ("values", "scale", "zero")]
        return children, (self.scheme, self.group_size, self.activations, self.inputs, self.size)

    @classmethod
    def tree_unflatten(cls, settings, children):
        return cls(*children, *settings)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, not of what is stored."""
        shape = list(self.values.shape)
        shape[self.inputs] = self.size
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return sum(a.size * a.dtype.itemsize for a in (self.values, self.scale, self.zero) if a is not None)

    def codes(self, dtype: Any = jnp.float32) -> jax.Array:
        """Codes of the matrix's shape: integers, fp8's own floats, or numbers of the entries of NF4's table."""
        grid = GRIDS[self.scheme]
        if grid.bits == 8:
            return self.values.astype(dtype)
        codes = unpack(self.values, grid.bits, self.inputs, self.size)
        signed = self.zero is None and not grid.table
        return (codes.astype(jnp.int8) + grid.low if signed else codes).astype(dtype)

    def __getitem__(self, rows) -> jax.Array:
        """Rows of an embedding, float32."""
        zero = None if self.zero is None else self.zero[rows]
        # The scale of the whole table has one row.
        scale = self.scale if self.scale.shape[0] == 1 else self.scale[rows]
        part = QuantizedMatrix(self.values[rows], scale, zero, *self.tree_flatten_with_keys()[1])
        return part.astype(jnp.float32)

    def astype(self, dtype: Any) -> jax.Array:
        """Dequantized."""
        return restore(self.codes(), self.scale, self.zero, self.scheme, self.inputs).astype(dtype)


def restore(codes, scale, zero, scheme: str, inputs: int = -2) -> jax.Array:
    """Float32 weights from codes (floats) of the matrix's shape, and scales and zeros of groups of its inputs."""
    if GRIDS[scheme].table:
        codes = jnp.asarray(GRIDS[scheme].table, jnp.float32)[codes.astype(jnp.int32)]
    found = codes * spread(scale.astype(jnp.float32), codes.shape[inputs], inputs)
    return found if zero is None else found + spread(zero.astype(jnp.float32), codes.shape[inputs], inputs)


def spread(scale, size: int, inputs: int = -2) -> jax.Array:
    """Scales of groups as scales of `size` inputs; what has one, or all of them, stays."""
    groups = scale.shape[inputs]
    return scale if groups in (1, size) else jnp.repeat(scale, size // groups, inputs)


def from_codes(codes, scale, zero, scheme: str, group_size=None, activations="none", inputs=-2) -> QuantizedMatrix:
    """The matrix of codes (floats), with its scales stored as they are stored (float16 for groups, else float32)."""
    grid, size, stored = GRIDS[scheme], codes.shape[inputs], jnp.float16 if group_size else jnp.float32
    if scheme == "fp8":
        values = codes.astype(jnp.float8_e4m3fn)
    elif grid.bits == 8:
        values = codes.astype(jnp.int8 if zero is None else jnp.uint8)
    else:
        signed = zero is None and not grid.table
        values = pack((codes - grid.low if signed else codes).astype(jnp.uint8), grid.bits, inputs)
    zero = None if zero is None else zero.astype(stored)
    return QuantizedMatrix(values, scale.astype(stored), zero, scheme, group_size, activations, inputs, size)


def pack(codes, bits: int, inputs: int) -> jax.Array:
    """uint8 codes below 2^bits, 8 / bits of them in a byte along axis `inputs` (module docstring)."""
    count = 8 // bits
    widths = [(0, 0)] * codes.ndim
    widths[inputs] = (0, -codes.shape[inputs] % count)
    parts = jnp.split(jnp.pad(codes, widths), count, inputs)
    return sum((part << (bits * i) for i, part in enumerate(parts[1:], 1)), parts[0])


def unpack(values, bits: int, inputs: int, size: int) -> jax.Array:
    """The uint8 codes that were packed, `size` along axis `inputs`."""
    parts = [(values >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return jax.lax.slice_in_dim(jnp.concatenate(parts, inputs), 0, size, axis=inputs % values.ndim)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedMatrix)


def as_array(matrix) -> jax.Array:
    """A matrix of parameters as floats."""
    return matrix.astype(jnp.float32) if is_quantized(matrix) else matrix


def dequantized(params: Any) -> Any:
    """Parameters with float32 matrices in place of quantized ones."""
    return jax.tree.map(as_array, params, is_leaf=is_quantized)


def stored_bytes(params: Any) -> int:
    """Bytes that parameters take."""
    return int(sum(np.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params)))


def check_float_weights(params: Any) -> None:
    """Raises ConfigError if there is a QuantizedMatrix among the parameters."""
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise ConfigError(
            "the model's weights are quantized already, for running only (slm.save and slm.save_gguf write them): take "
            "the model that it comes from, or slm.dequantize(model)"
        )
