"""All that a run carries from one step to the next, as one pytree: this is what is donated, saved and restored."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LossScale:
    """Dynamic loss scale of float16 training (Micikevicius et al. 2018)."""

    scale: jax.Array
    """float32 (): what the loss is multiplied by before the backward pass."""
    good_steps: jax.Array
    """int32 (): steps without overflow since the scale last changed."""
    skipped: jax.Array
    """int32 (): steps skipped because a gradient overflowed."""
    skipped_in_a_row: jax.Array
    """int32 (): of these, how many the last steps were; training stops when stuck."""

    @classmethod
    def create(cls) -> "LossScale":
        return cls(jnp.float32(2.0**15), jnp.int32(0), jnp.int32(0), jnp.int32(0))


@flax.struct.dataclass
class Extra:
    """What techniques carry beside the model (slm.training.transforms, slm.training.objective)."""

    learned: dict[str, Any]
    """Their own parameters by technique: learned scales, projections, adapters. float32."""
    opt_state: Any
    """Adam's, of `learned`."""
    transforms: dict[str, Any]
    """State of each transform, such as masks."""


@flax.struct.dataclass
class TrainState:
    """Parameters and everything that moves with them."""

    step: jax.Array
    """int32 (): optimizer steps done. Data and randomness are functions of (seed, step), so nothing else is needed."""
    params: Any
    """float32 master weights."""
    opt_state: Any
    ema: Any
    """float32 exponential moving average of params, or None."""
    loss_scale: LossScale | None
    """None unless precision is float16."""
    extra: Extra | None = None
    """None without techniques."""
