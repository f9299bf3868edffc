"""Products of layers in 8-bit floats, in training (Micikevicius et al. 2022, 2209.05433): E4M3 forward, E5M2 backward.

Each tensor is scaled so that its largest element is the format's largest (current scaling, as TransformerEngine's
Float8CurrentScaling). The usual alternative, delayed scaling, takes the largest elements of past steps and so reads a
tensor once instead of twice; but its history would be a state of every product, which gradients would have to carry
out of the step, and it overflows when a tensor grows suddenly. Current scaling is a pure function.

XLA multiplies 8-bit floats where the hardware can (NVIDIA from Ada and Hopper on) and elsewhere, as on every CPU,
widens them first: the same numbers, and nothing gained.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
"""Weights and activations need digits (3 bits of mantissa), gradients need range (5 bits of exponent)."""
_LEAST = 1e-30  # so that neither the scale of zeros nor that of the smallest numbers is infinite


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Float8Kernel:
    """A kernel in training that layers multiply by in float8. Who does something else with it takes `astype`."""

    kernel: jax.Array

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey("kernel"), self.kernel)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def astype(self, dtype: Any) -> jax.Array:
        """The kernel itself, not rounded to float8."""
        return self.kernel.astype(dtype)


def float8(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(codes of x's shape and `dtype`, scale () float32) whose product is x, rounded. An infinity or a NaN in x makes
    codes of NaN, so that an overflow is seen."""
    x, largest = x.astype(jnp.float32), float(jnp.finfo(dtype).max)
    scale = jnp.abs(x).max(initial=_LEAST) / largest
    return (x / scale).astype(dtype), scale


@jax.custom_vjp
def float8_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (N, in) times kernel (in, out), of one dtype: (N, out) of it. Both are rounded to FORWARD, products are summed
    in float32; the backward pass rounds the gradient of the output to BACKWARD and multiplies it with the rounded x and
    kernel, which are all that is kept."""
    return _forward(x, kernel)[0]


def _forward(x, kernel):
    (x_codes, x_scale), (codes, scale) = float8(x, FORWARD), float8(kernel, FORWARD)
    out = _product(x_codes, codes, (1, 0)) * (x_scale * scale)
    return out.astype(x.dtype), (x_codes, x_scale, codes, scale)


def _backward(kept, d_out):
    x_codes, x_scale, codes, scale = kept
    d_codes, d_scale = float8(d_out, BACKWARD)
    d_x = _product(d_codes, codes, (1, 1)) * (d_scale * scale)
    d_kernel = _product(x_codes, d_codes, (0, 0)) * (x_scale * d_scale)
    return d_x.astype(d_out.dtype), d_kernel.astype(d_out.dtype)


float8_product.defvjp(_forward, _backward)


def _product(a, b, axes):
    """float32 product of two matrices over an axis of each."""
    contract = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)
