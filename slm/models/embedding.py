"""From tokens to the input of the first layer.

Parameters under `embed`: `embedding` (V, E)[, `position` (max_length, E)][, `token_type` (types, E)][, `norm`]
[, `projection` (E, D)], where E is cfg.embedding_width or D; with cfg.trigrams `projection` is (3 E, D) and all others
but `embedding` have D.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.config import ModelConfig
from slm.models.layers import lookup, norm
from slm.models.quantized import is_quantized


def embedding_width(cfg: ModelConfig) -> int:
    """E: size of a row of the embedding."""
    return cfg.embedding_width or cfg.width


def init_embedding(cfg: ModelConfig, key: jax.Array, position_key: jax.Array) -> dict:
    """Random float32 parameters."""
    normal, E = nn.initializers.normal(cfg.init_std), embedding_width(cfg)
    params = {"embedding": normal(key, (cfg.vocab_size, E))}
    size = cfg.width if cfg.trigrams else E
    if cfg.position == "learned":
        params["position"] = normal(position_key, (cfg.max_length, size))
    if cfg.token_types:
        params["token_type"] = normal(jax.random.fold_in(key, 1), (cfg.token_types, size))
    if cfg.embedding_norm:
        params["norm"] = norm("norm", cfg, jnp.float32).init(key, jnp.zeros((1, size)))["params"]
    if cfg.embedding_width or cfg.trigrams:
        x = jnp.zeros((1, 3 * E if cfg.trigrams else E))
        params["projection"] = _projection(cfg, jnp.float32).init(jax.random.fold_in(key, 2), x)["params"]
    return params


def embed(cfg: ModelConfig, params: dict, tokens, positions, token_types, dtype: Any) -> jax.Array:
    """(B, T, D) of `dtype` from tokens and positions (B, T), and token types (B, T) or None for type 0 everywhere."""
    table = params["embedding"]
    x = table[tokens].astype(dtype) if is_quantized(table) else lookup(table.astype(dtype), tokens)
    if cfg.embedding_scale != 1:
        x *= jnp.asarray(cfg.embedding_scale, dtype)
    if cfg.trigrams:
        around = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        x = jnp.concatenate([around[:, 2:], x, around[:, :-2]], -1)  # next, this, previous
        x = _projection(cfg, dtype).apply({"params": params["projection"]}, x)
    if cfg.token_types:
        table = params["token_type"].astype(dtype)
        x += table[0] if token_types is None else lookup(table, token_types)
    if cfg.position == "learned":
        x += lookup(params["position"].astype(dtype), positions)
    if cfg.embedding_norm:
        x = norm("norm", cfg, dtype).apply({"params": params["norm"]}, x)
    if cfg.embedding_width and not cfg.trigrams:
        x = _projection(cfg, dtype).apply({"params": params["projection"]}, x)
    return x


def _projection(cfg: ModelConfig, dtype: Any) -> nn.Dense:
    return nn.Dense(cfg.width, dtype=dtype, kernel_init=nn.initializers.normal(cfg.init_std), name="projection")
