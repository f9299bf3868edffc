"""Bits for each matrix by how much it matters, under a budget of size (cf. HAWQ, Dong et al. 2019, 1905.03696).

Sensitivity is measured, not estimated: the KL divergence of the model's next token from that of the model with this
matrix, or this layer, alone on a coarser grid. Effects are taken to add up. From the coarsest grid everywhere, whatever
takes away most divergence for its bits goes up, as long as it fits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.compress.folding import replaced
from slm.compress.schemes import Scheme
from slm.errors import ConfigError
from slm.models import layerwise
from slm.models.language_model import LanguageModel, answers
from slm.models.mixers import layer_pattern

CHOICES = ("int2", "int4", "int8")
"""Grids to choose from, by stored bits."""
SEQUENCES, LENGTH = 8, 128
"""Most calibration sequences that sensitivities are measured on, and tokens of each."""


def unrolled(model: LanguageModel) -> LanguageModel:
    """The same model with every layer's parameters for themselves, `blocks/i`, so that each may have other bits.

    It compiles layer by layer, longer than a scan. Raises ConfigError where layers share parameters.
    """
    cfg = model.config.model
    if cfg.shared_layers:
        raise ConfigError("quantize.budget_by = layer: the layers of this model are one; use matrix")
    pattern, where = layer_pattern(cfg), layerwise.places(model.transformer)
    layers = [layerwise.layer_params(model.params, place) for place in where]
    layers = [jax.tree.map(lambda a: a[None], layer) for layer in layers]
    params = {name: part for name, part in model.params.items() if name not in ("first", "blocks", "tail")}
    if not cfg.first_norm and len(layers) > 1:
        params["first"], layers = {"0": layers[0]}, layers[1:]
    params["blocks"] = {str(i): layer for i, layer in enumerate(layers)}
    return replaced(model, params, attention=tuple(pattern[i % len(pattern)] for i in range(cfg.layers)))


def choose(
    model: LanguageModel, names: list[str], base: Scheme, budget_bits: float, by: str, tokens: np.ndarray
) -> dict[str, Scheme]:
    """Name of each matrix to its scheme.

    Args:
      model: with float weights; unrolled for by = layer.
      names: of the matrices (layers, in, out).
      base: group size, symmetry and activations of all.
      budget_bits: most bits a weight, scales included, over all these matrices.
      by: `matrix`, each by itself; `layer`, all of `blocks/i` alike.
      tokens: (N, T) ids to measure with.

    Raises ConfigError for a budget that not even the coarsest grid keeps.
    """
    schemes = [dataclasses.replace(base, name=name) for name in CHOICES]
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(name if by == "matrix" else "/".join(name.split("/")[:2]), []).append(name)
    sizes = {unit: [sum(stored_bits(model.params, n, s) for n in of) for s in schemes] for unit, of in units.items()}
    weights = sum(leaf(model.params, name).size for name in names)
    if (least := sum(size[0] for size in sizes.values()) / weights) > budget_bits:
        raise ConfigError(
            f"quantize.budget_bits = {budget_bits}: {CHOICES[0]} already takes {least:.2f} bits a weight with its "
            "scales; give more, or larger groups"
        )
    losses = {unit: [sensitivity(model, of, scheme, tokens) for scheme in schemes] for unit, of in units.items()}
    chosen = spend(losses, sizes, budget_bits * weights)
    return {name: schemes[chosen[unit]] for unit, of in units.items() for name in of}


def spend(losses: dict[str, list[float]], sizes: dict[str, list[float]], budget: float) -> dict[str, int]:
    """Number of the choice of each unit, from coarse to fine: greedily, by loss saved for each bit added.

    A step may skip a choice that saves nothing by itself. Never above the budget, if the coarsest choices are not.
    """
    chosen, left = dict.fromkeys(losses, 0), budget - sum(size[0] for size in sizes.values())
    while True:
        steps = [
            ((losses[unit][now] - losses[unit][to]) / (sizes[unit][to] - sizes[unit][now]), unit, to)
            for unit, now in chosen.items()
            for to in range(now + 1, len(losses[unit]))
            if losses[unit][to] < losses[unit][now] and sizes[unit][to] - sizes[unit][now] <= left
        ]
        if not steps:
            return chosen
        _, unit, to = max(steps)
        left -= sizes[unit][to] - sizes[unit][chosen[unit]]
        chosen[unit] = to


def sensitivity(model: LanguageModel, names: list[str], scheme: Scheme, tokens: np.ndarray) -> float:
    """Mean KL(model || model with these matrices rounded) of the next token, in nats."""
    tokens = jnp.asarray(tokens[:SEQUENCES, :LENGTH])
    rounded = model.params
    for name in names:
        rounded = _put(rounded, name.split("/"), scheme.fake(leaf(model.params, name)))
    return float(np.mean([_divergence(model.transformer, model.params, rounded, row[None]) for row in tokens]))


@jax.jit
def _kl(p, q):
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return (jnp.exp(p) * (p - q)).sum(-1).mean()


_logits = jax.jit(answers, static_argnums=0)


def _divergence(transformer, params, rounded, tokens):
    return _kl(_logits(transformer, params, tokens), _logits(transformer, rounded, tokens))


def stored_bits(params: Any, name: str, scheme: Scheme) -> int:
    """Bits that a matrix takes with its scales."""
    return 8 * jax.eval_shape(scheme.pack, leaf(params, name)).nbytes


def leaf(params: Any, name: str) -> Any:
    """A parameter by its name."""
    for key in name.split("/"):
        params = params[key]
    return params


def _put(tree, path, value):
    return tree | {path[0]: _put(tree[path[0]], path[1:], value) if path[1:] else value}
