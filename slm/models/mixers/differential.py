"""Differential attention: the difference of two softmaxes cancels common noise (Ye et al. 2024, 2410.05258)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention import cached_attention, softmax_attention
from slm.config import ModelConfig
from slm.errors import ConfigError
from slm.models.mixers.base import Context, Row, finish, head_dim, normalise, project, rotate
from slm.models.mixers.cache import empty_slots, remember
from slm.models.mixers.softmax import SOFTMAX, SoftmaxFamily, mean_keys


class DifferentialMixer(SoftmaxFamily):
    """(softmax(q1 k1) - lambda softmax(q2 k2)) v, a norm for each head, times 1 - lambda_init (equations 1-3).

    Of the `heads` query heads (and `kv_heads` key heads) every first of two is a q1 (k1), every second a q2 (k2), as in
    the authors' code; the half as many values have twice the size, so that the mixer is as large as softmax attention
    with these heads. `mix` holds
    the vectors of lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init, lambda_init = 0.8 - 0.6 exp(-0.3 layer).

    Raises ConfigError for an odd number of heads.
    """

    plain = False

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, K, size = self.cfg, head_dim(self.cfg), self.rotary_size(self.cfg)
        G = cfg.kv_heads or cfg.heads
        if cfg.heads % 2 or G % 2:
            raise ConfigError(
                f"model.heads = {cfg.heads}, model.kv_heads = {G}: differential attention halves them; make them even"
            )
        q = normalise(project(x_BxTxD, cfg.heads, K, "query", cfg, self.dtype), "query_norm", cfg, self.dtype)
        k = normalise(project(x_BxTxD, G, K, "key", cfg, self.dtype), "key_norm", cfg, self.dtype)
        v = project(x_BxTxD, G // 2, 2 * K, "value", cfg, self.dtype)
        q1, q2 = pairs(rotate(q, context, size), 2)
        k1, k2 = pairs(rotate(k, context, size), 2)
        see1, see2 = self._sights()
        if cache is None:
            also = {"segment_ids": context.segment_ids, "implementation": self.implementation(cfg)}
            out1, out2 = softmax_attention(q1, k1, v, **also, **see1), softmax_attention(q2, k2, v, **also, **see2)
        else:
            new = {"key": k1, "subtracted_key": k2, "value": v, "positions": context.positions}
            seen, cache = remember(cache, new)
            k1, k2, v = (seen[name].astype(q.dtype) for name in ("key", "subtracted_key", "value"))
            at = context.positions, seen["positions"]
            out1, out2 = cached_attention(q1, k1, v, *at, **see1), cached_attention(q2, k2, v, *at, **see2)
        first = 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(context.layer, jnp.float32))
        lq1, lk1, lq2, lk2 = self.param("mix", nn.initializers.normal(0.1), (4, K)).astype(jnp.float32)
        share = jnp.exp((lq1 * lk1).sum()) - jnp.exp((lq2 * lk2).sum()) + first
        out = out1.astype(jnp.float32) - share * out2.astype(jnp.float32)
        return finish(out, x_BxTxD, cfg, self.dtype, gain=1 - first), cache

    def _sights(self):
        """`sight` of either half of the heads."""
        see = self.sight()
        if see["sink_logits"] is None:
            return see, see
        return tuple(see | {"sink_logits": half} for half in pairs(see["sink_logits"], 0))

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        G, K = (cfg.kv_heads or cfg.heads) // 2, head_dim(cfg)
        return empty_slots(batch, length, dtype, key=(G, K), subtracted_key=(G, K), value=(G, 2 * K))

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """q k^T of all heads, and weights of all heads times values of twice the size."""
        return 6 * cfg.heads * head_dim(cfg) * mean_keys(length)


def pairs(x, axis: int):
    """(even, odd) entries along the axis, so that a pair of heads lies on one device."""
    x = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    return jax.lax.index_in_dim(x, 0, axis + 1, False), jax.lax.index_in_dim(x, 1, axis + 1, False)


ROWS = {
    "differential": Row(DifferentialMixer, dataclasses.replace(SOFTMAX, qk_norm="none", output_norm="head")),
}
