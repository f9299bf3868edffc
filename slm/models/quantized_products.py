"""Products with quantized matrices.

Weights alone quantized: products are of floats, and a matrix is dequantized where it is multiplied, so that of the
layers of a scan one at a time is float. On a CPU one row is multiplied in registers: a decode step reads the packed
bytes alone. With 8-bit activations, products are of integers, summed in int32 (W8A8, 2211.10438).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slm.models.quantized import GRIDS, QuantizedMatrix


def quantized_product(x, matrix: QuantizedMatrix) -> jax.Array:
    """x (N, in) times matrix (in, out): (N, out) of x's dtype."""
    if matrix.activations == "int8":
        return _of_integers(x, matrix).astype(x.dtype)
    if _in_registers(x):
        matrix, x = _here(matrix, x)
        if (group := _group(matrix)) is not None:
            return _by_groups(x[0].astype(jnp.float32), matrix, group)[None].astype(x.dtype)
        if _one_scale(matrix):
            return ((matrix.codes() * x[0].astype(jnp.float32)[:, None]).sum(0)[None] * matrix.scale).astype(x.dtype)
        return (matrix.astype(jnp.float32) * x[0].astype(jnp.float32)[:, None]).sum(0)[None].astype(x.dtype)
    if _one_scale(matrix):
        return ((x @ matrix.codes(x.dtype)) * matrix.scale).astype(x.dtype)
    matrix, x = _here(matrix, x)
    return x @ matrix.astype(x.dtype)


def quantized_similarity(x, table: QuantizedMatrix) -> jax.Array:
    """x (N, D) times each row of an embedding (V, D): (N, V) of x's dtype."""
    # Not a product with the transpose, which would be read against the order in which it lies: 25 times slower.
    if _in_registers(x):
        table, x = _here(table, x)
        if _one_scale(table):
            product = (table.codes() * x[0].astype(jnp.float32)).sum(1)[None]
            return (product * table.scale.T).astype(x.dtype)
        if GRIDS[table.scheme].bits == 8 and table.scheme != "fp8":
            return _rows_by_groups(x[0].astype(jnp.float32), table)[None].astype(x.dtype)
        return (table.astype(jnp.float32) * x[0].astype(jnp.float32)).sum(1)[None].astype(x.dtype)
    if _one_scale(table):
        return ((x @ table.codes(x.dtype).T) * table.scale.T).astype(x.dtype)
    table, x = _here(table, x)
    return x @ table.astype(x.dtype).T


def rounded_tokens(x) -> tuple[jax.Array, jax.Array]:
    """(int8 of x's shape, float32 scale (..., 1)): each row as the nearest of 255 steps of its largest."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) * jnp.float32(1 / 127)
    return jnp.round(x * jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))).astype(jnp.int8), scale


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class RoundedInputs:
    """A kernel in training whose products will be of integers: what it is multiplied with is rounded now too."""

    kernel: jax.Array
    """(..., in, out)."""
    begun: jax.Array | None = None
    """(...) float32: 0 as long as nothing is rounded yet; None: always."""

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey(name), getattr(self, name)) for name in ("kernel", "begun")], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def inputs(self, x: jax.Array) -> jax.Array:
        """`x` (..., in) as the product will see it."""
        rounded = rounded_inputs(x)
        return rounded if self.begun is None else jnp.where(self.begun > 0, rounded, x)


@jax.custom_vjp
def rounded_inputs(x):
    """x (..., in) as `rounded_tokens` stores it, with the gradient of x itself."""
    codes, scale = rounded_tokens(x)
    return (codes.astype(jnp.float32) * scale).astype(x.dtype)


rounded_inputs.defvjp(lambda x: (rounded_inputs(x), None), lambda _, gradient: (gradient,))


def _of_integers(x, matrix: QuantizedMatrix):
    """(N, out) float32: int8 rows times integer codes, group by group, then the scales of both."""
    rows, step = rounded_tokens(x)
    rows, matrix = jax.lax.optimization_barrier((rows, matrix))
    N, size = rows.shape
    groups = matrix.scale.shape[-2]
    rows_GxNxg = rows.reshape(N, groups, size // groups).swapaxes(0, 1)
    # Codes without a sign need 9 bits beside int8: around their middle they have 8.
    middle = 0 if matrix.zero is None or matrix.scheme != "int8" else 128
    codes = (matrix.codes(jnp.int16) - middle).astype(jnp.int8).reshape(groups, size // groups, -1)
    if _in_registers(x):
        product = (codes.astype(jnp.int32) * rows_GxNxg[:, 0, :, None].astype(jnp.int32)).sum(1)[:, None]
    else:
        product = jax.lax.dot_general(rows_GxNxg, codes, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.int32)
    scale = matrix.scale.astype(jnp.float32)[:, None]
    found = product.astype(jnp.float32) * scale
    if matrix.zero is not None:
        whole = rows_GxNxg.astype(jnp.int32).sum(-1, keepdims=True).astype(jnp.float32)
        found += whole * (matrix.zero.astype(jnp.float32)[:, None] + middle * scale)
    return found.sum(0) * step


def _group(matrix: QuantizedMatrix) -> int | None:
    """Inputs of one block in `_by_groups`; None for a matrix that it cannot take."""
    bits = GRIDS[matrix.scheme].bits
    inputs = matrix.values.shape[-2]  # of one of the pieces that a byte holds
    groups = matrix.scale.shape[-2]
    if GRIDS[matrix.scheme].table or matrix.scheme == "fp8" or inputs * (8 // bits) != matrix.size:
        return None
    group = matrix.size // groups if groups > 1 else math.gcd(inputs, 64)
    return group if inputs % group == 0 and group > 1 else None


def _by_groups(x, matrix: QuantizedMatrix, group: int) -> jax.Array:
    """x (in,) times matrix (in, out): (out,) float32, codes first, then scales.

    One batched product for each of the pieces that are packed in a byte, into which XLA:CPU fuses the unpacking: eight
    times as fast as dequantizing first, and faster than a float32 matrix, of which there is more to read.
    """
    bits, low = GRIDS[matrix.scheme].bits, GRIDS[matrix.scheme].low
    pieces, inputs, outputs = 8 // bits, *matrix.values.shape[-2:]
    x = x.reshape(pieces, inputs // group, group)
    scale = matrix.scale.astype(jnp.float32)
    total = []
    for i in range(pieces):
        codes = matrix.values if bits == 8 else (matrix.values >> (bits * i)) & (2**bits - 1)
        codes = codes.reshape(inputs // group, group, outputs).astype(jnp.float32)
        total.append(jax.lax.dot_general(x[i], codes, (((1,), (1,)), ((0,), (0,)))))
    products, sums = jnp.concatenate(total), x.sum(-1).reshape(-1, 1)  # (groups, out), (groups, 1)
    if bits < 8 and matrix.zero is None:
        products += low * sums
    if scale.shape[0] == 1:
        products, sums = products.sum(0, keepdims=True), sums.sum(0, keepdims=True)
    found = products * scale
    if matrix.zero is not None:
        found += sums * matrix.zero.astype(jnp.float32)
    return found.sum(0)


def _rows_by_groups(x, table: QuantizedMatrix) -> jax.Array:
    """x (D,) times each row of a table (V, D) of 8 bits with scales for groups: (V,) float32."""
    x = x.reshape(table.scale.shape[1], -1)
    # Slices instead of an axis of groups, along which XLA:CPU would not vectorise.
    parts = jnp.split(table.values, len(x), 1)
    products = jnp.stack([(part.astype(jnp.float32) * own).sum(1) for part, own in zip(parts, x)], 1)
    found = (products * table.scale.astype(jnp.float32)).sum(-1)
    if table.zero is not None:
        found += table.zero.astype(jnp.float32) @ x.sum(-1)
    return found


def _one_scale(matrix: QuantizedMatrix) -> bool:
    """Whether a scale can be taken out of the sum over inputs, and codes are what is multiplied."""
    return matrix.zero is None and matrix.scheme != "nf4" and matrix.scale.shape[matrix.inputs] == 1


def _in_registers(x) -> bool:
    """XLA:CPU has no fast product of integers and floats; as a sum of products, one row at a time, it fuses the
    conversion."""
    return len(x) == 1 and jax.default_backend() == "cpu"


def _here(matrix, x):
    """Keeps XLA from dequantizing all weights once before a loop over tokens, and reading float32 in it."""
    return jax.lax.optimization_barrier((matrix, x))
