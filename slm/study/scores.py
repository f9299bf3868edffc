"""Queries and keys to study attention on: drawn with scores of a wanted spread, or a trained model's own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slm.models.language_model import LanguageModel
from slm.models.mixers import layer_pattern
from slm.models.mixers.softmax import SoftmaxMixer, projections
from slm.models.transformer import Transformer, any_backend

POSITIONAL = 8
"""Dimensions of a head that `locality` takes."""


def controlled_qk(key, T: int, K: int, std: float, *, batch=1, heads=1, needle=0.0, locality=0.0):
    """Gaussian q, k, v (B, T, H, K) float32 whose scores q . k / sqrt K have standard deviation `std` over the causal
    pairs of each head: the inverse temperature of its softmax. Queries and keys get the square root of it each, so that
    they are of one length, which is what random features like best.

    Args:
      key: a JAX random key.
      T, K: tokens; size of a head.
      std: of the scores, before what the next two add to them.
      batch, heads: B, H.
      needle: added to the score of one key before each query, drawn uniformly; those of other keys move by some
        needle / sqrt K, since the query turns towards that key.
      locality: times the mean of cos(w (i - j)) over four frequencies w from 1 to 1/T is added to all scores, by
        `POSITIONAL` dimensions that rotate with the position, as rotary embeddings do; the others carry `std`.

    Raises:
      ValueError: std is not above 0, or K leaves no dimension beside those of `locality`.
    """
    if std <= 0:
        raise ValueError(f"std = {std}: must be above 0")
    if locality and K <= POSITIONAL:
        raise ValueError(f"K = {K}: locality takes {POSITIONAL} dimensions of a head, so K must be larger")
    content = K - POSITIONAL if locality else K
    key_q, key_k, key_v, key_needle = jax.random.split(key, 4)
    q, k = (jax.random.normal(one, (batch, T, heads, content)) for one in (key_q, key_k))
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k, precision="highest") * K**-0.5
    spread = jnp.std(scores, axis=(-2, -1), where=jnp.tril(jnp.ones((T, T), bool)))
    grow = jnp.sqrt(std / spread)[:, None, :, None]
    q, k = q * grow, k * grow
    if locality:
        angles = np.arange(T)[:, None] * T ** -np.linspace(0, 1, POSITIONAL // 2)
        turned = np.concatenate([np.cos(angles), np.sin(angles)], -1) * np.sqrt(locality * K**0.5 / (POSITIONAL // 2))
        turned = jnp.broadcast_to(jnp.asarray(turned, jnp.float32)[None, :, None], (batch, T, heads, POSITIONAL))
        q, k = (jnp.concatenate([x, turned], -1) for x in (q, k))
    if needle:
        share = jax.random.uniform(key_needle, (batch, T, heads, 1))
        found = jnp.take_along_axis(k, (share * jnp.arange(T)[:, None, None]).astype(jnp.int32), 1)
        q += needle * K**0.5 * found / jnp.square(found).sum(-1, keepdims=True)
    return q, k, jax.random.normal(key_v, (batch, T, heads, K))


def capture_qk(model: LanguageModel, tokens) -> dict[int, tuple[jax.Array, jax.Array, jax.Array]]:
    """What a trained model's softmax layers attend with.

    Args:
      model: a language model.
      tokens: (B, T) integers: one document a row, without padding.

    Returns:
      Depth of the layer to (q, k, v), each (B, T, H, K) float32, normed and rotated: softmax(q k^T / sqrt K) v, causal,
      are the outputs of its heads. Grouped keys and values are repeated for each query head, and another scale than
      1 / sqrt K is made part of q. Layers are left out whose attention is more than that: other mechanisms, windows,
      sinks, a soft cap.

    Raises:
      ValueError: no layer is left.
    """
    # Unrolled and without remat, so that layers are called one by one and their arrays may leave the call.
    cfg = dataclasses.replace(any_backend(model.config.model), scan=False, remat="none")

    @jax.jit
    def attended(params, tokens):
        found = []

        def record(call, args, kwargs, context):
            mixer = context.module
            if type(mixer) is SoftmaxMixer and context.method_name == "__call__":
                x_BxTxD, where = args[:2]
                reader = _Projections(mixer.cfg, mixer.dtype, parent=None)
                q, k, v, see = reader.apply({"params": mixer.variables["params"]}, x_BxTxD, where)
                scale = see.pop("scale")
                if all(switch is None for switch in see.values()):
                    repeats = q.shape[2] // k.shape[2]
                    q = q if scale is None else q * (scale * q.shape[3] ** 0.5)
                    found.append((where.layer, (q, jnp.repeat(k, repeats, 2), jnp.repeat(v, repeats, 2))))
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            Transformer(cfg).hidden(params, tokens)
        return found

    captured = {int(layer): qkv for layer, qkv in attended(model.params, jnp.asarray(tokens, jnp.int32))}
    if not captured:
        raise ValueError(
            f"no layer of {' '.join(layer_pattern(cfg))} is plain softmax attention over the whole past: there is "
            "nothing to approximate"
        )
    return captured


class _Projections(SoftmaxMixer):
    """What a SoftmaxMixer with these parameters calls `softmax_attention` with: q, k, v, switches (None if unused)."""

    @nn.compact
    def __call__(self, x_BxTxD, context, cache=None):
        q, k, v = projections(x_BxTxD, self.cfg, self.dtype, context, self.rotary_size(self.cfg))
        see = self.sight()
        return q, k, v, see | {"sinks": see["sinks"] or None}


def describe(q, k) -> dict[str, float]:
    """Of the causal attention of the later half of the queries, mean over heads: `score_std` standard deviation of a
    query's scores, `entropy` of its weights in nats, `top_weight` the largest of them."""
    rows, scores = exact_rows(q, k)
    T = rows.shape[-1]
    late = slice(T // 2, T)
    spread = np.std(scores[:, :, late], -1, where=np.tri(T, dtype=bool)[late])
    rows = rows[:, :, late]
    means = {"score_std": spread.mean(), "entropy": entropy(rows).mean(), "top_weight": rows.max(-1).mean()}
    return {name: float(mean) for name, mean in means.items()}


def exact_rows(q, k, causal: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Weights and scores of softmax(q k^T / sqrt K), (B, H, T, T) float64."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    scores = np.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    seen = np.tri(scores.shape[-1], dtype=bool) if causal else True
    weights = np.exp(np.where(seen, scores, -np.inf) - np.where(seen, scores, -np.inf).max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True), scores


def entropy(rows) -> np.ndarray:
    """Of each row of weights >= 0, in nats."""
    return -(rows * np.log(np.where(rows > 0, rows, 1))).sum(-1)
