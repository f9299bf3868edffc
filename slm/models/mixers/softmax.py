"""Exact softmax attention: grouped heads, sliding window, sinks, soft cap, output gate."""

import dataclasses
import importlib.util
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention import cached_attention, choose_implementation, softmax_attention
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.mixers.base import Context, Mixer, Row, finish, head_dim, logit_scale, normalise, project, rotate
from slm.models.mixers.cache import key_value_cache, remember
from slm.models.rope import grown_queries


class SoftmaxFamily(Mixer):
    """What mixers over `softmax_attention` share."""

    plain: ClassVar[bool] = True
    """Without switches it is nothing but softmax(q k^T) v with K = V, which cuDNN can serve."""
    int8_cache = True

    @classmethod
    def rewinds(cls, cfg: ModelConfig) -> bool:
        return not cfg.mixer.window

    def sight(self) -> dict[str, Any]:
        """What `softmax_attention` and `cached_attention` have in common of the switches, with learned sinks."""
        m, sink_logits = self.cfg.mixer, None
        if m.sink_logits:
            sink_logits = self.param("sink", nn.initializers.zeros, (self.cfg.heads,)).astype(jnp.float32)
        scale = logit_scale(self.cfg)
        sees = {"sinks": m.sinks or 0, "sink_logits": sink_logits, "softcap": m.softcap or None}
        return {"window": m.window, "scale": scale, **sees}

    @classmethod
    def implementation(cls, cfg: ModelConfig) -> str:
        """cfg.mixer.implementation. Raises ConfigError for one that cannot serve this mechanism."""
        chosen, m = cfg.mixer.implementation, cfg.mixer
        if chosen == "pallas":
            raise ConfigError("model.mixer.implementation = pallas: softmax attention has none; use auto or blocked")
        served = cls.plain and not (m.sinks or m.sink_logits or (m.softcap and chosen == "cudnn"))
        if chosen == "tokamax" and not importlib.util.find_spec("tokamax"):
            raise ConfigError("model.mixer.implementation = tokamax: `pip install tokamax`, or use auto")
        if chosen in ("cudnn", "tokamax") and not served:
            raise ConfigError(
                f"model.mixer.implementation = {chosen} serves neither sinks, sink_logits, forget gates nor values of "
                "another size than keys, and cudnn no softcap, which layers of "
                f"{' '.join(cfg.attention)} have; use auto or blocked"
            )
        return chosen

    @classmethod
    def backend(cls, cfg: ModelConfig, length: int, dtype: Any, platform: str, segments: bool) -> str:
        chosen, m = cls.implementation(cfg), cfg.mixer
        if chosen != "auto":
            return chosen
        extras = bool(segments or m.softcap or m.sinks or m.sink_logits or not cls.plain)
        shape = (1, length, cfg.heads, head_dim(cfg))
        return choose_implementation(shape, dtype, causal=cfg.causal, window=m.window, extras=extras, platform=platform)


class Attended(nn.Module):
    """Returns what a layer attends with, as it is: q (B, T, H, K), k and v (B, T, G, K), normed and rotated. A module
    only so that slm.models.watch can see them."""

    def __call__(self, q, k, v):
        return q, k, v


class SoftmaxMixer(SoftmaxFamily):
    """Grouped-query softmax attention (Ainslie et al. 2023) with the switches of `SOFTMAX`."""

    bidirectional = True

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None, value_input=None):
        q, k, v = projections(x_BxTxD, self.cfg, self.dtype, context, self.rotary_size(self.cfg), value_input)
        q, k, v = Attended(name="attended")(q, k, v)
        see, ids = self.sight(), context.segment_ids
        if cache is None:
            see |= {"causal": self.cfg.causal, "implementation": self.implementation(self.cfg)}
            out = softmax_attention(q, k, v, segment_ids=ids, **see)
        else:
            out, cache = attend_and_store(q, k, v, context.positions, cache, **see)
        return finish(out, x_BxTxD, self.cfg, self.dtype), cache

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
        keys = mean_keys(length, cfg.mixer.window, cfg.mixer.sinks or 0)
        if not cfg.causal:
            keys = mean_keys_both_sides(length, cfg.mixer.window)
        return 4 * cfg.heads * head_dim(cfg) * keys


def projections(x_BxTxD, cfg: ModelConfig, dtype: Any, context: Context, size: int, value_input=None):
    """Normed and rotated queries (B, T, H, K) and keys (B, T, G, K), and values (B, T, G, K), which read x or
    `value_input` (B, T, any)."""
    K, G = head_dim(cfg), cfg.kv_heads or cfg.heads
    q = normalise(project(x_BxTxD, cfg.heads, K, "query", cfg, dtype), "query_norm", cfg, dtype)
    k = normalise(project(x_BxTxD, G, K, "key", cfg, dtype), "key_norm", cfg, dtype)
    q, k = rotate(q, context, size), rotate(k, context, size)
    if size and cfg.rope.query_growth:
        q = grown_queries(q, context.positions, cfg.rope)
    return q, k, project(x_BxTxD if value_input is None else value_input, G, K, "value", cfg, dtype)


def mean_keys(length: int, window: int | None = None, sinks: int = 0) -> float:
    """Keys that a causal query sees, mean over `length` positions."""
    W = min(length, window or length)
    beyond = length - W  # queries whose window leaves something out: the n-th of them n tokens, sinks among them
    few = min(sinks, beyond)
    return (W * (W + 1) / 2 + beyond * W + few * (few + 1) / 2 + (beyond - few) * sinks) / length


def mean_keys_both_sides(length: int, window: int | None = None) -> float:
    """Keys that a query of an encoder sees, mean over `length` positions; sinks beyond the window are not counted."""
    W = min(length, window or length)
    return 2 * W - 1 - W * (W - 1) / length


def attend_and_store(q, k, v, positions_BxT, cache, window=None, sinks=0, **see):
    """Attention of new tokens over the cache and themselves; see `store` for the slots, `cached_attention` for `see`.

    Returns (out (B, T, H, V), cache). Tokens at position -1 are not stored.
    """
    seen, stored = remember(cache, {"key": k, "value": v, "positions": positions_BxT}, window, sinks)
    keys, values = seen["key"].astype(q.dtype), seen["value"].astype(q.dtype)
    old = seen["positions"].shape[1] - positions_BxT.shape[1]
    out = cached_attention(
        q,
        keys,
        values,
        positions_BxT,
        seen["positions"],
        window=window,
        sinks=sinks,
        old=old if window else None,
        **see,
    )
    return out, stored


SOFTMAX = MixerConfig(
    qk_norm="rms",
    rope_fraction=1.0,
    sink_logits=False,
    scale=0.0,
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
