"""Multi-head latent attention: keys and values made from one small vector a token (DeepSeek-V2, 2405.04434)."""

import dataclasses
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention import cached_attention, softmax_attention
from slm.config import MixerConfig, ModelConfig
from slm.models.layers import dense
from slm.models.mixers.base import Context, Row, finish, head_dim, project, rotate
from slm.models.mixers.cache import empty_slots, remember
from slm.models.mixers.softmax import SoftmaxFamily, mean_keys


class LatentMixer(SoftmaxFamily):
    """MLA: k_h = [W_uk,h c; k_rope], v_h = W_uv,h c, with c = norm(W x) and one k_rope for all heads (eq. 9-19).

    Heads are K = head_dim without positions plus P = rope_dim that rotate; values have head_dim. With a
    query_latent_dim, queries come from a normed latent of their own. There are no grouped heads: model.kv_heads does
    not matter.

    Training expands keys and values. With a cache they are never made: it holds [c; k_rope] alone, W_uk is absorbed
    into the queries and W_uv into the outputs, which is multi-query attention with L + P dimensions (section 2.1.2).
    """

    plain = False
    int8_cache = False  # one scale would have to serve the normed latent and the rotated key

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m, size = self.cfg, self.cfg.mixer, self.rotary_size(self.cfg)
        H, K, L, P = cfg.heads, head_dim(cfg), latent_size(cfg), rope_size(cfg)
        source = x_BxTxD
        if m.query_latent_dim:
            source = self._norm("query_latent_norm")(dense(m.query_latent_dim, "query_latent", cfg, self.dtype)(source))
        q, q_rope = jnp.split(project(source, H, K + P, "query", cfg, self.dtype), [K], axis=-1)
        q_rope = rotate(q_rope, context, size)
        latent = self._norm("latent_norm")(dense(L, "latent", cfg, self.dtype)(x_BxTxD))
        k_rope = rotate(project(x_BxTxD, 1, P, "key_rope", cfg, self.dtype), context, size)
        see = self.sight() | {"scale": (K + P) ** -0.5}
        if cache is None:
            bare = dataclasses.replace(cfg, bias=())  # an offset of keys could not be absorbed
            k = project(latent, H, K, "key_up", bare, self.dtype)
            v = project(latent, H, K, "value_up", bare, self.dtype)
            k = jnp.concatenate([k, jnp.broadcast_to(k_rope, (*k.shape[:3], P))], -1)
            q = jnp.concatenate([q, q_rope], -1)
            also = {"segment_ids": context.segment_ids, "implementation": self.implementation(cfg)}
            return finish(softmax_attention(q, k, v, **also, **see), x_BxTxD, cfg, self.dtype), None
        key_up, value_up = (
            einops.rearrange(self.variables["params"][name]["kernel"].astype(self.dtype), "L (H K) -> L H K", H=H)
            for name in ("key_up", "value_up")
        )
        q = jnp.concatenate([jnp.einsum("BTHK,LHK->BTHL", q, key_up), q_rope], -1)
        new = {"latent": jnp.concatenate([latent, k_rope[:, :, 0]], -1), "positions": context.positions}
        seen, cache = remember(cache, new)
        # Keys and values are one array, read once; what the weights make of its rotated part is dropped.
        latents = seen["latent"].astype(q.dtype)[:, :, None]
        out = cached_attention(q, latents, latents, context.positions, seen["positions"], **see)[..., :L]
        return finish(jnp.einsum("BTHL,LHV->BTHV", out, value_up), x_BxTxD, cfg, self.dtype), cache

    def _norm(self, name):
        return nn.RMSNorm(epsilon=self.cfg.norm_eps, dtype=self.dtype, name=name)

    @classmethod
    def rotated_head(cls, cfg: ModelConfig) -> int:
        return rope_size(cfg)

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """Latents and rotated keys side by side (B, S, L + P), whatever the number of heads."""
        return empty_slots(batch, length, dtype, latent=(latent_size(cfg) + rope_size(cfg),))

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """q k^T and weights v in training, where keys and values are expanded."""
        return 2 * cfg.heads * (2 * head_dim(cfg) + rope_size(cfg)) * mean_keys(length)


def latent_size(cfg: ModelConfig) -> int:
    """L: mixer.latent_dim, or the paper's four heads."""
    return cfg.mixer.latent_dim or 4 * head_dim(cfg)


def rope_size(cfg: ModelConfig) -> int:
    """P: mixer.rope_dim, or the paper's half head."""
    return cfg.mixer.rope_dim or head_dim(cfg) // 2


MLA = MixerConfig(
    latent_dim=0,
    query_latent_dim=0,
    rope_dim=0,
    rope_fraction=1.0,
    sink_logits=False,
    softcap=0.0,
    gate="none",
    gate_rank=0,
    implementation="auto",
)
ROWS = {
    "mla": Row(LatentMixer, MLA),
    # Kimi Linear (2510.26692, section 3): the shared part of the keys stays but does not rotate.
    "nope_mla": Row(LatentMixer, dataclasses.replace(MLA, rope_fraction=0.0)),
}
