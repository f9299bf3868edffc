"""How much a model would miss a channel, a group of heads, a layer, or a single weight."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.compress.calibrate import ROWS, squares
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.paths import flat
from slm.models.transformer import Transformer
from slm.training.loss import token_losses
from slm.training.transforms import replaced

MLP, HEADS, WIDTH = "mlp", "heads", "width"
"""What can be made narrower: channels of feed-forwards, outputs of heads, channels of the residual stream."""
Scores = dict[str, list[np.ndarray]]
"""Of `mlp` (F,) and `heads` (H K,) for each layer, and of `width` one (D,); the lowest go first."""


def importance(model: LanguageModel, criterion: str, tokens: np.ndarray | None, seed: int = 0) -> Scores:
    """Scores of everything that can go.

    `activation`: sum of squares that the next matrix reads (Minitron, Muralidharan et al. 2024, section
    2.2); `taylor`: change of the loss, by first order, if it were zero, squared and summed over sequences (Molchanov et
    al. 2019); `weight_norm`: of the rows and columns that would go; `random`.
    """
    if criterion == "activation":
        return _by_activation(model, tokens)
    if criterion == "taylor":
        return _by_gradient(model, tokens)
    rng = np.random.default_rng(seed)
    return _of_matrices(model, np.square if criterion == "weight_norm" else lambda w: rng.random(w.shape) / w.size)


def block_influence(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """(layers,): 1 - mean cosine between the residual stream before and after a layer (ShortGPT, Men et al. 2024)."""
    transformer, found = model.transformer, []
    xs = [layerwise.enter(transformer, model.params, tokens[i : i + ROWS]) for i in range(0, len(tokens), ROWS)]
    for number, place in enumerate(layerwise.places(transformer)):
        layer = layerwise.layer_params(model.params, place)
        runs = [layerwise.run(transformer, number, layer, x, _cosine) for x in xs]
        xs = [x for x, _ in runs]
        found.append(1 - sum(float(seen[""]) for _, seen in runs) / tokens.size)
    return np.array(found)


def _cosine(path, module, inputs, output):
    """Takes the sum over tokens of the cosine between a block's input and output."""
    if path:
        return None
    a, b = inputs[0].astype(jnp.float32), output[0].astype(jnp.float32)
    return ((a * b).sum(-1) / jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1) + 1e-20)).sum()


def _by_activation(model, tokens) -> Scores:
    transformer = model.transformer
    scores: Scores = {MLP: [], HEADS: [], WIDTH: []}
    xs = [layerwise.enter(transformer, model.params, tokens[i : i + ROWS]) for i in range(0, len(tokens), ROWS)]
    width = np.zeros(model.config.model.width)
    for number, place in enumerate(layerwise.places(transformer)):
        layer = layerwise.layer_params(model.params, place)
        runs = [layerwise.run(transformer, number, layer, x, squares) for x in xs]
        xs = [x for x, _ in runs]
        seen = jax.tree.map(lambda *a: np.asarray(sum(a)), *(s for _, s in runs))
        scores[MLP].append(seen["mlp/down"] if "mlp/down" in seen else np.zeros(0))
        scores[HEADS].append(seen.get("mixer/out", np.zeros(0)))
        for reader in ("mixer/query", "mlp/up"):
            width += seen.get(reader, 0)
    scores[WIDTH] = [width]
    return scores


def _of_matrices(model, value) -> Scores:
    """Sums of `value` of the weights that would go with each."""
    scores: Scores = {MLP: [], HEADS: [], WIDTH: []}
    width = value(np.asarray(model.params["embed"]["embedding"])).sum(0)
    for place in layerwise.places(model.transformer):
        layer = jax.tree.map(np.asarray, layerwise.layer_params(model.params, place))
        mixer, mlp = layer["mixer"], layer.get("mlp", {})
        out = value(_out(mixer, len(width)))
        scores[HEADS].append(out.sum(1))
        width = width + out.sum(0)
        if mlp:
            columns = sum(value(mlp[name]["kernel"]).sum(0) for name in ("up", "gate") if name in mlp)
            scores[MLP].append(columns + value(mlp["down"]["kernel"]).sum(1))
            width = width + value(mlp["down"]["kernel"]).sum(0)
        else:
            scores[MLP].append(np.zeros(0))
    scores[WIDTH] = [width]
    return scores


def _out(mixer, D: int):
    """The matrix from heads to the stream; some mixers have none."""
    return mixer["out"]["kernel"] if "out" in mixer else np.zeros((0, D))


def _by_gradient(model, tokens) -> Scores:
    """A multiplier of a channel has the derivative sum_j w_ij dL/dw_ij over the weights that it multiplies: rows of the
    matrix that reads it, and for the stream columns of those that write to it."""
    totals: Scores | None = None
    for row in tokens:
        one = _of_gradient(model.transformer, model.params, jnp.asarray(row)[None])
        one = {name: [np.square(np.asarray(a)) for a in parts] for name, parts in one.items()}
        totals = one if totals is None else {n: [a + b for a, b in zip(totals[n], one[n])] for n in one}
    return totals


def weight_products(model: LanguageModel, names: list[str], tokens: np.ndarray) -> dict[str, jax.Array]:
    """|w dL/dw| of each weight of the matrices `names`, summed over sequences: (layers, in, out) float32.

    By first order, what the loss of a sequence changes by without the weight (Molchanov et al. 2017, 1611.06440, eq. 7;
    of one batch: SNIP, Lee et al. 2019, 1810.02340, eq. 6).
    """
    weights = {name: leaf for name, leaf in flat(model.params).items() if name in names}
    total = {name: jnp.zeros(w.shape, jnp.float32) for name, w in weights.items()}
    for row in tokens:
        total = _add_products(total, weights, gradient(model.transformer, model.params, weights, row[None]))
    return total


@functools.partial(jax.jit, donate_argnums=0)
def _add_products(total, weights, grads):
    return jax.tree.map(lambda sum_, w, g: sum_ + jnp.abs((w * g).astype(jnp.float32)), total, weights, grads)


@functools.partial(jax.jit, static_argnums=0)
def gradient(transformer: Transformer, params: Any, weights: dict[str, jax.Array], tokens) -> dict[str, jax.Array]:
    """Of the mean loss of tokens (B, T) by `weights`, which stand for those of the same name in `params`."""
    return jax.grad(lambda weights: _loss(transformer, replaced(params, weights), tokens))(weights)


def _loss(transformer, params, tokens):
    hidden, _ = transformer.hidden(params, tokens[:, :-1])
    cap = transformer.cfg.logit_softcap
    return token_losses(*transformer.readout(params, hidden), tokens[:, 1:], logit_softcap=cap)[0].mean()


@functools.partial(jax.jit, static_argnums=0)
def _of_gradient(transformer: Transformer, params: Any, tokens):
    products = jax.tree.map(jnp.multiply, jax.grad(lambda params: _loss(transformer, params, tokens))(params), params)
    scores: dict[str, list] = {MLP: [], HEADS: [], WIDTH: []}
    width = 0.0
    for place in layerwise.places(transformer):
        layer = layerwise.layer_params(products, place)
        out = _out(layer["mixer"], transformer.cfg.width)
        down = layer["mlp"]["down"]["kernel"] if "mlp" in layer else jnp.zeros((0, out.shape[1]))
        scores[HEADS].append(out.sum(1))
        scores[MLP].append(down.sum(1))
        width += out.sum(0) + down.sum(0)
    scores[WIDTH] = [width]
    return scores
