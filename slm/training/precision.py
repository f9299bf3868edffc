"""Compute precision: the dynamic loss scale that float16 needs, and which products are of 8-bit floats.

Master weights and optimizer state are float32 whatever the compute precision (Micikevicius et al. 2018). bfloat16 has
the exponent range of float32 and needs no scaling; float16 gradients underflow below 6e-8 without it. fp8 is bfloat16
with the products of layers in float8, each tensor with a scale of its own (slm.models.float8).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from slm.models.float8 import Float8Kernel
from slm.models.transformer import GROUPS
from slm.training.state import LossScale

GROW_AFTER = 2000  # finite steps before the scale doubles, as in PyTorch's GradScaler and NVIDIA Apex
LARGEST = 2.0**24
SMALLEST = 1.0
# Halving from LARGEST reaches SMALLEST within 24 steps, so by now the smallest scale has overflowed at least 10 times:
# the gradients are not too large for float16, they are broken.
STUCK_AFTER = int(math.log2(LARGEST / SMALLEST)) + 10


def compute_dtype(precision: str) -> jnp.dtype:
    """dtype of activations and matrix products for train.precision; in fp8, of all but the products of layers."""
    return jnp.dtype({"fp8": "bfloat16"}.get(precision, precision))


def cast(params: Any, dtype: Any) -> Any:
    """`params` with what enters matrix products, leaves called `kernel` or `embedding`, as `dtype`.

    All else stays float32: it is small, and rounding a decay rate or the bias of a step size to 8 bits changes what a
    recurrence remembers (published code keeps them in float32 too). Modules round norms and biases where they use them.
    """

    def one(path, x):
        return x.astype(dtype) if path[-1].key in ("kernel", "embedding") else x

    return jax.tree_util.tree_map_with_path(one, params)


def float8_kernels(params: Any) -> Any:
    """`params` with the kernels of layers marked for products in float8; embedding and head keep the compute dtype."""

    def one(path, x):
        return Float8Kernel(x) if path[0].key in GROUPS and path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(one, params)


def unscale(grads: Any, loss_scale: LossScale) -> Any:
    """float32 gradients of the unscaled loss; an overflow stays infinite or NaN. Call before clipping."""
    return jax.tree.map(lambda g: g.astype(jnp.float32) / loss_scale.scale, grads)


def all_finite(tree: Any) -> jax.Array:
    """bool (): no leaf holds an infinity or a NaN."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def update(loss_scale: LossScale, finite: jax.Array) -> LossScale:
    """The scale for the next step: doubled after GROW_AFTER finite steps in a row, halved after an overflow.

    Args:
      loss_scale: the one the step used.
      finite: bool (); False: the step's gradients overflowed and the step was skipped.
    """
    good_steps = jnp.where(finite, loss_scale.good_steps + 1, 0)
    grow = good_steps >= GROW_AFTER
    grown = jnp.where(grow, jnp.minimum(loss_scale.scale * 2, LARGEST), loss_scale.scale)
    return LossScale(
        scale=jnp.where(finite, grown, jnp.maximum(loss_scale.scale / 2, SMALLEST)),
        good_steps=jnp.where(grow, 0, good_steps),
        skipped=loss_scale.skipped + jnp.where(finite, 0, 1),
        skipped_in_a_row=jnp.where(finite, 0, loss_scale.skipped_in_a_row + 1),
    )
