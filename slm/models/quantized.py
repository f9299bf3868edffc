"""Matrices of few bits, for running a model, not for training it: how they are stored, read and multiplied.

A value is code x scale, or code x scale + zero. Scales stand for all inputs of an output, or for groups of inputs that
follow each other. slm.compress.schemes chooses scales and codes; this file knows what they mean. A matrix is
dequantized where it is multiplied, inside the scan over layers, so that one layer at a time is float; a product of one
row with 8-bit weights dequantizes them in registers, so that a decode step reads a quarter of float32's bytes.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import ConfigError

BITS = {"int8": 8, "int4": 4, "int3": 4, "int2": 2, "nf4": 4, "ternary": 2, "fp8": 8}
"""Name of a format to bits that a code takes: 3-bit integers stand in 4."""
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
"""Quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, appendix E)."""
_OFFSETS = {"int4": 8, "int3": 4, "int2": 2, "ternary": 1}  # so that symmetric codes are stored without a sign


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class QuantizedMatrix:
    """Stands wherever a kernel (..., in, out) or an embedding (V, D) stands among parameters.

    In paths of parameters it looks like a dict, so that rules by name hold. What describes it counts axes from the end,
    so that it may be stacked, sliced and scanned over.
    """

    values: jax.Array
    """Codes: int8, float8_e4m3fn, or uint8 that hold several: (..., in / codes in a byte, out) or (V, D / ...)."""
    scale: jax.Array
    """(..., groups, out) or (V, groups); (..., 1, 1) for a scale of the whole matrix. float32, or float16 of groups."""
    zero: jax.Array | None
    """Like scale: the value of code 0; None: symmetric."""
    format: str
    """A key of BITS."""
    axis: int
    """Of the inputs: -2 for a kernel, -1 for an embedding."""
    inputs: int
    """Their number: the last byte may hold codes of none."""
    activations: str | None = None
    """int8: what it is multiplied with is rounded too, each row by itself, and the product is one of integers."""

    def tree_flatten_with_keys(self):
        children = [(jax.tree_util.DictKey(name), getattr(self, name)) for name in ("values", "scale", "zero")]
        return children, (self.format, self.axis, self.inputs, self.activations)

    @classmethod
    def tree_unflatten(cls, described, children):
        return cls(*children, *described)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for."""
        shape = list(self.values.shape)
        shape[self.axis] = self.inputs
        return tuple(shape)

    @property
    def plain(self) -> bool:
        """8-bit integers with one scale an output."""
        return self.format == "int8" and self.zero is None and self.scale.shape[self.axis] == 1

    def __getitem__(self, rows) -> jax.Array:
        """Rows of an embedding, float32."""
        zero = None if self.zero is None else self.zero[rows]
        return QuantizedMatrix(self.values[rows], self.scale[rows], zero, *self.tree_flatten_with_keys()[1]).astype(
            jnp.float32
        )

    def astype(self, dtype: Any) -> jax.Array:
        """Dequantized."""
        codes = unpack(self.values, self.format, self.axis, self.inputs, self.zero is None)
        return restore(codes, self.scale, self.zero, self.format, self.axis).astype(dtype)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class RoundedInputs:
    """A kernel in training whose products will be of integers: what it is multiplied with is rounded now too."""

    kernel: jax.Array

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey("kernel"), self.kernel)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def restore(codes: jax.Array, scale: jax.Array, zero: jax.Array | None, format: str, axis: int) -> jax.Array:
    """float32 values of codes (floats or integers) of a matrix."""
    values = jnp.asarray(NF4)[codes.astype(jnp.int32)] if format == "nf4" else codes.astype(jnp.float32)
    values = values * spread(scale, values.shape, axis)
    return values if zero is None else values + spread(zero, values.shape, axis)


def spread(scale: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Scales of groups, float32, as they multiply a matrix of `shape`."""
    scale = scale.astype(jnp.float32)
    groups = scale.shape[axis]
    return scale if groups == 1 else jnp.repeat(scale, shape[axis] // groups, axis)


def pack(codes: jax.Array, format: str, axis: int, symmetric: bool) -> jax.Array:
    """Codes as they are stored. A byte of n codes holds input i of each n-th part of the inputs, so that unpacking
    joins whole parts and moves nothing."""
    if format == "int8":
        # An asymmetric code is from 0 to 255.
        return (codes if symmetric else codes - 128).astype(jnp.int8)
    if format == "fp8":
        return codes.astype(jnp.float8_e4m3fn)
    each = 8 // BITS[format]
    codes = (codes + (_OFFSETS.get(format, 0) if symmetric else 0)).astype(jnp.uint8)
    missing = -codes.shape[axis] % each
    pad = [(0, 0)] * codes.ndim
    pad[axis] = (0, missing)
    parts = jnp.split(jnp.pad(codes, pad), each, axis)
    return sum(part << (BITS[format] * i) for i, part in enumerate(parts)).astype(jnp.uint8)


def unpack(values: jax.Array, format: str, axis: int, inputs: int, symmetric: bool) -> jax.Array:
    """The codes: the inverse of `pack`."""
    if format == "int8":
        return values if symmetric else values.astype(jnp.int16) + 128
    if format == "fp8":
        return values
    each, bits = 8 // BITS[format], BITS[format]
    parts = [(values >> (bits * i)) & (2**bits - 1) for i in range(each)]
    codes = jax.lax.slice_in_dim(jnp.concatenate(parts, axis).astype(jnp.int8), 0, inputs, axis=axis % values.ndim)
    return codes - _OFFSETS.get(format, 0) if symmetric else codes


def as_array(matrix) -> jax.Array:
    """A matrix of parameters as floats."""
    return matrix.astype(jnp.float32) if isinstance(matrix, QuantizedMatrix) else matrix


def dequantized(params: Any) -> Any:
    """Parameters with all matrices as floats."""
    return jax.tree.map(as_array, params, is_leaf=is_quantized)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedMatrix)


def check_float_weights(params: Any) -> None:
    """Raises ConfigError if there is a QuantizedMatrix among the parameters."""
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise ConfigError(
            "this model's weights are quantized, which is for running it: take the model that it was made from, or "
            "slm.dequantize it"
        )


def product(x, matrix: QuantizedMatrix) -> jax.Array:
    """x (N, in) times matrix (in, out): (N, out) of x's dtype."""
    if matrix.activations == "int8":
        return _integer_product(x, matrix)
    if not matrix.plain:
        return x @ matrix.astype(x.dtype)
    if _in_registers(x):
        values, x = _here(matrix.values, x)
        product = (values.astype(jnp.float32) * x[0].astype(jnp.float32)[:, None]).sum(0)[None]
    else:
        product = x @ matrix.values.astype(x.dtype)
    return (product * matrix.scale).astype(x.dtype)


def similarity(x, table: QuantizedMatrix) -> jax.Array:
    """x (N, D) times each row of an embedding (V, D): (N, V) of x's dtype."""
    if not table.plain:
        return x @ table.astype(x.dtype).T
    # Not `product` with the transpose, which would be read against the order in which it lies: 25 times slower.
    if _in_registers(x):
        values, x = _here(table.values, x)
        product = (values.astype(jnp.float32) * x[0].astype(jnp.float32)).sum(1)[None]
    else:
        product = x @ table.values.T.astype(x.dtype)
    return (product * table.scale.T).astype(x.dtype)


def rounded_rows(x) -> tuple[jax.Array, jax.Array]:
    """(int8 codes, float32 scale (N, 1)) of rows x (N, in): each by its own largest (dynamic, per token)."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


@jax.custom_vjp
def rounded_inputs(x):
    """x (N, in) on the grid of `rounded_rows`, with the gradient of x itself."""
    codes, scale = rounded_rows(x)
    return (codes.astype(jnp.float32) * scale).astype(x.dtype)


rounded_inputs.defvjp(lambda x: (rounded_inputs(x), None), lambda _, gradient: (gradient,))


def _integer_product(x, matrix):
    codes, scale = rounded_rows(x)
    sums = jax.lax.dot_general(codes, matrix.values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return (sums.astype(jnp.float32) * scale * matrix.scale).astype(x.dtype)


def _in_registers(x) -> bool:
    """XLA:CPU has no fast product of integers and floats; as a sum of products, one row at a time, it fuses the
    conversion."""
    return len(x) == 1 and jax.default_backend() == "cpu"


def _here(values, x):
    """Keeps XLA from converting all weights once before a loop over tokens, and reading float32 in it."""
    return jax.lax.optimization_barrier((values, x))
