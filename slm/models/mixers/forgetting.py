"""Forgetting attention: softmax attention whose logits fade with the data (FoX; Lin et al. 2025, 2503.02130)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention import cached_attention, softmax_attention
from slm.attention.forget import cumulative_forget
from slm.config import ModelConfig
from slm.models.layers import dense
from slm.models.mixers.base import Context, Row, finish, head_dim
from slm.models.mixers.cache import key_value_cache, remember
from slm.models.mixers.softmax import SOFTMAX, SoftmaxFamily, mean_keys, projections


class ForgettingMixer(SoftmaxFamily):
    """softmax(q_i k_j / sqrt K + sum of log f over j+1 ... i), f_t = sigmoid(w_h x_t + b_h) per query head (eq. 4-6).

    The cache holds the running sum of log f beside each key: two float32 a query head (see `cumulative_forget`).
    """

    plain = False

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        q, k, v = projections(x_BxTxD, self.cfg, self.dtype, context, self.rotary_size(self.cfg))
        see = self.sight()
        biased = dataclasses.replace(self.cfg, bias=("qkv",))
        # In float32: rounding of one gate stays in the weight of every older key.
        logits_BxTxH = dense(self.cfg.heads, "forget", biased, jnp.float32)(x_BxTxD.astype(jnp.float32))
        log_forget = jax.nn.log_sigmoid(logits_BxTxH)
        if cache is None:
            chosen, ids = self.implementation(self.cfg), context.segment_ids
            out = softmax_attention(q, k, v, log_forget=log_forget, segment_ids=ids, implementation=chosen, **see)
            return finish(out, x_BxTxD, self.cfg, self.dtype), None
        positions = context.positions
        newest = cache["positions"].argmax(1)[:, None, None, None]
        start = jnp.take_along_axis(cache["forget"], newest, 1)[:, 0]
        forget = cumulative_forget(log_forget, positions == 0, start)
        seen, cache = remember(cache, {"key": k, "value": v, "forget": forget, "positions": positions})
        keys, values = seen["key"].astype(q.dtype), seen["value"].astype(q.dtype)
        gates = {"query_forget": forget, "key_forget": seen["forget"]}
        out = cached_attention(q, keys, values, positions, seen["positions"], **gates, **see)
        return finish(out, x_BxTxD, self.cfg, self.dtype), cache

    @classmethod
    def rewinds(cls, cfg: ModelConfig) -> bool:
        return False  # the sum of gates goes on from the newest token that is stored

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        K = head_dim(cfg)
        keys = key_value_cache(batch, length, cfg.kv_heads or cfg.heads, K, K, dtype)
        return keys | {"forget": jnp.zeros((batch, length, cfg.heads, 2), jnp.float32)}

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """q k^T and weights v over the keys that a query sees, mean over positions."""
        return 4 * cfg.heads * head_dim(cfg) * mean_keys(length)


ROWS = {
    # The paper's FoX (LLaMA): forget gates are the only positions, no qk-norm. Its FoX (Pro) is qk_norm = rms,
    # output_norm = head and gate = sigmoid, besides a token shift of keys and values that is not built here.
    "forgetting": Row(
        ForgettingMixer, dataclasses.replace(SOFTMAX, qk_norm="none", rope_fraction=0.0, output_norm="none")
    ),
}
