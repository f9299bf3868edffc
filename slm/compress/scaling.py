"""Factors for input channels, folded into what comes before, so that quantizing loses less: AWQ and SmoothQuant.

AWQ (Lin et al. 2023, 2306.00978): channels of large inputs get finer steps, s = mean|x|^alpha, alpha in a grid for the
least squared error of what a feed's readers say; its clipped ranges are slm.compress.clipping. SmoothQuant (Xiao et al.
2022, 2211.10438, eq. 4): s = max|x|^alpha / max|w|^(1 - alpha) in the other direction, so that inputs without outliers
lose less in 8 bits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.compress.calibrate import sweep
from slm.compress.folding import at, check_same, feeds, fold, norms, replaced, shared
from slm.compress.schemes import Scheme
from slm.errors import ConfigError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.layers import Dense
from slm.models.mixers import layers

GRID = 20
"""Powers that AWQ tries, 0, 1/20 ... 19/20."""
SMALLEST = 1e-5


def awq(model: LanguageModel, schemes: dict[str, Scheme], tokens: np.ndarray, progress) -> LanguageModel:
    """An equal model, whose matrices lose less by rounding to nearest.

    Args:
      schemes: name of a matrix (layers, in, out) to how it will be quantized.
      tokens: (N, T) ids to measure inputs with.

    Raises ConfigError if nothing in the model can be scaled.
    """

    def factors(layer, feed, params, stats, named):
        readers = [(at(params, path)["kernel"], named[path]) for path in feed.readers]
        seen = stats[feed.readers[0]]
        mean = shared(layer, feed, seen["absolute"])
        tried = [powered(mean, n / GRID) for n in range(GRID)]
        kernels, settings = [w for w, _ in readers], tuple(scheme for _, scheme in readers)
        losses = [scaled_loss(s, seen["gram"], kernels, settings) for s in tried]
        return tried[int(np.argmin(np.asarray(losses)))]

    return _folded("awq", model, schemes, tokens, gram_and_absolute, feeds, factors, progress, jnp.add)


def smoothquant(
    model: LanguageModel, schemes: dict[str, Scheme], tokens: np.ndarray, migration: float, progress
) -> LanguageModel:
    """An equal model with smaller inputs and larger weights behind its norms.

    Args:
      migration: alpha: how much of the difficulty moves from inputs to weights, from 0 to 1.

    Raises ConfigError for another migration, or if nothing in the model can be scaled.
    """
    if not 0 <= migration <= 1:
        raise ConfigError(f"quantize.migration = {migration}: from 0, weights as they are, to 1")

    def factors(layer, feed, params, stats, named):
        weights = jnp.stack([jnp.abs(at(params, path)["kernel"]).max(1) for path in feed.readers]).max(0)
        inputs = jnp.maximum(stats[feed.readers[0]], SMALLEST)
        return jnp.maximum(inputs**migration / jnp.maximum(weights, SMALLEST) ** (1 - migration), SMALLEST)

    return _folded("smoothquant", model, schemes, tokens, largest, norms, factors, progress, jnp.maximum)


def _folded(method, model, schemes, tokens, take, table: Callable, factors: Callable, progress, combine):
    where, kinds, folded = layerwise.places(model.transformer), layers(model.config.model), []
    if model.config.model.shared_layers:
        raise ConfigError(f"quantize.method = {method}: layers that share parameters have inputs of their own: use hqq")

    def change(number, params, stats):
        place, layer = where[number], kinds[number]
        named = {path: schemes.get(f"{place.group}/{place.number}/{path}/kernel") for path in stats}
        for feed in table(layer, params):
            # All that read a source are scaled, so all must be quantized, or are left alone.
            if all(named.get(path) for path in feed.readers):
                params = fold(layer, params, feed, factors(layer, feed, params, stats, named))
                folded.append(feed)
        return params

    after = replaced(model, sweep(model, tokens, take, change, progress, combine))
    if not folded:
        raise ConfigError(f"quantize.method = {method}: nothing in this model can be scaled; use gptq or hqq")
    check_same(method, model, after, tokens)
    return after


def powered(mean: jax.Array, power: float) -> jax.Array:
    """Factors mean^power, about one."""
    s = jnp.maximum(jnp.maximum(mean, SMALLEST) ** power, 1e-4)
    return s / jnp.sqrt(s.max() * s.min())


@functools.partial(jax.jit, static_argnums=3)
def scaled_loss(s: jax.Array, gram: jax.Array, kernels: list, schemes: tuple[Scheme, ...]) -> jax.Array:
    """Sum over matrices (in, out) of |X dW|^2, dW the error of rounding rows that are multiplied by s."""
    total = 0.0
    for w, scheme in zip(kernels, schemes):
        error = scheme.fake(w * s[:, None]) / s[:, None] - w
        total += ((gram @ error) * error).sum()
    return total


def gram_and_absolute(path: str, module: Any, inputs: tuple, output: Any) -> Any:
    """Takes X^T X (in, in) and the sum of |x| (in,) of every matrix's inputs."""
    if not isinstance(module, Dense):
        return None
    x = inputs[0].reshape(-1, inputs[0].shape[-1]).astype(jnp.float32)
    return {"gram": x.T @ x, "absolute": jnp.abs(x).sum(0)}


def largest(path: str, module: Any, inputs: tuple, output: Any) -> Any:
    """Takes the largest |x| (in,) of every matrix's inputs."""
    if not isinstance(module, Dense):
        return None
    return jnp.abs(inputs[0].reshape(-1, inputs[0].shape[-1]).astype(jnp.float32)).max(0)
