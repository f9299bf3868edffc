"""Training with rounded weights: fake quantization as a transform of parameters (QAT).

The model sees weights that lie on the grid on which they will be stored; gradients go to the weights behind them, as if
nothing had been rounded (straight-through; Bengio et al. 2013; Jacob et al. 2018), or to learned scales as well (LSQ,
Esser et al. 2020). What is shipped is exactly what was seen, packed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from slm.compress.quantize import Schemes, layer_schemes, outer_schemes, packed
from slm.compress.schemes import Scheme
from slm.config import Experiment, QuantizeConfig
from slm.models.quantized import RoundedInputs
from slm.training.transforms import ParamTransform, flat, nested, replaced, straight_through


def scheme_of(quantize: QuantizeConfig) -> Scheme:
    """The grid that cfg.quantize names."""
    activations = None if quantize.activations == "none" else quantize.activations
    return Scheme(quantize.scheme, quantize.group_size, quantize.symmetric, activations)


def schemes_of(quantize: QuantizeConfig, params: Any) -> Schemes:
    """The grid of each parameter that is rounded. Raises what `layer_schemes` does."""
    schemes = layer_schemes(params, scheme_of(quantize), quantize.skip, "quantize.skip")
    return schemes | (outer_schemes(params) if quantize.embedding else {})


def quantize_transform(cfg: Experiment, params: Any) -> ParamTransform:
    """The transform of cfg.quantize. It has no state; with LSQ it learns a scale for each that `Scheme.fit` gives.

    Args:
      cfg: of the run.
      params: parameters or their shapes.
    """
    quantize, begin = cfg.quantize, cfg.quantize.begin_step
    schemes = schemes_of(quantize, params)
    learns = quantize.method == "lsq"

    def learn(params):
        leaves = flat(params)
        scales = {name: scheme.fit(leaves[name])[0].astype(jnp.float32) for name, scheme in schemes.items()}
        return {"scale": nested(scales)} if learns else {}

    def apply(params, learned, state, step):
        leaves, rounded = flat(params), {}
        scales = flat(learned["scale"]) if learns else {}
        for name, scheme in schemes.items():
            weights = leaves[name]
            if learns:
                shown = _learned_steps(scheme, weights, scales[name])
            else:
                shown = straight_through(weights, scheme.fake(weights))
            shown = jnp.where(step >= begin, shown, weights) if begin else shown
            rounded[name] = RoundedInputs(shown) if scheme.activations else shown
        return replaced(params, rounded)

    return ParamTransform(lambda params: {}, apply, learn=learn)


def packed_params(cfg: Experiment, params: Any, learned: dict[str, Any]) -> Any:
    """What is shipped of parameters before this transform: the weights that it showed, packed."""
    schemes, grids = schemes_of(cfg.quantize, params), {}
    if cfg.quantize.method == "lsq":
        grids = {
            name: (schemes[name].stored(jnp.asarray(scale)), None) for name, scale in flat(learned["scale"]).items()
        }
    return packed(params, schemes, grids)


def _learned_steps(scheme: Scheme, weights, scale):
    """LSQ (Esser et al. 2020, equations 1 to 5): round(clip(w / s)) s, with the gradient of s scaled by
    1 / sqrt(N Q), N weights to a scale, Q the largest code."""
    low, high = scheme.range
    damped = 1 / math.sqrt(weights.size / scale.size * high)
    scale = scale * damped + jax.lax.stop_gradient(scale - scale * damped)
    scale = straight_through(scale, scheme.stored(scale).astype(jnp.float32))
    spread = scheme.spread(scale, weights)
    codes = jnp.clip(weights / spread, low, high)
    codes = straight_through(codes, scheme.codes(weights, jax.lax.stop_gradient(scale)))
    return codes * spread
