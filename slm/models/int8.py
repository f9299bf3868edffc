"""Matrices of 8-bit integers with one float32 scale for each output, for running a model, not for training it.

Weights are rounded to the nearest of 255 steps of their column's largest (symmetric, per channel: Jacob et al. 2018,
1712.05877, with a zero point of 0). Products are of floats: a matrix is dequantized where it is multiplied. For one row
that is done in registers, so that a decode step reads a quarter of float32's bytes.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slm.errors import ConfigError

LARGEST = 127


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Int8Matrix:
    """values * scale; stands wherever a kernel (..., in, out) or an embedding (V, D) stands among parameters.

    In paths of parameters it looks like a dict, so that rules by name hold.
    """

    values: jax.Array
    """int8, of the matrix's shape."""
    scale: jax.Array
    """float32, of size 1 where the matrix's inputs are: (..., 1, out), or (V, 1)."""

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey(name), getattr(self, name)) for name in ("values", "scale")], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, rows) -> jax.Array:
        """Rows of an embedding, float32."""
        return self.values[rows] * self.scale[rows]

    def astype(self, dtype: Any) -> jax.Array:
        """Dequantized."""
        return (self.values * self.scale).astype(dtype)


def as_array(matrix) -> jax.Array:
    """A matrix of parameters as floats."""
    return matrix.astype(jnp.float32) if isinstance(matrix, Int8Matrix) else matrix


def check_float_weights(params: Any) -> None:
    """Raises ConfigError if there is an Int8Matrix among the parameters."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Int8Matrix))
    if any(isinstance(leaf, Int8Matrix) for leaf in leaves):
        raise ConfigError("slm.int8_weights makes models for running only: save the model that this one comes from")


def to_int8(matrix: jax.Array, inputs: int) -> Int8Matrix:
    """The nearest Int8Matrix to a float matrix whose inputs lie along axis `inputs`."""
    matrix = jnp.asarray(matrix, jnp.float32)
    scale = jnp.abs(matrix).max(inputs, keepdims=True) / LARGEST
    values = jnp.round(matrix / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return Int8Matrix(values, scale)


def int8_product(x, matrix: Int8Matrix) -> jax.Array:
    """x (N, in) times matrix (in, out): (N, out) of x's dtype."""
    if _in_registers(x):
        values, x = _here(matrix.values, x)
        product = (values.astype(jnp.float32) * x[0].astype(jnp.float32)[:, None]).sum(0)[None]
    else:
        product = x @ matrix.values.astype(x.dtype)
    return (product * matrix.scale).astype(x.dtype)


def int8_similarity(x, table: Int8Matrix) -> jax.Array:
    """x (N, D) times each row of an embedding (V, D): (N, V) of x's dtype."""
    # Not int8_product with the transpose, which would be read against the order in which it lies: 25 times slower.
    if _in_registers(x):
        values, x = _here(table.values, x)
        product = (values.astype(jnp.float32) * x[0].astype(jnp.float32)).sum(1)[None]
    else:
        product = x @ table.values.T.astype(x.dtype)
    return (product * table.scale.T).astype(x.dtype)


def _in_registers(x) -> bool:
    """XLA:CPU has no fast product of integers and floats; as a sum of products, one row at a time, it fuses the
    conversion."""
    return len(x) == 1 and jax.default_backend() == "cpu"


def _here(values, x):
    """Keeps XLA from converting all weights once before a loop over tokens, and reading float32 in it."""
    return jax.lax.optimization_barrier((values, x))
