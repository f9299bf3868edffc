"""Recurrences whose state decays: RetNet, lightning attention, simple GLA, GLA, HGRN2.

Parameters of one mixer: `query`, `key`, `value`, `gate`, `out` kernels, `output_norm`; where decays depend on the
input, `forget` (their projection, of which GLA's first factor is `forget_down`) and `bias`; HGRN2's lower bounds
move by `decay`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention import decay_attention
from slm.config import MixerConfig, ModelConfig
from slm.models.layers import dense
from slm.models.mixers.base import (
    Context,
    RecurrentMixer,
    Row,
    conv_cache,
    finish,
    key_size,
    live,
    normalise,
    project,
    recurrent_backend,
    rotate,
    short_conv,
    value_size,
)

GATE_NORMALIZER = 16.0
"""tau of GLA (Yang et al. 2024, section 4.4): log decays are log_sigmoid / tau, near 0 at the beginning."""


class DecayMixer(RecurrentMixer):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, out_t = scale q_t^T S_t, then norm and gate.

    Subclasses say what q, k and v pass before (`activate`) and what decays (`forget`).
    """

    scale = None

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m = self.cfg, self.cfg.mixer
        H, K, V = cfg.heads, key_size(cfg), value_size(cfg)
        news = {}

        def heads(name, size):
            x_BxTxHxK = project(x_BxTxD, H, size, name, cfg, self.dtype)
            return self.activate(name, short_conv(x_BxTxHxK, f"{name}_conv", cfg, self.dtype, context, cache, news))

        q, k, v = heads("query", K), heads("key", K), heads("value", V)
        k, log_decay = self.forget(x_BxTxD, k, context)
        turned = self.rotary_size(cfg)
        q = rotate(normalise(q, "query_norm", cfg, self.dtype), context, turned)
        k = rotate(normalise(k, "key_norm", cfg, self.dtype), context, turned)
        k, v, log_decay = live(context, cache, k, v, log_decay)
        state, reset_state = self.starting_states((H, K, V), context, cache)
        out, news["state"] = decay_attention(
            q, k, v, log_decay,
            scale=self.scale, initial_state=state, segment_ids=context.segment_ids, reset_state=reset_state,
            form="chunked" if cache is None or x_BxTxD.shape[1] > 1 else "recurrent", chunk=m.chunk,
            implementation=recurrent_backend(cfg),
        )  # fmt: skip
        return finish(out, x_BxTxD, cfg, self.dtype), None if cache is None else news

    def activate(self, name: str, x_BxTxHxK) -> jax.Array:
        """`query`, `key` or `value` after projection and convolution: here SiLU where there is a convolution."""
        return jax.nn.silu(x_BxTxHxK) if self.cfg.mixer.conv else x_BxTxHxK

    def forget(self, x_BxTxD, k_BxTxHxK, context: Context) -> tuple[jax.Array, jax.Array]:
        """(keys, log_decay (B, T, H) or (B, T, H, K) float32)."""
        raise NotImplementedError

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        H, K, V = cfg.heads, key_size(cfg), value_size(cfg)
        convs = conv_cache(cfg, batch, dtype, query_conv=H * K, key_conv=H * K, value_conv=H * V)
        return {"state": jnp.zeros((batch, H, K, V), jnp.float32)} | convs

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Of the definition: one write and one read of the state (a chunked form computes more)."""
        return 4 * cfg.heads * key_size(cfg) * value_size(cfg)


class RetNetMixer(DecayMixer):
    """Retention (Sun et al. 2023, 2307.08621, equation 8): head h keeps gamma_h = 1 - 2^(-5-h) of its state."""

    def forget(self, x_BxTxD, k_BxTxHxK, context):
        gamma = 1 - 2.0 ** (-5 - jnp.arange(self.cfg.heads, dtype=jnp.float32))
        return k_BxTxHxK, _constant(jnp.log(gamma), x_BxTxD)


class LightningMixer(DecayMixer):
    """Lightning attention (Qin et al. 2024, 2401.04658) as in MiniMax-01 (2501.08313): SiLU on q, k and v, no scale.

    log_decay = -2^(-8 (h+1) / H) (1 - layer / (layers - 1 + 1e-5) + 1e-5): the slopes of ALiBi, flatter with depth.
    """

    scale = 1.0

    def activate(self, name, x_BxTxHxK):
        return jax.nn.silu(x_BxTxHxK)

    def forget(self, x_BxTxD, k_BxTxHxK, context):
        H, last = self.cfg.heads, self.cfg.layers - 1
        slope = 2.0 ** (-8 * (jnp.arange(H, dtype=jnp.float32) + 1) / H)
        # Of whole numbers first, so that the last layers' small factors do not drown in the rounding of 1.
        factor = ((last - context.layer) + 1e-5) / (last + 1e-5) + 1e-5
        return k_BxTxHxK, _constant(-slope * factor, x_BxTxD)


class SimpleGLAMixer(DecayMixer):
    """One data-dependent decay a head, log_decay = log_sigmoid(forget x + bias) / 16: gated retention (Sun et al. 2024,
    2405.05254), without its rotary positions and with short convolutions, as flash-linear-attention's simple GLA."""

    def forget(self, x_BxTxD, k_BxTxHxK, context):
        H = self.cfg.heads
        logits = dense(H, "forget", _unbiased(self.cfg), self.dtype)(x_BxTxD).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (H,)).astype(jnp.float32)
        return k_BxTxHxK, jax.nn.log_sigmoid(logits + bias) / GATE_NORMALIZER


class GLAMixer(DecayMixer):
    """Gated linear attention (Yang et al. 2024, 2312.06635, section 4.4): one decay a channel of the key.

    log_decay = log_sigmoid(forget (forget_down x) + bias) / 16; `rank` is the inner size, 0: the paper's 16.
    """

    def forget(self, x_BxTxD, k_BxTxHxK, context):
        cfg = self.cfg
        H, K = cfg.heads, key_size(cfg)
        low = dense(cfg.mixer.rank or 16, "forget_down", _unbiased(cfg), self.dtype)(x_BxTxD)
        logits = project(low, H, K, "forget", _unbiased(cfg), self.dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (H, K)).astype(jnp.float32)
        return k_BxTxHxK, jax.nn.log_sigmoid(logits + bias) / GATE_NORMALIZER


class HGRN2Mixer(DecayMixer):
    """HGRN2 (Qin et al. 2024, 2404.07904, section 3): keys are what is forgotten, k = 1 - f, and q = SiLU(W x).

    f = bound + (1 - bound) sigmoid(W_key x). The paper learns bounds that rise with depth, a cumulative softmax over
    layers, which begins at layer / layers. Here each layer moves its own from there: bound = sigmoid(logit(layer /
    layers) + decay), with `decay` (H, K) learned from 0. The first layer's is 0 in both.
    """

    def activate(self, name, x_BxTxHxK):
        return jax.nn.silu(x_BxTxHxK) if name == "query" else x_BxTxHxK

    def forget(self, x_BxTxD, k_BxTxHxK, context):
        offset = self.param("decay", nn.initializers.zeros, k_BxTxHxK.shape[2:]).astype(jnp.float32)
        k, log_decay = bounded(k_BxTxHxK.astype(jnp.float32), offset, context.layer, self.cfg.layers)
        return k.astype(self.dtype), log_decay


def bounded(logits, offset, layer, layers: int):
    """(1 - f, log f) of f = bound + (1 - bound) sigmoid(logits), bound = sigmoid(logit(layer / layers) + offset)."""
    below, above = jnp.log(jnp.float32(layer)) + offset, jnp.log(jnp.float32(layers - layer))
    total = jnp.logaddexp(below, above)
    k = jnp.exp(above - total) * jax.nn.sigmoid(-logits)
    # f = (1 + bound e^-x) / (1 + e^-x) does not lose a small f, 1 - k not the little that a large one lacks to 1.
    small = jax.nn.softplus(below - total - logits) - jax.nn.softplus(-logits)
    return k, jnp.where(k < 0.5, jnp.log1p(-jnp.minimum(k, 0.5)), small)


def _constant(log_decay_H, x_BxTxD):
    return jnp.broadcast_to(log_decay_H, (*x_BxTxD.shape[:2], len(log_decay_H)))


def _unbiased(cfg: ModelConfig) -> ModelConfig:
    """For projections to decays, whose bias is a parameter of their own."""
    return dataclasses.replace(cfg, bias=())


RETNET = MixerConfig(
    conv=0, qk_norm="none", rope_fraction=1.0, gate="silu", gate_rank=0, gate_first=False, output_norm="head",
    expand_k=1.0, expand_v=2.0, learned_state=False, chunk=64, implementation="auto",
)  # fmt: skip
LIGHTNING = dataclasses.replace(RETNET, rope_fraction=0.0, gate="sigmoid", output_norm="full", expand_v=1.0)
SIMPLE_GLA = dataclasses.replace(RETNET, rope_fraction=0.0, conv=4, expand_v=1.0)
GLA = dataclasses.replace(SIMPLE_GLA, conv=0, expand_k=0.5, rank=16, chunk=32)
HGRN2 = dataclasses.replace(LIGHTNING, gate="none", chunk=32)
ROWS = {
    "retnet": Row(RetNetMixer, RETNET),
    "lightning": Row(LightningMixer, LIGHTNING),
    "simple_gla": Row(SimpleGLAMixer, SIMPLE_GLA),
    "gla": Row(GLAMixer, GLA),
    "hgrn2": Row(HGRN2Mixer, HGRN2),
}
