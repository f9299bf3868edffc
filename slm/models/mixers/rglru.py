"""The real-gated linear recurrent unit of Griffin: a state of one number a channel."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention.diagonal import diagonal_recurrence
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.mixers.base import Context, Mixer, Row, conv_cache, finish, live, project, short_conv, value_size

SHARPNESS = 8.0
"""c of the paper's equation 3."""


class RGLRUMixer(Mixer):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t), log a_t = -8 softplus(decay) r_t (De et al. 2024, 2402.19427,
    equations 1-4), between a short convolution and a GELU-gated output projection.

    The gates r, i = sigmoid(W x + b) have block-diagonal W, one block a head. At a document's first token the factor
    sqrt(1 - a^2) is 1, as in RecurrentGemma's code: there is no past to make room for.
    """

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, biased = self.cfg, "recurrent" in self.cfg.bias
        inner = {"qkv"} if biased else set()
        cfg = dataclasses.replace(cfg, bias=tuple(inner | set(cfg.bias) & {"out"}))
        if cfg.mixer.implementation not in ("auto", "xla"):
            raise ConfigError(f"model.mixer.implementation = {cfg.mixer.implementation}: rglru layers only have xla")
        (B, T, _), H, V = x_BxTxD.shape, cfg.heads, value_size(cfg)
        news = {}
        u = project(x_BxTxD, H, V, "value", cfg, self.dtype)
        u = short_conv(u, "value_conv", cfg, self.dtype, context, cache, news, use_bias=biased)
        forget, enter = (BlockGate(self.dtype, name=name)(u) for name in ("forget_gate", "input_gate"))
        # Decays at first spread evenly over 0.9 ... 0.999 in a^2 (the paper's section 2.4).
        rate = self.param("decay", _slow_decays, (H, V)).astype(jnp.float32)
        log_a = -SHARPNESS * jax.nn.softplus(rate) * forget
        first = (context.positions == 0)[..., None, None]
        # Bounded, because the root has no slope at 0, where a forget gate that underflows puts it.
        left = jnp.maximum(-jnp.expm1(2 * jnp.where(first, -1.0, log_a)), 1e-12)
        room = jnp.where(first, 1.0, jnp.sqrt(left))
        x = room * enter * u.astype(jnp.float32)
        x, log_a = live(context, cache, x.reshape(B, T, H * V), log_a.reshape(B, T, H * V))
        state, reset_state = self.starting_states((H * V,), context, cache)
        h, news["state"] = diagonal_recurrence(
            x,
            log_a,
            initial_state=state,
            form="recurrent" if T == 1 else "chunked",
            chunk=cfg.mixer.chunk,
            segment_ids=context.segment_ids,
            reset_state=reset_state,
        )
        return finish(h.reshape(B, T, H, V), x_BxTxD, cfg, self.dtype), None if cache is None else news

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        channels = cfg.heads * value_size(cfg)
        state = {"state": jnp.zeros((batch, channels), jnp.float32)}
        return state | conv_cache(cfg, batch, dtype, value_conv=channels)

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """The two block-diagonal gates, and a multiplication and an addition a channel."""
        H, V = cfg.heads, value_size(cfg)
        return 4 * H * V * V + 2 * H * V


class BlockGate(nn.Module):
    """sigmoid(W u + b), with a block of W a head: (B, T, H, V) to the same, float32."""

    dtype: Any

    @nn.compact
    def __call__(self, u_BxTxHxV):
        H, V = u_BxTxHxV.shape[2:]
        blocks = self.param("map", nn.initializers.normal(V**-0.5), (H, V, V)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (H, V)).astype(jnp.float32)
        return jax.nn.sigmoid(jnp.einsum("BTHV,HVW->BTHW", u_BxTxHxV, blocks).astype(jnp.float32) + bias)


def _slow_decays(key, shape):
    """softplus^-1(-log(a) / 8) for a^2 uniform in (0.81, 0.998), so that 8 softplus(decay) is -log a at r = 1."""
    squares = jax.random.uniform(key, shape, jnp.float32, 0.9**2, 0.999**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(squares) / SHARPNESS))


ROWS = {
    "rglru": Row(
        RGLRUMixer,
        MixerConfig(
            conv=4, gate="gelu", gate_rank=0, gate_first=False, output_norm="none", expand_v=1.0, learned_state=False,
            chunk=64, implementation="auto",
        ),
    ),
}  # fmt: skip
