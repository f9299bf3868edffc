"""GPTQ (Frantar et al. 2022, 2210.17323): weights rounded input by input; those to come make up for errors.

The pass over one matrix is slm.compress.second_order.gptq; here are models, layer by layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.compress.calibrate import gram, sweep
from slm.compress.folding import at, put
from slm.compress.schemes import Scheme
from slm.compress.second_order import gptq
from slm.errors import DataError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.quantized import QuantizedMatrix

Choose = Callable[[jax.Array, jax.Array, Scheme, str], tuple[jax.Array, jax.Array, jax.Array | None]]
"""(weights (in, out), X^T X (in, in) of their inputs, scheme, name) -> values on a grid, and its scale and zero."""


def gptq_matrices(
    model: LanguageModel,
    schemes: dict[str, Scheme],
    tokens: np.ndarray,
    damping: float = 0.01,
    act_order: bool = False,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> dict[str, QuantizedMatrix]:
    """As `by_layers`. Raises DataError if no damping up to 100 times the given one makes H invertible."""

    def choose(kernel, h, scheme, name):
        return robust(gptq, kernel, h, scheme, damping, act_order, name)

    return by_layers(model, schemes, tokens, choose, progress)


def by_layers(
    model: LanguageModel,
    schemes: dict[str, Scheme],
    tokens: np.ndarray,
    choose: Choose,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> dict[str, QuantizedMatrix]:
    """The matrices of `schemes`, quantized layer by layer on what the quantized layers before say.

    Args:
      schemes: names of matrices, (layers, in, out), to how they are quantized.
      tokens: (N, T) ids.
      choose: how one matrix is.
    """
    where = layerwise.places(model.transformer)
    scales: dict[str, dict[int, Any]] = {name: {} for name in schemes}

    def change(number, layer, stats):
        place = where[number]
        for path, h in stats.items():
            name = f"{place.group}/{place.number}/{path}/kernel"
            # Layers that share parameters come by again and again: they are rounded the first time.
            if name not in schemes or place.index in scales[name]:
                continue
            node = at(layer, path)
            rounded, scale, zero = choose(node["kernel"], h, schemes[name], name)
            scales[name][place.index] = (scale, zero)
            layer = put(layer, path, node | {"kernel": rounded})
        return layer

    params = sweep(model, tokens, gram, change, progress)
    found = {}
    for name, scheme in schemes.items():
        group, number, *path, _ = name.split("/")
        kernel = at(params[group][number], "/".join(path))["kernel"]
        stacked = [scales[name][i] for i in range(len(kernel))]
        scale = jnp.stack([s for s, _ in stacked])
        zero = None if scheme.symmetric else jnp.stack([z for _, z in stacked])
        found[name] = scheme.pack(kernel, scale, zero)
    return found


def robust(method: Callable, w, h, scheme: Scheme, damping: float, act_order: bool, name: str):
    """`method` with ten times the damping, and again, where H is too close to singular for its Cholesky factor."""
    for more in (1, 10, 100):
        found = method(w, h, scheme, damping * more, act_order)
        if np.isfinite(np.asarray(found[0])).all():
            return found
    raise DataError(f"calibration: the inputs of {name} are not finite, or H cannot be inverted: give more text")
