"""What stands behind the last layer: logits over the vocabulary, labels, or one vector for a sequence.

Parameters under `head`: a dense layer and its norm, called `transform` where it reads every token and `pooler` where it
reads what stands for the sequence, and `norm`; then `kernel` (untied; `rest` of a tied one) and `bias` over the
vocabulary, or `classifier`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.config import ModelConfig
from slm.errors import ConfigError
from slm.models.embedding import embedding_width
from slm.models.layers import dense, norm

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
}
"""Name in `model.head_activation` to function."""
OVER_TOKENS = ("lm", "masked_lm")
"""Heads that answer with logits over the vocabulary."""


def check_head(cfg: ModelConfig) -> None:
    """Raises ConfigError where settings of the head contradict each other or model.causal."""

    def demand(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    demand(
        cfg.head != "lm" or cfg.causal,
        "model.head = lm predicts the next token, which tokens see without model.causal: set model.head = masked_lm, "
        "sequence, token or embedding, or model.causal = true",
    )
    demand(cfg.head != "masked_lm" or not cfg.causal, "model.head = masked_lm: set model.causal = false")
    labelled = cfg.head in ("sequence", "token")
    demand(not labelled or cfg.labels > 0, f"model.head = {cfg.head} needs model.labels: say how many there are")
    demand(labelled or not cfg.labels, f"model.labels = {cfg.labels}: model.head = {cfg.head} has no labels; set it 0")
    demand(
        cfg.head not in ("sequence", "embedding") or cfg.pooling == "mean" or not cfg.causal,
        "model.pooling = first: the first token of a causal model sees nothing else; set model.pooling = mean",
    )
    demand(
        not cfg.trigrams or not cfg.causal,
        "model.trigrams = true reads the next token: set model.causal = false",
    )
    plain = cfg.head_activation == "none"
    demand(not (cfg.head_norm and plain), "model.head_norm needs the dense layer of model.head_activation: set that")
    demand(cfg.head != "lm" or plain, "model.head_activation: model.head = lm has no dense layer; set it to none")
    demand(
        not cfg.wide_readout or cfg.width > embedding_width(cfg),
        f"model.wide_readout: model.embedding_width must be less than model.width = {cfg.width}",
    )
    demand(
        cfg.head not in OVER_TOKENS or not cfg.tied or has_rest(cfg) or _readout_width(cfg) == embedding_width(cfg),
        f"model.embedding_width = {cfg.embedding_width}: a tied output projection needs model.width, or "
        "model.head = masked_lm with a model.head_activation; else set model.tied = false",
    )


def check_trains(cfg: ModelConfig) -> None:
    """Raises ConfigError for a model that text alone cannot train."""
    if cfg.head not in OVER_TOKENS:
        raise ConfigError(f"model.head = {cfg.head}: sources have no labels; train model.head = lm or masked_lm")


def check_next_token(cfg: ModelConfig) -> None:
    """Raises ConfigError for a model that does not predict the next token."""
    if cfg.head != "lm":
        raise ConfigError(
            f"model.head = {cfg.head}: generation and bits per byte need the next token, which only model.head = lm "
            "predicts; use slm.logits"
        )


def has_kernel(cfg: ModelConfig) -> bool:
    """Whether the output projection over the vocabulary is a parameter of the head."""
    return cfg.head in OVER_TOKENS and not cfg.tied


def has_rest(cfg: ModelConfig) -> bool:
    """Whether the tied output projection has rows of its own, for hidden states wider than embeddings."""
    return cfg.head == "masked_lm" and cfg.tied and cfg.wide_readout


def has_bias(cfg: ModelConfig) -> bool:
    """Whether logits over the vocabulary have a bias."""
    return cfg.head in OVER_TOKENS and "head" in cfg.bias


def init_head(cfg: ModelConfig, key: jax.Array) -> dict:
    """Random float32 parameters; empty for a head without any."""
    params, D = {}, jnp.zeros((1, cfg.width))
    if has_kernel(cfg):
        params["kernel"] = nn.initializers.normal(cfg.init_std)(key, (_readout_width(cfg), cfg.vocab_size))
    if has_rest(cfg):
        rest = cfg.width - embedding_width(cfg), cfg.vocab_size
        params["rest"] = {"kernel": nn.initializers.normal(cfg.init_std)(jax.random.fold_in(key, 3), rest)}
    if has_bias(cfg):
        params["bias"] = jnp.zeros(cfg.vocab_size)
    if cfg.head_activation != "none":
        layer = _dense(cfg, jnp.float32)
        params[layer.name] = layer.init(jax.random.fold_in(key, 1), D)["params"]
        if cfg.head_norm:
            params["norm"] = _norm(cfg, jnp.float32).init(key, D[:, : layer.features])["params"]
    if cfg.labels:
        params["classifier"] = _classifier(cfg, jnp.float32).init(jax.random.fold_in(key, 2), D)["params"]
    return params


def transform(cfg: ModelConfig, params: dict, hidden: jax.Array, dtype: Any) -> jax.Array:
    """The dense layer in front of the head, if there is one: (..., D) -> (..., D), or (..., E) of a masked LM."""
    if cfg.head_activation == "none":
        return hidden
    layer = _dense(cfg, dtype)
    hidden = ACTIVATIONS[cfg.head_activation](layer.apply({"params": params[layer.name]}, hidden))
    return _norm(cfg, dtype).apply({"params": params["norm"]}, hidden) if cfg.head_norm else hidden


def answer(cfg: ModelConfig, params: dict, hidden: jax.Array, mask_BxT: jax.Array | None, dtype: Any) -> jax.Array:
    """float32 (B, labels), (B, T, labels) or (B, D) of a head that has no logits over the vocabulary.

    Args:
      params: of the head.
      hidden: (B, T, D) after the last layer.
      mask_BxT: 1 for tokens and 0 for padding; None: no padding.
    """
    if cfg.head != "token":
        hidden = _pooled(cfg, hidden, mask_BxT)
    hidden = transform(cfg, params, hidden, dtype)
    if cfg.labels:
        return _classifier(cfg, dtype).apply({"params": params["classifier"]}, hidden).astype(jnp.float32)
    hidden = hidden.astype(jnp.float32)
    if not cfg.unit_length:
        return hidden
    return hidden / jnp.maximum(jnp.linalg.norm(hidden, axis=-1, keepdims=True), 1e-12)


def _pooled(cfg, hidden_BxTxD, mask_BxT):
    if mask_BxT is None:
        mask_BxT = jnp.ones(hidden_BxTxD.shape[:2], jnp.int32)
    if cfg.pooling == "first":  # token; padding may stand before it
        return jnp.take_along_axis(hidden_BxTxD, mask_BxT.argmax(1)[:, None, None], 1)[:, 0]
    weights = mask_BxT.astype(jnp.float32)
    total = jnp.einsum("BTD,BT->BD", hidden_BxTxD.astype(jnp.float32), weights)
    return (total / jnp.maximum(weights.sum(1, keepdims=True), 1)).astype(hidden_BxTxD.dtype)


def _readout_width(cfg):
    narrow = cfg.head == "masked_lm" and cfg.head_activation != "none" and not cfg.wide_readout
    return embedding_width(cfg) if narrow else cfg.width


def _dense(cfg, dtype):
    name = "transform" if cfg.head in ("masked_lm", "token") else "pooler"
    return dense(_readout_width(cfg), name, cfg, dtype, part="head_dense")


def _norm(cfg, dtype):
    # MobileBERT's head has the norm that its layers leave out.
    return norm("norm", dataclasses.replace(cfg, norm="layernorm") if cfg.norm == "affine" else cfg, dtype)


def _classifier(cfg, dtype):
    init = nn.initializers.normal(cfg.init_std)
    return nn.Dense(cfg.labels, dtype=dtype, kernel_init=init, name="classifier")
