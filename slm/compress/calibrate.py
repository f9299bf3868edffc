"""What a model's matrices are given to multiply, measured layer by layer on sample text.

Pruning and quantizing one shot weigh an error in a weight by what will meet it (Optimal Brain Surgeon, Hassibi & Stork
1993). Layers are taken in order of depth, and each is measured on what the layers before it, already changed, now say:
then a later layer can make up for an earlier one (GPTQ, Frantar et al. 2022; SparseGPT, Frantar & Alistarh 2023).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import DataError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.layers import Dense
from slm.models.watch import Take

SEQUENCES, LENGTH, ROWS = 64, 256, 4
"""By default: texts, tokens in each, and texts that are run at once."""

Change = Callable[[int, Any, dict[str, Any]], Any]
"""(number of the layer, its parameters, statistics by path of a matrix inside it) -> its new parameters."""


def calibration_tokens(
    model: LanguageModel, source: Any, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 0
) -> np.ndarray:
    """(sequences, length) int32 ids to calibrate with.

    Args:
      model: whose tokenizer cuts the text.
      source: a text, from which windows are drawn; or (N, T) ids, of which the first are taken.
      sequences, length: how much. Shorter rows are taken whole, fewer rows if there are no more.
      seed: of the drawing.

    Raises DataError if the text is shorter than two windows.
    """
    if not isinstance(source, str):
        return np.asarray(source, np.int32)[:sequences, :length]
    ids = np.asarray(model.tokenizer.encode(source), np.int32)
    if len(ids) < 2 * length:
        raise DataError(f"calibration text has {len(ids)} tokens: give at least {2 * length}, or shorter sequences")
    starts = np.random.default_rng(seed).integers(0, len(ids) - length, sequences)
    return ids[starts[:, None] + np.arange(length)]


def gram(path: str, module: Any, inputs: tuple, output: Any) -> Any:
    """Takes X^T X (in, in) of the inputs X of every matrix."""
    if not isinstance(module, Dense):
        return None
    x = inputs[0].reshape(-1, inputs[0].shape[-1]).astype(jnp.float32)
    return x.T @ x


def squares(path: str, module: Any, inputs: tuple, output: Any) -> Any:
    """Takes the sum of squares of each input (in,) of every matrix."""
    if not isinstance(module, Dense):
        return None
    return jnp.square(inputs[0].astype(jnp.float32)).reshape(-1, inputs[0].shape[-1]).sum(0)


def sweep(
    model: LanguageModel,
    tokens: np.ndarray,
    take: Take,
    change: Change,
    progress: Callable[[int, int], None] = lambda done, layers: None,
    combine: Callable[[jax.Array, jax.Array], jax.Array] = jnp.add,
) -> Any:
    """The model's parameters after `change` has seen, and perhaps replaced, each layer in order of depth.

    Args:
      model: with float parameters.
      tokens: (N, T) ids.
      take: what to measure, summed over all batches, or joined by `combine`; a function that lives longer than this
        call.
      change: see `Change`; it is given the layer as it was and what it was given by the changed layers before it.
      progress: called after each layer.
    """
    transformer, params = model.transformer, jax.tree.map(np.array, model.params)
    xs = [layerwise.enter(transformer, model.params, rows) for rows in _batches(tokens)]
    where = layerwise.places(transformer)
    for number, place in enumerate(where):
        layer = jax.tree.map(jnp.asarray, layerwise.layer_params(params, place))
        total = None
        for x in xs:
            _, seen = layerwise.run(transformer, number, layer, x, take)
            total = seen if total is None else jax.tree.map(combine, total, seen)
        new = change(number, layer, total)
        params = layerwise.with_layer(params, place, new)
        xs = [layerwise.run(transformer, number, new, x)[0] for x in xs]
        progress(number + 1, len(where))
    return jax.tree.map(jnp.asarray, params)


def _batches(tokens):
    return [tokens[i : i + ROWS] for i in range(0, len(tokens), ROWS)]
