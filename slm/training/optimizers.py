"""Optimizers: a direction, then decoupled weight decay by name rules, then the learning rate.

None of them clips: the train step calls `clip_by_global_norm`, whose norm it also reports. All state is float32 or
int32 arrays, so it is saved, restored and sharded like parameters.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from slm.config import OptimConfig
from slm.errors import ConfigError
from slm.models.paths import flat
from slm.training import rules
from slm.training.schedules import make_schedule

# An orthogonal matrix has root mean square 1 / sqrt(max(fan_in, fan_out)). Multiplied by that root and by this, the
# update has the 0.2 to 0.4 that AdamW's shows in practice, so that one learning rate and one weight decay serve both
# (Liu et al. 2025, Moonlight, section 2.2).
MUON_RMS = 0.2


def assignments(cfg: OptimConfig, params: Any) -> dict[str, Any]:
    """Trees like `params`: "decay" (bool: weight decay applies) and "optimizer" (its name). Raises ConfigError."""
    if cfg.name == "muon":
        names = rules.assign(rules.MUON, params)
    else:
        names = jax.tree.map(lambda _: cfg.name, params)
    return {"decay": rules.assign(rules.DECAY, params), "optimizer": names}


def make_optimizer(
    cfg: OptimConfig, steps: int, params: Any, trained: set[str] | None = None
) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps.

    Args:
      cfg: cfg.optim.
      steps: length of the run, which the schedule needs.
      params: parameters or their ShapeDtypeStructs; only names are used, to apply the rules.
      trained: names of those that it will be given (see `select`); None: all.

    Raises:
      ConfigError: a parameter without exactly one rule, or settings that contradict each other.
    """
    assigned = {name: select(tree, trained) for name, tree in assignments(cfg, params).items()}
    schedule = make_schedule(cfg, steps)
    decay_and_rate = (
        optax.add_decayed_weights(cfg.weight_decay, mask=assigned["decay"]),
        optax.scale_by_learning_rate(schedule),
    )
    if cfg.name == "schedule_free_adamw":
        return _schedule_free(cfg, schedule, decay_and_rate)
    directions = {
        "adamw": _adam,  # Loshchilov & Hutter 2019
        "lion": lambda cfg: optax.scale_by_lion(cfg.b1, cfg.b2),  # Chen et al. 2023
        "adafactor": _adafactor,
        "muon": lambda cfg: optax.partition({"muon": _muon(cfg), "adamw": _adam(cfg)}, assigned["optimizer"]),
    }
    return optax.chain(directions[cfg.name](cfg), *decay_and_rate)


def optimizer_of_learned(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Adam without decay, at the run's learning rate, for parameters of techniques: scales, projections, adapters."""
    return optax.chain(_adam(cfg), optax.scale_by_learning_rate(make_schedule(cfg, steps)))


def trained_names(cfg: OptimConfig, params: Any, frozen: bool = False) -> set[str] | None:
    """Names of the parameters that train; None: all; none of them if `frozen`.

    Raises ConfigError for a pattern of cfg.only that matches none.
    """
    if frozen:
        return set()
    if not cfg.only:
        return None
    names = rules.paths(params)
    for pattern in cfg.only:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ConfigError(
                f"optim.only = {pattern!r} matches no parameter; there are, for example: {', '.join(names[:5])}"
            )
    return {name for name in names if any(re.fullmatch(pattern, name) for pattern in cfg.only)}


def select(tree: Any, names: set[str] | None, prefix: str = "") -> Any:
    """A tree of dicts without the leaves whose names are not in `names`; None: all of it."""
    if names is None or not isinstance(tree, dict):
        return tree
    kept = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if not isinstance(value, dict):
            kept |= {key: value} if path in names else {}
        elif inner := select(value, names, f"{path}/"):
            kept[key] = inner
    return kept


def merge(tree: Any, selected: Any) -> Any:
    """`tree` with the leaves of `selected`, which `select` made of a tree like it."""
    if not isinstance(selected, dict):
        return selected
    return {key: merge(value, selected[key]) if key in selected else value for key, value in tree.items()}


def _adam(cfg: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)


def _adafactor(cfg: OptimConfig) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018) as simplified by Zhai et al. 2022, section 3.3: factored second moment with
    capped decay, first moment, no scaling by parameter size and no clipping by block, so that it takes AdamW's learning
    rate and a stack of layers is updated as each layer would be. b1 = 0 drops the first moment and its memory.
    """

    def second_moment_decay(step, exponent):
        return jnp.minimum(cfg.b2, 1 - jnp.asarray(step + 1, jnp.float32) ** -exponent)

    # optax factors the two largest dimensions, if both are at least 128: never the stack, unless it is 128 layers deep.
    second = optax.scale_by_factored_rms(decay_rate_fn=second_moment_decay)
    return optax.chain(second, optax.ema(cfg.b1)) if cfg.b1 else second


def _muon(cfg: OptimConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on the last two dimensions, (fan_in, fan_out); leading ones stack independent matrices.

    Composed from optax's parts because `optax.contrib.muon` decays all parameters of its Adam half, norms and
    embedding included, and turns that half into NAdam whenever Muon uses Nesterov momentum.
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def match_rms(updates, params):
        return jax.tree.map(lambda u: MUON_RMS * max(u.shape[-2:]) ** 0.5 * u, updates)

    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=cfg.momentum, nesterov=True, weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: matrix, tree)
        ),
        optax.stateless(match_rms),
    )


def _schedule_free(cfg: OptimConfig, schedule, decay_and_rate) -> optax.GradientTransformation:
    """Schedule-free AdamW (Defazio et al. 2024, algorithm 1): parameters are y, the state holds z; x is the average."""
    if not 0 < cfg.b1 < 1:
        raise ConfigError(f"optim.b1 = {cfg.b1}: schedule_free_adamw interpolates by it; must be between 0 and 1")
    # Adam without first moment, whose role the interpolation plays.
    second = optax.scale_by_rms(cfg.b2, cfg.eps, eps_in_sqrt=False, bias_correction=True)
    # optax counts the averaging weight's steps from 1, but those of the base optimizer from 0.
    return optax.contrib.schedule_free(
        optax.chain(second, *decay_and_rate), learning_rate=lambda count: schedule(count - 1), b1=cfg.b1
    )


def evaluation_params(cfg: OptimConfig, opt_state: Any, params: Any) -> Any:
    """Weights to evaluate, sample from and ship: the average x for schedule-free, else `params`. Works under jit."""
    if cfg.name != "schedule_free_adamw":
        return params
    trained = select(params, set(flat(opt_state.z)))
    return merge(params, optax.contrib.schedule_free_eval_params(opt_state, trained))


def clip_by_global_norm(grads: Any, max_norm: float | None) -> tuple[Any, jax.Array]:
    """(`grads` scaled to a global norm of at most max_norm, their norm before that as float32 ()).

    None only measures. If any gradient is infinite or NaN, or the sum of squares exceeds float32, the norm is infinite
    or NaN and the gradients come back unchanged: scaling by it would turn all of them into zeros or NaNs and hide where
    the trouble is. The caller sees it in the norm.

    Raises:
      ConfigError: max_norm is not positive.
    """
    if max_norm is not None and max_norm <= 0:
        raise ConfigError(f"optim.clip_norm = {max_norm}: must be above 0; None turns clipping off")
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
    if max_norm is None:
        return grads, norm
    factor = jnp.where(jnp.isfinite(norm), max_norm / jnp.maximum(norm, max_norm), 1.0)
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), norm
