"""What a model does with a text: who looks at whom, how far back, how large everything is."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.attention.spans import visible
from slm.errors import ConfigError, DataError
from slm.models import layerwise
from slm.models.counts import parameter_counts
from slm.models.language_model import LanguageModel
from slm.models.mixers import layers, mixer
from slm.models.mixers.base import logit_scale
from slm.models.mixers.softmax import SoftmaxMixer
from slm.models.paths import flat
from slm.training.objective import plain_objective


def influence(model: LanguageModel, text: Any, layer: int, probes: int = 4, seed: int = 0) -> np.ndarray:
    """How much each token's input moves each token's output of one mixer: (T, T), row i of output i sums to 1.

    The norm of the derivative of output i by input j, estimated with `probes` random directions (for a matrix J and a
    normal vector u, E |J^T u|^2 is the squared Frobenius norm of J). It means the same for every mechanism: what
    softmax shows as its weights, linear attention, recurrences and convolutions show here.

    Args:
      text: a string, or token ids (T,).
      layer: from 0.

    Raises ConfigError for a layer that is not there.
    """
    tokens = _ids(model, text)
    place, kind = _layer(model, layer)
    inputs = _streams(model, tokens)[layer]["mixer"]
    context = model.transformer.context(jnp.arange(tokens.size)[None], None)
    here = context.replace(rope=context.local_rope if kind.local else context.rope, local_rope=None, layer=layer)
    module = mixer(kind.mechanism, kind.cfg, model.dtype)
    own = layerwise.layer_params(model.params, place)["mixer"]

    @jax.jit
    def moved(key):
        def apply(x):
            return module.apply({"params": own}, x, here, None)[0][0]

        output, back = jax.vjp(apply, inputs)

        def of_output(i):
            u = jax.random.normal(jax.random.fold_in(key, i), output.shape[-1:], output.dtype)
            (grad,) = back(jnp.zeros_like(output).at[i].set(u))
            return jnp.square(grad[0].astype(jnp.float32)).sum(-1)

        return jax.lax.map(of_output, jnp.arange(tokens.size))

    squares = sum(np.asarray(moved(key), np.float64) for key in jax.random.split(jax.random.key(seed), probes))
    size = np.sqrt(squares / probes)
    return size / np.maximum(size.sum(1, keepdims=True), 1e-30)


def attention_map(model: LanguageModel, text: Any, layer: int) -> np.ndarray:
    """The weights of a softmax layer: (H, T, T), row i of the query i sums to 1.

    Raises ConfigError for a layer of another mechanism, or with caps or sinks, and names `influence`, which shows them.
    """
    tokens = _ids(model, text)
    _, kind = _layer(model, layer)
    m = kind.configured.mixer
    if not issubclass(kind.mixer, SoftmaxMixer) or m.softcap or m.sinks or m.sink_logits:
        raise ConfigError(
            f"layer {layer} is {kind.mechanism}, whose weights are not one softmax: see slm.study.influence"
        )
    q, k = _streams(model, tokens)[layer]["mixer/attended"]
    H, G = q.shape[2], k.shape[2]
    q = q[0].reshape(tokens.size, G, H // G, -1).astype(jnp.float32)
    scores = jnp.einsum("TGRK,SGK->GRTS", q, k[0].astype(jnp.float32)).reshape(H, tokens.size, -1)
    at = jnp.arange(tokens.size)
    seen = visible(at[:, None], at[None, :], model.config.model.causal, m.window)
    return np.asarray(jax.nn.softmax(jnp.where(seen, scores * logit_scale(kind.configured), -jnp.inf), -1))


def effective_context(
    model: LanguageModel, text: Any, contexts: Sequence[int] = (), tolerance: float = 0.01, places: int = 32
) -> tuple[int, dict[int, float]]:
    """(tokens of context that are enough, context to nats a token of the same targets with only so much before them).

    Enough: the loss is within `tolerance` nats of that with the longest context (compare Khandelwal et al. 2018).

    Args:
      text: at least twice the longest context.
      contexts: to try; none: powers of two up to half of the text.
      places: targets, spread evenly over the second half.

    Raises DataError for a text that is too short.
    """
    tokens = _ids(model, text)
    longest = tokens.size // 2
    contexts = sorted(contexts or [2**i for i in range(max(longest, 1).bit_length()) if 2**i <= longest])
    if not contexts or contexts[-1] >= tokens.size:
        raise DataError(
            f"{tokens.size} tokens are too few for contexts of {max(contexts, default=1)}: give a longer text"
        )
    first = max(contexts)
    at = np.unique(np.linspace(first, tokens.size - 1, places).astype(int))
    found = {}
    for context in contexts:
        rows = np.stack([tokens[i - context : i] for i in at])
        log_p = np.asarray(jax.nn.log_softmax(_last(model, rows)))
        found[context] = float(-log_p[np.arange(len(at)), tokens[at]].mean())
    best = found[contexts[-1]]
    return next(context for context in contexts if found[context] <= best + tolerance), found


def norms(model: LanguageModel, text: Any) -> dict[str, dict]:
    """Sizes, for a look at what grows or dies.

    Returns:
      `stream`: layer to the root mean square of the residual stream after it (-1: before the first);
      `gradients`: name of a parameter to the norm of the gradient of the mean loss, of each layer if it is stacked;
      `weights`: the same of the parameters themselves.
    """
    tokens = _ids(model, text)
    seen = _streams(model, tokens)
    rms = [float(jnp.sqrt(jnp.square(seen[0][""][0].astype(jnp.float32)).mean()))]
    rms += [float(jnp.sqrt(jnp.square(one[""][1].astype(jnp.float32)).mean())) for one in seen]
    row = {
        "tokens": tokens[None, :-1], "targets": tokens[None, 1:], "weights": np.ones((1, tokens.size - 1), np.float32),
        "segment_ids": np.ones((1, tokens.size - 1), np.int32), "positions": np.arange(tokens.size - 1)[None],
    }  # fmt: skip
    objective = plain_objective(model.transformer, model.config)

    def loss(params):
        return objective.apply(params, {}, row, None, 0)[0] / (tokens.size - 1)

    grads = flat(jax.jit(jax.grad(loss))(model.params))

    def size(name, leaf):
        stacked = name.split("/")[0] in model.transformer.groups
        squares = np.square(np.asarray(leaf, np.float64))
        return np.sqrt(squares.reshape(len(leaf), -1).sum(1)).tolist() if stacked else float(np.sqrt(squares.sum()))

    return {
        "stream": dict(enumerate(rms, -1)),
        "gradients": {name: size(name, leaf) for name, leaf in grads.items()},
        "weights": {name: size(name, leaf) for name, leaf in flat(model.params).items()},
    }


def overview(model: LanguageModel) -> str:
    """A line for each parameter: name, shape, numbers, share of all."""
    total = parameter_counts(model.config.model)["total"]
    rows = [
        (name, " x ".join(map(str, leaf.shape)), f"{leaf.size:,}", f"{leaf.size / total:.1%}")
        for name, leaf in flat(model.params).items()
    ]
    rows.append(("all", "", f"{total:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), row[3].rjust(widths[3])])
        for row in rows
    ]
    return "\n".join([repr(model), *(line.rstrip() for line in lines)])


class browse:
    """In a notebook, the parameters as a tree that unfolds, with pictures of their values, by treescope where it is
    installed; else, and elsewhere, `overview`."""

    def __init__(self, model: LanguageModel):
        self.model = model

    def __repr__(self) -> str:
        return overview(self.model)

    def _repr_html_(self) -> str | None:
        try:
            import treescope
        except ModuleNotFoundError:
            return None
        with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
            return treescope.render_to_html(jax.device_get(self.model.params))


def draw_map(matrix: np.ndarray, labels: Sequence[str] = (), title: str = "") -> Any:
    """A picture of (T, T) weights, rows: outputs, columns: inputs; matplotlib's Figure."""
    from slm.evaluation import style

    axes = style.axes(4.8, 4.4)
    axes.grid(False)
    image = axes.imshow(np.sqrt(matrix), cmap="cividis", vmin=0, interpolation="nearest")
    bar = axes.figure.colorbar(image, shrink=0.8)
    ticks = bar.get_ticks()
    ticks = ticks[(ticks >= 0) & (ticks <= math.sqrt(matrix.max()))]
    bar.set_ticks(ticks, labels=[f"{tick**2:.2g}" for tick in ticks])
    axes.set(xlabel="reads from", ylabel="token", title=title)
    if labels:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
    return axes.figure


def _ids(model: LanguageModel, text: Any) -> np.ndarray:
    ids = np.asarray(model.tokenizer.encode(text) if isinstance(text, str) else text, np.int32).reshape(-1)
    if ids.size < 2:
        raise DataError("a text of at least two tokens is needed")
    return ids


def _layer(model: LanguageModel, number: int):
    kinds = layers(model.config.model)
    if not 0 <= number < len(kinds):
        raise ConfigError(f"layer = {number}: the model has layers 0 to {len(kinds) - 1}")
    return layerwise.places(model.transformer)[number], kinds[number]


def _take(path, module, inputs, output):
    if path == "":
        return inputs[0], output[0]
    return inputs[0] if path == "mixer" else output[:2] if path == "mixer/attended" else None


def _streams(model: LanguageModel, tokens: np.ndarray) -> list[dict]:
    """What each layer's block, mixer and softmax got."""
    x, found = layerwise.enter(model.transformer, model.params, tokens[None]), []
    for number, place in enumerate(layerwise.places(model.transformer)):
        x, seen = layerwise.run(model.transformer, number, layerwise.layer_params(model.params, place), x, _take)
        found.append(seen)
    return found


def _last(model: LanguageModel, rows: np.ndarray) -> jax.Array:
    return _answer(model.transformer, model.params, rows)[:, -1]


@functools.partial(jax.jit, static_argnums=0)
def _answer(transformer, params, rows):
    hidden, _ = transformer.hidden(params, rows)
    return transformer.answer(params, hidden, None)
