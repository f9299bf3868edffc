"""Learning rate as a function of the step."""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm.config import OptimConfig
from slm.errors import ConfigError

# Fraction of the decay still to come, at progress p from 0 to 1 through the decay phase.
SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),  # Loshchilov & Hutter 2017, without restarts
    "linear": lambda p: 1 - p,
    "wsd": lambda p: 1 - p,  # Hu et al. 2024 (MiniCPM), with the linear decay of Haegele et al. 2024
    "constant": lambda p: jnp.ones_like(p),
}


def make_schedule(cfg: OptimConfig, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """float32 learning rate of 0-based step t, for a run of `steps` steps; usable under jit and as an optax schedule.

    Warm-up is (t + 1) / warmup_steps of the peak, so the first step already learns and step warmup_steps - 1 reaches
    the peak; from there, or for wsd from the last decay_fraction of all steps, the rate falls to final_ratio of the
    peak, exactly reached at step `steps` - 1 and kept after it. `constant` never falls.

    A warm-up that does not fit into the run is shortened to `steps` - 1, with a warning, so that a short trial of a
    long recipe works.

    Raises:
      ConfigError: final_ratio or decay_fraction out of [0, 1]; schedule-free with a schedule that decays.
    """
    for name in ("final_ratio", "decay_fraction"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ConfigError(f"optim.{name} = {getattr(cfg, name)}: must be between 0 and 1")
    if cfg.name == "schedule_free_adamw" and cfg.schedule != "constant":
        raise ConfigError(
            f"optim.schedule = {cfg.schedule}: schedule_free_adamw averages the weights instead of decaying the "
            "learning rate; set optim.schedule to constant (warm-up stays)"
        )
    warmup = min(cfg.warmup_steps, steps - 1)
    if warmup < cfg.warmup_steps:
        warnings.warn(
            f"optim.warmup_steps = {cfg.warmup_steps} does not fit into train.steps = {steps}: using {warmup}",
            stacklevel=1,
        )
    last = steps - 1
    start = max(warmup - 1, 0)
    if cfg.schedule == "wsd":
        start = max(start, last - round(cfg.decay_fraction * steps))

    def schedule(step):
        t = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((t + 1) / max(warmup, 1), 1)
        progress = jnp.clip((t - start) / max(last - start, 1), 0, 1)
        falling = cfg.final_ratio + (1 - cfg.final_ratio) * SHAPES[cfg.schedule](progress)
        return cfg.learning_rate * rising * falling

    return schedule
