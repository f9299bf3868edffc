"""Primitives of jaxprs that ONNX lacks, written with primitives that it has: traced again and converted."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax


def log1p(x):
    """Kahan's: what rounding loses of 1 + x is the same above and below the line."""
    u = 1 + x
    return jnp.where(jnp.abs(x) < 1, jnp.where(u == 1, x, lax.log(u) * x / (u - 1)), lax.log(u))


def expm1(x):
    """By sinh near zero, where the difference would cancel."""
    return jnp.where(jnp.abs(x) < 1, 2 * lax.sinh(x / 2) * lax.exp(x / 2), lax.exp(x) - 1)


def integer_pow(x, y):
    return x * x if y == 2 else lax.pow(x, jnp.asarray(y, x.dtype))


REWRITTEN: dict[str, Callable] = {
    "log1p": log1p,
    "expm1": expm1,
    "integer_pow": integer_pow,
    "rsqrt": lambda x: 1 / lax.sqrt(x),
    "square": lambda x: x * x,
    "erfc": lambda x: 1 - lax.erf(x),
    "exp2": lambda x: lax.exp(x * jnp.asarray(np.log(2), x.dtype)),
    "clamp": lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high),
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
}
"""Primitive to a function of its operands, and of its parameters by name where it takes any."""
