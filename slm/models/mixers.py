"""Token mixers: projections plus one mechanism of slm.attention. `MIXERS` names them for `model.attention`.

A mixer is a linen module with fields (cfg, dtype), called as mixer(x_BxTxD, context, cache) -> (y_BxTxD, cache), where
cache is None in training. Its classmethods say what decoding carries (`init_cache`) and what it costs
(`flops_per_token`).
"""

from typing import Any

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from slm.attention import cached_attention, choose_implementation, softmax_attention
from slm.config import ModelConfig
from slm.models.layers import dense, residual_std
from slm.models.rope import apply_rope


@flax.struct.dataclass
class Context:
    """What every layer needs to know about the tokens, computed once for all layers."""

    positions: jax.Array
    """(B, T) int32; -1 marks padding, which is never written to a cache."""
    segment_ids: jax.Array | None
    """(B, T) int32, or None for one segment."""
    rope: tuple[jax.Array, jax.Array] | None
    """Tables of slm.models.rope, or None."""


def head_dim(cfg: ModelConfig) -> int:
    return cfg.head_dim or cfg.width // cfg.heads


class SoftmaxMixer(nn.Module):
    """Grouped-query softmax attention (Ainslie et al. 2023), optionally with QK-norm, rotary positions and soft cap."""

    cfg: ModelConfig
    dtype: Any

    @classmethod
    def window(cls, cfg: ModelConfig) -> int | None:
        """Tokens that a query sees, its own included; None: all before it."""
        return None

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg = self.cfg
        K, G = head_dim(cfg), cfg.kv_heads or cfg.heads
        q = einops.rearrange(dense(cfg.heads * K, "query", cfg, self.dtype)(x_BxTxD), "B T (H K) -> B T H K", K=K)
        k = einops.rearrange(dense(G * K, "key", cfg, self.dtype)(x_BxTxD), "B T (G K) -> B T G K", K=K)
        v = einops.rearrange(dense(G * K, "value", cfg, self.dtype)(x_BxTxD), "B T (G K) -> B T G K", K=K)
        if cfg.qk_norm:
            q = nn.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype, name="query_norm")(q)
            k = nn.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype, name="key_norm")(k)
        if context.rope is not None:
            q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        window = self.window(cfg)
        if cache is None:
            out = softmax_attention(
                q,
                k,
                v,
                window=window,
                softcap=cfg.attention_softcap,
                segment_ids=context.segment_ids,
                implementation=cfg.attention_implementation,
            )
        else:
            out, cache = attend_and_store(q, k, v, context.positions, cache, window, cfg.attention_softcap)
        out = einops.rearrange(out, "B T H K -> B T (H K)")
        return dense(cfg.width, "out", cfg, self.dtype, residual_std(cfg))(out), cache

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """Empty key/value cache of `length` slots, or of `window` slots if that is less."""
        slots = min(length, cls.window(cfg) or length)
        shape = (batch, slots, cfg.kv_heads or cfg.heads, head_dim(cfg))
        return {
            "key": jnp.zeros(shape, dtype),
            "value": jnp.zeros(shape, dtype),
            "positions": jnp.full((batch, slots), -1, jnp.int32),
        }

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Forward FLOPs of q k^T and weights v per token at `length`, mean over positions: what causality masks, or
        the window leaves out, is not counted."""
        W = min(length, cls.window(cfg) or length)
        keys = (W * (W + 1) / 2 + (length - W) * W) / length
        return 4 * cfg.heads * head_dim(cfg) * keys

    @classmethod
    def backend(cls, cfg: ModelConfig, length: int, dtype: Any, platform: str, segments: bool) -> str:
        """The implementation that training on `platform` will use, for the table printed at start."""
        if cfg.attention_implementation != "auto":
            return cfg.attention_implementation
        extras = segments or cfg.attention_softcap is not None
        shape = (1, length, cfg.heads, head_dim(cfg))
        return choose_implementation(shape, dtype, window=cls.window(cfg), extras=extras, platform=platform)


class WindowMixer(SoftmaxMixer):
    """Sliding-window attention (Beltagy et al. 2020; Mistral): a query sees the last cfg.window tokens, its own too."""

    @classmethod
    def window(cls, cfg: ModelConfig) -> int | None:
        return cfg.window


def attend_and_store(q, k, v, positions_BxT, cache, window, softcap):
    """Attention of new tokens over the cache and themselves; the cache is a ring of slots = position mod size.

    Returns (out (B, T, H, V), cache). Tokens at position -1 are not stored.
    """
    stored = _store(cache, k, v, positions_BxT)
    if window is None or q.shape[1] == 1:
        seen = stored
    else:
        # In a ring no longer than the window, a late token of this call may overwrite what an early one still sees.
        seen = {"key": k, "value": v, "positions": positions_BxT}
        seen = {name: jnp.concatenate([cache[name], seen[name].astype(cache[name].dtype)], 1) for name in cache}
    keys, values = seen["key"].astype(q.dtype), seen["value"].astype(q.dtype)
    out = cached_attention(q, keys, values, positions_BxT, seen["positions"], window=window, softcap=softcap)
    return out, stored


def _store(cache, k, v, positions_BxT):
    slots = cache["key"].shape[1]
    # Two tokens of one call may share a slot, and scatter order is undefined: only the later one is written.
    live = (positions_BxT >= 0) & (positions_BxT > positions_BxT.max(1, keepdims=True) - slots)
    slot = jnp.where(live, positions_BxT % slots, slots)
    row = jnp.arange(k.shape[0])[:, None]
    new = {"key": k, "value": v, "positions": positions_BxT}
    return {name: cache[name].at[row, slot].set(new[name].astype(cache[name].dtype), mode="drop") for name in cache}


MIXERS: dict[str, type[nn.Module]] = {"softmax": SoftmaxMixer, "window": WindowMixer}
"""Name in `model.attention` to mixer. A new mechanism is one class and one entry."""
