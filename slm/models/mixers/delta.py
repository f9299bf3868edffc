"""The delta rule: a state that is corrected towards each new value, alone and with decay.

Parameters of one mixer: `query`, `key`, `value`, `beta`, `gate`, `out` kernels, `query_conv` ... short convolutions,
`output_norm`; with decay also `step` (its projection), `decay` (A_log of the papers) and `bias` (their dt_bias).
"""

import dataclasses
import math
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.attention import delta_attention
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


class DeltaMixer(RecurrentMixer):
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T (Schlag et al. 2021; Yang et al. 2024, 2406.06484, section 2),
    with beta_t = sigmoid(W x_t), or twice that with `negative_eigenvalues` (Grazzi et al. 2025, 2411.12537).

    q, k and v pass a short convolution and SiLU, then q and k an L2 norm. `householders` N > 1 is DeltaProduct
    (Siems et al. 2025, 2502.10297, section 3): N keys, values and betas a token, taken one after the other after the
    token's one decay, and one read. `groups` G > 0 is grouped value attention as in Qwen3-Next: G heads of queries and
    keys for all value heads; 0: one each.
    """

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m = self.cfg, self.cfg.mixer
        H, G, N, K, V = sizes(cfg)
        backend = recurrent_backend(cfg)
        news = {}

        def heads(name, count, size):
            x_BxTxHxK = project(x_BxTxD, count, size, name, cfg, self.dtype)
            return jax.nn.silu(short_conv(x_BxTxHxK, f"{name}_conv", cfg, self.dtype, context, cache, news))

        turned = self.rotary_size(cfg)
        q = rotate(normalise(heads("query", G, K), "query_norm", cfg, self.dtype), context, turned)
        k = rotate(normalise(heads("key", N * G, K), "key_norm", cfg, self.dtype), context, turned)
        v = heads("value", N * H, V)
        logits = dense(N * H, "beta", cfg, self.dtype)(x_BxTxD).astype(jnp.float32)
        beta = jax.nn.sigmoid(logits) * (2.0 if m.negative_eigenvalues else 1.0)
        log_decay, segment_ids = self.log_decay(x_BxTxD), context.segment_ids
        k, v, beta = live(context, cache, k, v, beta)
        if log_decay is not None:
            (log_decay,) = live(context, cache, log_decay)
        if N > 1:
            q, k, v, beta, log_decay, segment_ids = steps(N, q, k, v, beta, log_decay, segment_ids)
        q, k = (jnp.repeat(x, H // G, axis=2) for x in (q, k))
        initial_state, reset_state = self.starting_states((H, K, V), context, cache)
        out, news["state"] = delta_attention(
            q, k, v, beta,
            log_decay=log_decay, initial_state=initial_state, segment_ids=segment_ids, reset_state=reset_state,
            form="chunked" if cache is None or x_BxTxD.shape[1] > 1 else "recurrent", chunk=m.chunk,
            implementation=backend,
        )  # fmt: skip
        return finish(out[:, N - 1 :: N], x_BxTxD, cfg, self.dtype), None if cache is None else news

    def log_decay(self, x_BxTxD) -> jax.Array | None:
        """float32 (B, T, H), (B, T, H, K), or None without decay."""
        return None

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        H, G, N, K, V = sizes(cfg)
        convs = conv_cache(cfg, batch, dtype, query_conv=G * K, key_conv=N * G * K, value_conv=N * H * V)
        return {"state": jnp.zeros((batch, H, K, V), jnp.float32)} | convs

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Of the definition: S^T k and the write for each key, and one read (a chunked form computes more)."""
        H, _, N, K, V = sizes(cfg)
        return (4 * N + 2) * H * K * V


class GatedDeltaMixer(DeltaMixer):
    """The delta rule on exp(log_decay_t) S_{t-1}, one decay a head (Yang et al. 2025, 2412.06464, equation 10).

    log_decay = -exp(decay) softplus(step x + bias) as in Mamba-2 (Dao & Gu 2024).
    """

    def log_decay(self, x_BxTxD):
        H = self.cfg.heads
        logits = dense(H, "step", _unbiased(self.cfg), self.dtype)(x_BxTxD).astype(jnp.float32)
        rate = self.param("decay", log_of_uniform(1e-2, 16.0), (H,)).astype(jnp.float32)
        bias = self.param("bias", step_bias, (H,)).astype(jnp.float32)
        return -jnp.exp(rate) * jax.nn.softplus(logits + bias)


class KimiDeltaMixer(DeltaMixer):
    """Kimi Delta Attention (Kimi Team 2025, 2510.26692, equation 1): the decay is one for each channel of the key.

    log_decay = -exp(decay_h) softplus(step (step_down x) + bias); `rank` is the inner size, 0: that of a value head.
    """

    def log_decay(self, x_BxTxD):
        cfg = self.cfg
        H, K, rank = cfg.heads, key_size(cfg), cfg.mixer.rank or value_size(cfg)
        low = dense(rank, "step_down", _unbiased(cfg), self.dtype)(x_BxTxD)
        logits = project(low, H, K, "step", _unbiased(cfg), self.dtype).astype(jnp.float32)
        rate = self.param("decay", log_of_uniform(1.0, 16.0), (H,)).astype(jnp.float32)
        bias = self.param("bias", step_bias, (H, K)).astype(jnp.float32)
        return -jnp.exp(rate)[:, None] * jax.nn.softplus(logits + bias)


def sizes(cfg: ModelConfig) -> tuple[int, int, int, int, int]:
    """(value heads H, query/key heads G, Householder steps N, K, V). Raises ConfigError if G does not divide H."""
    H, G = cfg.heads, cfg.mixer.groups or cfg.heads
    if H % G:
        raise ConfigError(f"model.mixer.groups = {G} must divide model.heads = {H}")
    return H, G, cfg.mixer.householders or 1, key_size(cfg), value_size(cfg)


def steps(N: int, q, k, v, beta, log_decay, segment_ids):
    """Tokens as N steps each, (B, N T, ...), of which the first decays and begins segments, and the last is read.

    k, v, beta: (B, T, H N, ...), the steps of the first head first, so that heads may lie on several devices; the
    others as `delta_attention` has them.
    """
    k, v, beta = (einops.rearrange(x, "B T (H N) ... -> B (T N) H ...", N=N) for x in (k, v, beta))
    q = jnp.repeat(q, N, axis=1)
    if log_decay is not None:
        later = jnp.zeros_like(log_decay)
        log_decay = einops.rearrange([log_decay] + [later] * (N - 1), "N B T ... -> B (T N) ...")
    return q, k, v, beta, log_decay, None if segment_ids is None else jnp.repeat(segment_ids, N, axis=1)


def log_of_uniform(low: float, high: float):
    """Initializer: the logarithm of a uniform number."""
    return lambda key, shape: jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high))


def step_bias(key, shape):
    """Initializer: softplus^-1 of step sizes that are log-uniform in [1e-3, 1e-1] (Gu & Dao 2023, section 3.6)."""
    size = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1)))
    return size + jnp.log(-jnp.expm1(-size))


def _unbiased(cfg: ModelConfig) -> ModelConfig:
    """For projections to which a bias of their own is added in float32."""
    return dataclasses.replace(cfg, bias=())


DELTA = MixerConfig(
    qk_norm="l2",
    rope_fraction=0.0,
    gate="none",
    gate_rank=0,
    gate_first=False,
    output_norm="head",
    conv=4,
    learned_state=False,
    expand_k=1.0,
    expand_v=1.0,
    groups=0,
    negative_eigenvalues=False,
    householders=1,
    chunk=64,
    implementation="auto",
)
# V = 2 K and H K = 3/4 D make 6 D^2 parameters, as in the paper's code (flash-linear-attention) and in Olmo-Hybrid.
GATED = dataclasses.replace(DELTA, gate="silu", expand_k=0.75, expand_v=1.5)
NEGATIVE = dataclasses.replace(GATED, negative_eigenvalues=True)
ROWS = {
    "delta": Row(DeltaMixer, DELTA),
    "gated_delta": Row(GatedDeltaMixer, GATED),
    # Grazzi et al. 2025 (2411.12537), Olmo-Hybrid: eigenvalues in [-1, 1] track states such as parity.
    "gated_delta_negative": Row(GatedDeltaMixer, NEGATIVE),
    # Siems et al. 2025: with one step it is gated_delta_negative.
    "delta_product": Row(GatedDeltaMixer, dataclasses.replace(NEGATIVE, householders=2)),
    "kda": Row(KimiDeltaMixer, dataclasses.replace(DELTA, gate="sigmoid", gate_rank=-1, rank=0)),
}
