"""Exact softmax attention: grouped heads, sliding window, sinks, soft cap, output gate."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention import cached_attention, choose_implementation, softmax_attention
from slm.config import MixerConfig, ModelConfig
from slm.models.mixers.base import Context, Mixer, Row, finish, head_dim, normalise, project, rotate


class SoftmaxMixer(Mixer):
    """Grouped-query softmax attention (Ainslie et al. 2023) with the switches of `SOFTMAX`."""

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m = self.cfg, self.cfg.mixer
        K, G, size = head_dim(cfg), cfg.kv_heads or cfg.heads, self.rotary_size(cfg)
        q = normalise(project(x_BxTxD, cfg.heads, K, "query", cfg, self.dtype), "query_norm", cfg, self.dtype)
        k = normalise(project(x_BxTxD, G, K, "key", cfg, self.dtype), "key_norm", cfg, self.dtype)
        v = project(x_BxTxD, G, K, "value", cfg, self.dtype)
        q, k = rotate(q, context, size), rotate(k, context, size)
        sink_logits = None
        if m.sink_logits:
            sink_logits = self.param("sink", nn.initializers.zeros, (cfg.heads,)).astype(jnp.float32)
        see = {"window": m.window, "sinks": m.sinks or 0, "sink_logits": sink_logits, "softcap": m.softcap or None}
        if cache is None:
            out = softmax_attention(q, k, v, segment_ids=context.segment_ids, implementation=m.implementation, **see)
        else:
            out, cache = attend_and_store(q, k, v, context.positions, cache, **see)
        return finish(out, x_BxTxD, cfg, self.dtype), cache

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """Empty key/value cache of `length` slots, or of `sinks + window` slots if that is less."""
        K, slots = head_dim(cfg), length
        if cfg.mixer.window:
            slots = min(length, (cfg.mixer.sinks or 0) + cfg.mixer.window)
        return key_value_cache(batch, slots, cfg.kv_heads or cfg.heads, K, K, dtype)

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """q k^T and weights v over the keys that a query sees, mean over positions."""
        return 4 * cfg.heads * head_dim(cfg) * mean_keys(length, cfg.mixer.window, cfg.mixer.sinks or 0)

    @classmethod
    def backend(cls, cfg: ModelConfig, length: int, dtype: Any, platform: str, segments: bool) -> str:
        m = cfg.mixer
        if m.implementation != "auto":
            return m.implementation
        extras = bool(segments or m.softcap or m.sinks or m.sink_logits)
        shape = (1, length, cfg.heads, head_dim(cfg))
        return choose_implementation(shape, dtype, window=m.window, extras=extras, platform=platform)


def mean_keys(length: int, window: int | None = None, sinks: int = 0) -> float:
    """Keys that a causal query sees, mean over `length` positions."""
    W = min(length, window or length)
    beyond = length - W  # queries whose window leaves something out; the i-th of them leaves out i tokens
    sunk = sinks * beyond - (min(sinks, beyond) * (2 * sinks - min(sinks, beyond) - 1)) / 2 if sinks else 0
    return (W * (W + 1) / 2 + beyond * W + sunk) / length


def key_value_cache(batch: int, slots: int, G: int, K: int, V: int, dtype: Any) -> dict[str, jax.Array]:
    """Empty slots for keys (B, S, G, K) and values (B, S, G, V), at position -1."""
    return {
        "key": jnp.zeros((batch, slots, G, K), dtype),
        "value": jnp.zeros((batch, slots, G, V), dtype),
        "positions": jnp.full((batch, slots), -1, jnp.int32),
    }


def attend_and_store(q, k, v, positions_BxT, cache, window=None, sinks=0, **see):
    """Attention of new tokens over the cache and themselves; see `store` for the slots, `cached_attention` for `see`.

    Returns (out (B, T, H, V), cache). Tokens at position -1 are not stored.
    """
    new = {"key": k, "value": v, "positions": positions_BxT}
    stored = store(cache, new, sinks)
    if window is None or q.shape[1] == 1:
        seen = stored
    else:
        # In a ring no longer than the window, a late token of this call may overwrite what an early one still sees.
        seen = {name: jnp.concatenate([cache[name], new[name].astype(cache[name].dtype)], 1) for name in cache}
    keys, values = seen["key"].astype(q.dtype), seen["value"].astype(q.dtype)
    out = cached_attention(q, keys, values, positions_BxT, seen["positions"], window=window, sinks=sinks, **see)
    return out, stored


def store(cache: dict, new: dict, sinks: int = 0) -> dict:
    """`cache` with the tokens of `new` written; entries are (B, slots, ...) and (B, T, ...), `positions` among them.

    The first `sinks` positions keep slots of their own; the others share a ring of what is left.
    """
    positions = new["positions"]
    slots = cache["positions"].shape[1]
    ring = max(slots - sinks, 1)
    # Two tokens of one call may share a slot, and scatter order is undefined: only the later one is written.
    live = (positions >= 0) & ((positions < sinks) | (positions > positions.max(1, keepdims=True) - ring))
    slot = jnp.where(positions < sinks, positions, sinks + (positions - sinks) % ring)
    slot = jnp.where(live, slot, slots)
    row = jnp.arange(positions.shape[0])[:, None]
    return {name: cache[name].at[row, slot].set(new[name].astype(cache[name].dtype), mode="drop") for name in cache}


SOFTMAX = MixerConfig(
    qk_norm="rms",
    rope_fraction=1.0,
    sink_logits=False,
    softcap=0.0,
    gate="none",
    gate_rank=0,
    implementation="auto",
)
WINDOW = dataclasses.replace(SOFTMAX, window=256, sinks=0)
ROWS = {
    "softmax": Row(SoftmaxMixer, SOFTMAX),
    # Qiu et al. 2025 (2505.06708) and Qwen3-Next: sigmoid gate from the layer's input, a quarter of each head rotates.
    "gated_softmax": Row(SoftmaxMixer, dataclasses.replace(SOFTMAX, gate="sigmoid", rope_fraction=0.25)),
    # No positions of its own: the layers around it know them (Kazemnejad et al. 2023; Llama 4, SmolLM3).
    "nope_softmax": Row(SoftmaxMixer, dataclasses.replace(SOFTMAX, rope_fraction=0.0)),
    # gpt-oss: a learned logit in the denominator lets a head look at nothing.
    "sink_softmax": Row(SoftmaxMixer, dataclasses.replace(SOFTMAX, sink_logits=True)),
    # Beltagy et al. 2020, Mistral.
    "window": Row(SoftmaxMixer, WINDOW),
    "sink_window": Row(SoftmaxMixer, dataclasses.replace(WINDOW, sink_logits=True, window=128)),
    # StreamingLLM (Xiao et al. 2024): the first tokens stay visible.
    "streaming": Row(SoftmaxMixer, dataclasses.replace(WINDOW, sinks=4)),
}
