"""RWKV's time mixing. Its channel mixing is a feed-forward network and no part of this: blocks have their own.

Each projection reads a mixture of the token and the token before it (token shift) instead of a convolution of its
outputs. What the papers call receptance is `query` here.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention import dplr_attention, rwkv6_attention
from slm.config import MixerConfig, ModelConfig
from slm.models.layers import Dense, dense, residual_std
from slm.models.mixers.base import (
    GATES,
    Context,
    RecurrentMixer,
    Row,
    key_size,
    live,
    project,
    recurrent_backend,
    value_size,
)


class RWKVMixer(RecurrentMixer):
    """What RWKV-6 and RWKV-7 share: states, and the norm and projection of the heads' outputs."""

    def extend(self, engine, q, *arrays, context: Context, cache):
        """(out, new state) of a recurrent engine on its arrays, from the state in the cache; scores are not scaled."""
        cfg, m = self.cfg, self.cfg.mixer
        state, reset = self.starting_states((cfg.heads, key_size(cfg), value_size(cfg)), context, cache)
        return engine(
            q, *arrays,
            scale=1.0, initial_state=state, reset_state=reset, segment_ids=context.segment_ids,
            form="chunked" if cache is None or q.shape[1] > 1 else "recurrent", chunk=m.chunk,
            implementation=recurrent_backend(cfg),
        )  # fmt: skip

    def head_norm(self, out_BxTxHxV, scale: float | jax.Array) -> jax.Array:
        """LayerNorm of each head with weights of its own (a group norm), which begin as `scale`."""
        V = out_BxTxHxV.shape[-1]
        init = lambda key, shape, dtype: jnp.full(shape, scale, dtype)  # noqa: E731
        norm = nn.LayerNorm(
            epsilon=1e-5 * V,  # not model.norm_eps: scores are not scaled by 1/sqrt(K). The papers' 64e-5 for V = 64
            reduction_axes=-1, feature_axes=(-2, -1), scale_init=init, dtype=self.dtype, name="output_norm",
        )  # fmt: skip
        return norm(out_BxTxHxV)

    def project_out(self, out_BxTxHxV) -> jax.Array:
        flat = out_BxTxHxV.reshape(*out_BxTxHxV.shape[:2], -1)
        return dense(self.cfg.width, "out", self.cfg, self.dtype, residual_std(self.cfg), "out")(flat)

    def depth(self, context: Context) -> tuple[jax.Array, jax.Array]:
        """How deep this layer lies, on which the papers' initial values depend: (0 ... 1, 1 ... almost 0)."""
        layer = jnp.asarray(context.layer, jnp.float32)
        return layer / max(self.cfg.layers - 1, 1), 1 - layer / self.cfg.layers

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        state = jnp.zeros((batch, cfg.heads, key_size(cfg), value_size(cfg)), jnp.float32)
        return {"state": state, "shift": jnp.zeros((batch, cfg.width), dtype)}


class RWKV7Mixer(RWKVMixer):
    """RWKV-7 time mixing (Peng et al. 2025, 2503.14456, section 4), as published but for one thing: the value residual,
    by which later layers mix in the first layer's values, is left out, since it couples layers.

    S_t = diag(w_t) S_{t-1} - (a_t kappa_t) (kappa_t^T S_{t-1}) + k~_t v_t^T: kappa_t is the removal key of unit length,
    a_t the in-context learning rate, k~_t the replacement key. `rank` is the inner size of the low-rank projections of
    decay, rate and gate; 0: the published ones (`published_rank`).
    """

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, (B, T, D) = self.cfg, x_BxTxD.shape
        H, K, V = cfg.heads, key_size(cfg), value_size(cfg)
        deep, shallow = self.depth(context)
        along, zigzag = ramps(H, K)
        change, shift = token_shift(x_BxTxD, context, cache)
        powers = jnp.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None]
        mix = self.param("mix", lambda key: 1 - (jnp.arange(D) / D) ** (powers * shallow)).astype(self.dtype)
        x_query, x_decay, x_key, x_value, x_rate, x_gate = (x_BxTxD + change * mix[i] for i in range(6))

        def vector(name, init):
            """A parameter for every channel of the heads' keys, (H, K) float32."""
            return self.param(name, lambda key: jnp.broadcast_to(init, (H, K))).astype(jnp.float32)

        def low_rank(name, x, factor, size, activation=None):
            rank = cfg.mixer.rank or published_rank(D, factor)
            return LowRank(rank, H * size, activation, self.dtype, name=name)(x).reshape(B, T, H, size)

        slow = -6 + 6 * along ** (1 + deep**0.3)
        d = vector("decay", slow + 0.5 + 2.5 * zigzag) + low_rank("decay_low_rank", x_decay, 2.5, K, jnp.tanh)
        log_decay = -math.exp(-0.5) * jax.nn.sigmoid(d)  # bounded: no channel forgets more than 45 % in one token
        a = vector("bias", -0.19 + 0.3 * zigzag + 0.4 * (along - 0.5)) + low_rank("rate_low_rank", x_rate, 2.5, K)
        a = jax.nn.sigmoid(a)
        gate = low_rank("gate_low_rank", x_gate, 5.0, V, jax.nn.sigmoid)

        q = project(x_query, H, K, "query", cfg, self.dtype)
        k = project(x_key, H, K, "key", cfg, self.dtype).astype(jnp.float32)
        v = project(x_value, H, V, "value", cfg, self.dtype)
        removal = unit(k * vector("removal", 0.71 - 0.1 * (along - 0.5)))
        k = k * (1 + (a - 1) * vector("replacement", 1.02))
        k, remove, rewrite = (x.astype(self.dtype) for x in (k, removal, -a * removal))
        k, v, log_decay, rewrite = live(context, cache, k, v, log_decay, rewrite)
        out, state = self.extend(dplr_attention, q, k, v, log_decay, remove, rewrite, context=context, cache=cache)

        out = self.head_norm(out, ((context.layer + 1) / cfg.layers) ** 0.7)
        bonus = (q * vector("bonus", -0.04) * k).sum(-1, keepdims=True).astype(self.dtype)
        y = self.project_out((out + bonus * v) * gate)
        return y, None if cache is None else {"state": state, "shift": shift}

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Of the definition: kappa^T S, two writes, one read."""
        return 8 * cfg.heads * key_size(cfg) * value_size(cfg)


class RWKV6Mixer(RWKVMixer):
    """RWKV-6 time mixing (Finch: Peng et al. 2024, 2404.05892): the token shift depends on the data, so does the decay
    exp(-exp(d_t)), and the output is read before the decay, with a bonus for the present token.

    `rank` is the inner size of the low-rank projections; 0: the published 32 for the shift and 64 for the decay.
    """

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m, (B, T, D) = self.cfg, self.cfg.mixer, x_BxTxD.shape
        H, K, V = cfg.heads, key_size(cfg), value_size(cfg)
        deep, shallow = self.depth(context)
        along, _ = ramps(H, K)
        change, shift = token_shift(x_BxTxD, context, cache)
        # One static mixture from which the mixtures of the five projections are computed (ddlerp).
        powers, less = jnp.array([[1, 1, 1, 1, 0.5, 0.5], [0, 0, 0, 0.3, 0, 0]])[..., None]
        mix = self.param("mix", lambda key: 1 - (jnp.arange(D) / D) ** (powers * shallow) - less * deep)
        mix = mix.astype(self.dtype)
        low = plain_dense(5 * (m.rank or 32), "mix_low", self.dtype)(x_BxTxD + change * mix[0])
        x_decay, x_key, x_value, x_query, x_gate = (
            x_BxTxD + change * (mix[i + 1] + plain_dense(D, f"{name}_mix", self.dtype, small)(part))
            for i, (name, part) in enumerate(zip(MIXED, jnp.split(jnp.tanh(low), 5, -1), strict=True))
        )

        decay = self.param("decay", lambda key: -6 + 5 * along ** (0.7 + 1.3 * deep)).astype(jnp.float32)
        d = LowRank(m.rank or 64, H * K, jnp.tanh, self.dtype, small, name="decay_low_rank")(x_decay)
        log_decay = -jnp.exp(decay + d.reshape(B, T, H, K))
        waves = 0.1 * (jnp.arange(1, H * K + 1).reshape(H, K) % 3 - 1)
        bonus = self.param("bonus", lambda key: deep * (1 - along) + waves)
        q = project(x_query, H, K, "query", cfg, self.dtype)
        k = project(x_key, H, K, "key", cfg, self.dtype)
        v = project(x_value, H, V, "value", cfg, self.dtype)
        k, v, log_decay = live(context, cache, k, v, log_decay)
        out, state = self.extend(rwkv6_attention, q, k, v, log_decay, bonus, context=context, cache=cache)
        out = self.head_norm(out, 1.0)
        if m.gate != "none":
            out = out * GATES[m.gate](project(x_gate, H, V, "gate", cfg, self.dtype))
        return self.project_out(out), None if cache is None else {"state": state, "shift": shift}

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Of the definition: one write, one read."""
        return 4 * cfg.heads * key_size(cfg) * value_size(cfg)


MIXED = ("decay", "key", "value", "query", "gate")


class LowRank(nn.Module):
    """up activation(low x) in float32, (..., D) -> (..., features). `low` begins as zeros, as in RWKV-LM."""

    rank: int
    features: int
    activation: Callable | None
    dtype: Any
    up_init: Callable | None = None
    """None: orthogonal, of spectral norm 0.1 in projections to more features."""

    @nn.compact
    def __call__(self, x):
        gain = 0.1 * max(1.0, self.rank / self.features) ** 0.5
        low = plain_dense(self.rank, "low", self.dtype)(x)
        up = plain_dense(self.features, "up", self.dtype, self.up_init or nn.initializers.orthogonal(gain))
        return up(self.activation(low) if self.activation else low).astype(jnp.float32)


def token_shift(x_BxTxD, context: Context, cache):
    """(x_{t-1} - x_t with x_{-1} = 0 in each document, new state (B, D): the last token that is no padding)."""
    first = jnp.zeros_like(x_BxTxD[:, :1]) if cache is None else cache["shift"].astype(x_BxTxD.dtype)[:, None]
    since = jnp.concatenate([first, x_BxTxD], 1)
    before = since[:, :-1]
    if context.segment_ids is not None:
        same = context.segment_ids[:, 1:] == context.segment_ids[:, :-1]
        before = jnp.where(jnp.pad(same, ((0, 0), (1, 0)))[..., None], before, 0)
    if cache is None:
        return before - x_BxTxD, None
    end = (context.positions >= 0).sum(1)
    return before - x_BxTxD, since[jnp.arange(len(end)), end].astype(cache["shift"].dtype)


def published_rank(width: int, factor: float) -> int:
    """Inner size of RWKV-7's low-rank projections in RWKV-LM: `factor` sqrt(width) to the nearest 32, at least 32."""
    return max(32, 32 * round(factor * width**0.5 / 32))


def ramps(H: int, K: int) -> tuple[jax.Array, jax.Array]:
    """Initial values by channel, (H, K): 0 ... 1 over all heads; -1 ... 1, flat in the middle, over each head."""
    along = jnp.arange(H * K).reshape(H, K) / max(H * K - 1, 1)
    within = jnp.linspace(-1.0, 1.0, K)
    return along, jnp.broadcast_to(within * jnp.abs(within), (H, K))


def unit(x_BxTxHxK) -> jax.Array:
    """Each head's vector at length 1. A smaller epsilon than that of mixer.qk_norm: removal keys may be short."""
    return x_BxTxHxK * jax.lax.rsqrt(jnp.square(x_BxTxHxK).sum(-1, keepdims=True) + 1e-12)


def plain_dense(features: int, name: str, dtype: Any, init: Callable = nn.initializers.zeros) -> Dense:
    return Dense(features, dtype, init, name=name)


def small(key, shape, dtype=jnp.float32):
    """Initializer: uniform in [-0.01, 0.01]."""
    return jax.random.uniform(key, shape, dtype, -0.01, 0.01)


RWKV7 = MixerConfig(rank=0, learned_state=False, expand_k=1.0, expand_v=1.0, chunk=64, implementation="auto")
ROWS = {
    "rwkv7": Row(RWKV7Mixer, RWKV7),
    "rwkv6": Row(RWKV6Mixer, dataclasses.replace(RWKV7, gate="silu")),
}
