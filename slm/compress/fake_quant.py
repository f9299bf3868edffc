"""Training with rounded weights: fake quantization as a transform of parameters (QAT).

The model sees weights that lie on the grid on which they will be stored; gradients go to the weights behind them, as if
nothing had been rounded (straight-through; Bengio et al. 2013; Jacob et al. 2018), or to learned scales as well (LSQ,
Esser et al. 2020). What is shipped is exactly what was seen, packed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from slm.compress.quantize import TABLES, quantizable
from slm.compress.schemes import Scheme
from slm.config import Experiment, QuantizeConfig
from slm.models.paths import flat, nested
from slm.models.quantized import spread
from slm.models.quantized_products import RoundedInputs
from slm.training.transforms import Moving, ParamTransform, replaced, straight_through

Schemes = dict[str, tuple[Scheme, int]]
"""Name of a matrix to its grid and the axis of its inputs."""


def schemes_of(quantize: QuantizeConfig, params: Any) -> Schemes:
    """The grid of each parameter that is rounded. Raises ConfigError for patterns that match none, and groups that do
    not divide a matrix."""
    scheme = Scheme(quantize.scheme, quantize.group_size, quantize.symmetric, quantize.activations)
    schemes = dict.fromkeys(quantizable(params, quantize.skip), (scheme, -2))
    if quantize.embedding:
        table = Scheme("int8", quantize.group_size)
        schemes |= {name: (table, axis) for name, axis in TABLES.items() if name in flat(params)}
    leaves = flat(params)
    for name, (one, axis) in schemes.items():
        one.check(name, leaves[name].shape[axis])
    return schemes


def quantize_transform(cfg: Experiment, params: Any) -> ParamTransform:
    """The transform of cfg.quantize. It has no state but with LSQ: there {"scale": what `Scheme.fit` gave when rounding
    began}, and {"change": of each scale, as a share of it} is learned, so that a step of the optimizer means the same
    for scales of any size.

    Args:
      cfg: of the run.
      params: parameters or their shapes.
    """
    quantize, begin = cfg.quantize, cfg.quantize.begin_step
    schemes = schemes_of(quantize, params)
    learns = quantize.method == "lsq"

    def fitted(params):
        leaves = flat(params)
        return nested({name: scheme.fit(leaves[name], axis)[0] for name, (scheme, axis) in schemes.items()})

    def init(params):
        return {"scale": fitted(params)} if learns else {}

    def learn(params):
        return {"change": jax.tree.map(jnp.zeros_like, fitted(params))} if learns else {}

    def apply(params, learned, state, step):
        leaves, rounded = flat(params), {}
        scales = _scales(learned, state) if learns else {}
        for name, (scheme, axis) in schemes.items():
            weights = leaves[name]
            if learns:
                shown = _learned_steps(scheme, weights, scales[name], axis)
            else:
                shown = straight_through(weights, scheme.fake(weights, inputs=axis))
            shown = jnp.where(step >= begin, shown, weights) if begin else shown
            if scheme.activations == "int8":
                begun = jnp.full(weights.shape[:-2], step >= begin, jnp.float32) if begin else None
                shown = RoundedInputs(shown, begun)
            rounded[name] = shown
        return replaced(params, rounded)

    def update(state, moving: Moving):
        if learns and begin:  # scales fit the weights of the step at which rounding begins
            state = jax.lax.cond(moving.step <= begin, lambda: {"scale": fitted(moving.params)}, lambda: state)
        return state, moving

    return ParamTransform(init, apply, update, learn)


def packed_params(cfg: Experiment, params: Any, learned: dict[str, Any], state: dict[str, Any]) -> Any:
    """What is shipped of parameters before this transform: the weights that it showed, packed."""
    scales = _scales(learned, state) if cfg.quantize.method == "lsq" else {}
    leaves = flat(params)
    return replaced(
        params,
        {
            name: scheme.pack(leaves[name], scales.get(name), inputs=axis)
            for name, (scheme, axis) in schemes_of(cfg.quantize, params).items()
        },
    )


def _scales(learned, state):
    changes = flat(learned["change"])
    return {name: scale * (1 + changes[name]) for name, scale in flat(state["scale"]).items()}


def _learned_steps(scheme: Scheme, weights, scale, axis=-2):
    """LSQ (Esser et al. 2020, equations 1 to 5): round(clip(w / s)) s, with the gradient of s scaled by
    1 / sqrt(N Q), N weights to a scale, Q the largest code."""
    low, high = scheme.range
    damped = 1 / math.sqrt(weights.size / scale.size * high)
    scale = scale * damped + jax.lax.stop_gradient(scale - scale * damped)
    stored, _ = scheme.stored(jax.lax.stop_gradient(scale))
    scale = straight_through(scale, stored)
    spread_scale = spread(scale, weights.shape[axis], axis)
    codes = jnp.clip(weights / spread_scale, low, high)
    codes = straight_through(codes, scheme.codes(weights, stored, inputs=axis))
    return codes * spread_scale
