"""Mamba-2: a state space with one decay a head, whose step size scales what is written; and its log-linear form."""

import dataclasses
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention import decay_attention
from slm.attention.loglinear import levels_of, log_linear_attention
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
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
from slm.models.mixers.delta import log_of_uniform, step_bias


class Mamba2Mixer(RecurrentMixer):
    """S_t = exp(A dt_t) S_{t-1} + dt_t B_t x_t^T, y_t = C_t^T S_t + skip x_t (Dao & Gu 2024, 2405.21060, section 7).

    A = -exp(decay) and dt = softplus(step + bias), one a head; B and C are the keys and queries of `groups` heads that
    the others share, x the values. All three pass a short convolution with a bias, then SiLU; the gate comes before the
    norm over all heads. The paper's sizes: expansion 2, here as values of twice head_dim, and N = head_dim * expand_k.
    """

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg = self.cfg
        H, G, K, V = sizes(cfg)
        news = {}

        def heads(name, count, size):
            x = project(x_BxTxD, count, size, name, cfg, self.dtype)
            return jax.nn.silu(short_conv(x, f"{name}_conv", cfg, self.dtype, context, cache, news, use_bias=True))

        turned = self.rotary_size(cfg)
        q = rotate(normalise(heads("query", G, K), "query_norm", cfg, self.dtype), context, turned)
        k = rotate(normalise(heads("key", G, K), "key_norm", cfg, self.dtype), context, turned)
        v = heads("value", H, V)
        logits = dense(H, "step", cfg, self.dtype)(x_BxTxD).astype(jnp.float32)
        rate = self.param("decay", log_of_uniform(1.0, 16.0), (H,)).astype(jnp.float32)
        dt = jax.nn.softplus(logits + self.param("bias", step_bias, (H,)).astype(jnp.float32))
        k, dt = live(context, cache, k, dt)
        write = (v.astype(jnp.float32) * dt[..., None]).astype(self.dtype)
        out, news["state"] = self.recur(x_BxTxD, q, k, write, -jnp.exp(rate) * dt, context, cache)
        skip = self.param("skip", nn.initializers.ones, (H,)).astype(jnp.float32)
        out = out.astype(jnp.float32) + einops.einsum(skip, v.astype(jnp.float32), "H, B T H V -> B T H V")
        return finish(out, x_BxTxD, cfg, self.dtype), None if cache is None else news

    def recur(self, x_BxTxD, q, k, v, log_decay, context: Context, cache):
        """(out (B, T, H, V), final state)."""
        cfg = self.cfg
        state, reset_state = self.starting_states((*log_decay.shape[2:], k.shape[-1], v.shape[-1]), context, cache)
        return decay_attention(
            q,
            k,
            v,
            log_decay,
            scale=1.0,
            initial_state=state,
            form="chunked" if cache is None or x_BxTxD.shape[1] > 1 else "recurrent",
            chunk=cfg.mixer.chunk,
            segment_ids=context.segment_ids,
            reset_state=reset_state,
            implementation=recurrent_backend(cfg),
        )

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        H, G, K, V = sizes(cfg)
        convs = conv_cache(cfg, batch, dtype, query_conv=G * K, key_conv=G * K, value_conv=H * V)
        return {"state": jnp.zeros((batch, H, K, V), jnp.float32)} | convs

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Of the definition: one write and one read of the state (a chunked form computes more)."""
        H, _, K, V = sizes(cfg)
        return 4 * H * K * V


class LogLinearMamba2Mixer(Mamba2Mixer):
    """Mamba-2 with a state for each scale of the past (Guo et al. 2025, 2506.04761, section 3.4).

    lambda = softplus(mixture * level x), one a head and level; `horizon` is the longest text that the levels reach
    over. Decoding carries a state a level; a prefill through the cache goes token by token.
    """

    def recur(self, x_BxTxD, q, k, v, log_decay, context, cache):
        cfg, H = self.cfg, self.cfg.heads
        if cfg.mixer.implementation not in ("auto", "xla"):
            raise ConfigError(
                f"model.mixer.implementation = {cfg.mixer.implementation}: log-linear layers only have xla"
            )
        L = levels_of(cfg.mixer.horizon)
        mixture = self.param("mixture", nn.initializers.ones, (H, L)).astype(jnp.float32)
        levels = project(x_BxTxD, H, L, "level", cfg, self.dtype).astype(jnp.float32)
        q, k = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (q, k))
        return log_linear_attention(
            q,
            k,
            v,
            log_decay,
            jax.nn.softplus(mixture * levels),
            scale=1.0,
            initial_state=None if cache is None else cache["state"],
            form="chunked" if cache is None else "recurrent",
            chunk=cfg.mixer.chunk,
            segment_ids=context.segment_ids,
            positions=context.positions,
        )

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        if levels_of(length) > levels_of(cfg.mixer.horizon):
            raise ConfigError(
                f"model.mixer.horizon = {cfg.mixer.horizon}: log-linear layers cannot remember {length} tokens"
            )
        cache = super().init_cache(cfg, batch, length, dtype)
        H, K, V = cache["state"].shape[1:]
        # One more than the past of the last token needs: what the token after it would.
        return cache | {"state": jnp.zeros((batch, H, levels_of(length) + 1, K, V), jnp.float32)}

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Of the definition: one write, and a read at each level, of which half are empty on average."""
        H, _, K, V = sizes(cfg)
        return (2 + levels_of(length)) * H * K * V

    @classmethod
    def backend(cls, cfg: ModelConfig, length: int, dtype: Any, platform: str, segments: bool) -> str:
        return "xla, T^2 within documents" if segments else "xla"


def sizes(cfg: ModelConfig) -> tuple[int, int, int, int]:
    """(heads H, groups G, K, V). Raises ConfigError if G does not divide H."""
    H, G = cfg.heads, cfg.mixer.groups or cfg.heads
    if H % G:
        raise ConfigError(f"model.mixer.groups = {G} must divide model.heads = {H}")
    return H, G, key_size(cfg), value_size(cfg)


MAMBA2 = MixerConfig(
    conv=4, qk_norm="none", rope_fraction=0.0, gate="silu", gate_rank=0, gate_first=True, output_norm="full",
    expand_k=1.0, expand_v=2.0, groups=1, learned_state=False, chunk=64, implementation="auto",
)  # fmt: skip
ROWS = {
    "mamba2": Row(Mamba2Mixer, MAMBA2),
    "log_linear_mamba2": Row(LogLinearMamba2Mixer, dataclasses.replace(MAMBA2, learned_state=None, horizon=16384)),
}
