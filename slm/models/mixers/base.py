"""What token mixers are made of besides their mechanism: the interface, and the switches that they share.

A mixer is a linen module called as mixer(x_BxTxD, context, cache) -> (y_BxTxD, cache), where cache is None in training.
Its `cfg.mixer` has been filled in from its row's defaults (`configured`), so that it reads switches without asking
where they come from. In a call with a cache, padding (position -1) stands only at the end of a row.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.layers import dense, residual_std, rms_norm
from slm.models.rope import apply_rope


@flax.struct.dataclass
class Context:
    """What layers need to know about the tokens, computed once for all of them."""

    positions: jax.Array
    """(B, T) int32 inside the document; -1 marks padding, which is never written to a cache."""
    segment_ids: jax.Array | None
    """(B, T) int32, or None for one segment. Always None with a cache."""
    rope: dict[int, tuple[jax.Array, jax.Array]]
    """Tables of slm.models.rope by the number of dimensions that they turn; empty without rotary positions."""
    layer: jax.Array | int = 0
    """Number of this layer, from 0."""
    local_rope: dict[int, tuple[jax.Array, jax.Array]] | None = None
    """`rope` of layers to which rope.local_theta applies."""


class Mixer(nn.Module):
    """Base of all mixers."""

    cfg: ModelConfig
    """With cfg.mixer filled in: None is left only where the mechanism does not have the switch."""
    dtype: Any
    """Compute dtype."""
    bidirectional = False
    """Whether it can see both sides (cfg.causal = False)."""
    int8_cache: ClassVar[bool | None] = None
    """Whether cached keys and values may be int8; None: it caches none."""
    own_loss = False
    """Whether it attaches a loss of its own to the backward pass, which no loss scaling reaches."""

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """What decoding carries from token to token for sequences of at most `length` tokens: every byte of it.

        `dtype` is for copies of activations (keys, values, inputs of convolutions); recurrent states are float32.
        """
        raise NotImplementedError

    @classmethod
    def rewinds(cls, cfg: ModelConfig) -> bool:
        """Whether tokens may be read again from an earlier position on without undoing what is in the cache: what
        stands there now is overwritten, and nothing that is still needed has made room for it."""
        return False

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Forward FLOPs per token at sequence length `length` besides matrices called `kernel`; of what a mask leaves
        out, nothing is counted."""
        raise NotImplementedError

    @classmethod
    def rotary_size(cls, cfg: ModelConfig) -> int:
        """Dimensions of a head that rotate; 0: none."""
        return even_share(cfg, cls.rotated_head(cfg))

    @classmethod
    def rotated_head(cls, cfg: ModelConfig) -> int:
        """Size of what mixer.rope_fraction is a share of."""
        return head_dim(cfg)

    @classmethod
    def backend(cls, cfg: ModelConfig, length: int, dtype: Any, platform: str, segments: bool) -> str:
        """The implementation that training on `platform` will use, for the table printed at start."""
        return "xla"

    def starting_states(self, shape: tuple[int, ...], context: Context, cache):
        """(initial_state (B, *shape) or None, reset_state (*shape) or None), float32, for the recurrent engines.

        The state at the first token of this call, and at the beginning of each later document.
        """
        learned = None
        if self.cfg.mixer.learned_state:
            learned = self.param("state", nn.initializers.zeros, shape).astype(jnp.float32)
        if cache is None:
            if learned is None:
                return None, None
            return jnp.broadcast_to(learned, (context.positions.shape[0], *shape)), learned
        state = cache["state"]
        if learned is not None:
            first = context.positions[:, 0] == 0
            state = jnp.where(first.reshape(-1, *[1] * len(shape)), learned, state)
        return state, None


class RecurrentMixer(Mixer):
    """Base of mixers over the engines of slm.attention that carry a state from token to token."""

    @classmethod
    def rotated_head(cls, cfg: ModelConfig) -> int:
        return key_size(cfg)

    @classmethod
    def backend(cls, cfg: ModelConfig, length: int, dtype: Any, platform: str, segments: bool) -> str:
        return "pallas" if recurrent_backend(cfg) == "pallas" else "xla"


class Row(NamedTuple):
    """One mechanism: its mixer, and the switches that it has with the values of its paper (None: has it not)."""

    mixer: type[Mixer]
    defaults: MixerConfig


def configured(row: Row, cfg: ModelConfig) -> ModelConfig:
    """`cfg` with cfg.mixer as this mechanism sees it: the user's choice, else the row's, only of switches it has."""
    chosen = {
        field.name: default if (choice := getattr(cfg.mixer, field.name)) is None else choice
        for field in dataclasses.fields(MixerConfig)
        if (default := getattr(row.defaults, field.name)) is not None
    }
    return dataclasses.replace(cfg, mixer=MixerConfig(**chosen))


def head_dim(cfg: ModelConfig) -> int:
    return cfg.head_dim or cfg.width // cfg.heads


def even_share(cfg: ModelConfig, size: int) -> int:
    """mixer.rope_fraction of `size`, as an even number that is no larger."""
    return 2 * (round((cfg.mixer.rope_fraction or 0) * size) // 2)


def logit_scale(cfg: ModelConfig) -> float:
    """What multiplies q k^T of softmax heads."""
    if cfg.mixer.scale:
        return cfg.mixer.scale
    # Logits of unit vectors times K**-0.5 would all be near 0 (nGPT, Loshchilov et al. 2024, section 2.3.2).
    return head_dim(cfg) ** (0.5 if cfg.mixer.qk_norm == "l2" else -0.5)


def key_size(cfg: ModelConfig) -> int:
    """K of a recurrent mechanism: head_dim times mixer.expand_k."""
    return round((cfg.mixer.expand_k or 1) * head_dim(cfg))


def value_size(cfg: ModelConfig) -> int:
    """V of a recurrent mechanism: head_dim times mixer.expand_v."""
    return round((cfg.mixer.expand_v or 1) * head_dim(cfg))


def recurrent_backend(cfg: ModelConfig) -> str:
    """cfg.mixer.implementation for a recurrent engine. Raises ConfigError for one that only softmax has."""
    chosen = cfg.mixer.implementation
    if chosen not in ("auto", "xla", "pallas"):
        raise ConfigError(
            f"model.mixer.implementation = {chosen}: a backend of softmax attention, which recurrent layers of "
            f"{' '.join(cfg.attention)} do not have; use auto"
        )
    return chosen


def project(x_BxTxD, heads: int, size: int, name: str, cfg: ModelConfig, dtype: Any) -> jax.Array:
    """x W as (B, T, heads, size)."""
    return einops.rearrange(dense(heads * size, name, cfg, dtype)(x_BxTxD), "B T (H K) -> B T H K", K=size)


def rotate(x_BxTxHxK, context: Context, size: int) -> jax.Array:
    """Rotary positions on the first `size` dimensions of each head, if the model has any."""
    if size not in context.rope:
        return x_BxTxHxK
    turned = apply_rope(x_BxTxHxK[..., :size], context.rope[size])
    return jnp.concatenate([turned, x_BxTxHxK[..., size:]], -1)


def normalise(x_BxTxHxK, name: str, cfg: ModelConfig, dtype: Any) -> jax.Array:
    """Queries or keys by cfg.mixer.qk_norm."""
    kind = cfg.mixer.qk_norm
    if kind == "rms":
        return rms_norm(name, cfg, dtype)(x_BxTxHxK)
    if kind == "l2":
        x = x_BxTxHxK.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)).astype(dtype)
    return x_BxTxHxK


def live(context: Context, cache, *arrays):
    """Arrays (B, T, ...) with zeros at padding, so that padded tokens leave a recurrent state as it is."""
    if cache is None:
        return arrays
    real = context.positions >= 0
    return tuple(jnp.where(real.reshape(real.shape + (1,) * (a.ndim - 2)), a, 0) for a in arrays)


class ShortConv(nn.Module):
    """Depthwise causal convolution: y_t = sum_w kernel_w x_{t-w}, inside a document. No activation.

    Called as conv(x_BxTxC, context, state) -> (y_BxTxC, state); state (B, width - 1, C) holds the last inputs, or None.
    """

    width: int
    dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BxTxC, context: Context, state=None):
        W, (B, T, C) = self.width, x_BxTxC.shape
        bound = W**-0.5  # as torch.nn.Conv1d begins, and with it the published models
        init = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)  # noqa: E731
        kernel_WxC = self.param("kernel", init, (W, C)).astype(self.dtype)
        before = jnp.zeros((B, W - 1, C), x_BxTxC.dtype) if state is None else state.astype(x_BxTxC.dtype)
        padded = jnp.concatenate([before, x_BxTxC], 1)
        # The filter's last tap meets the present token, as torch stores it.
        y = x_BxTxC * kernel_WxC[W - 1]
        for back in range(1, W):
            past = padded[:, W - 1 - back : W - 1 - back + T]
            if context.segment_ids is not None:
                same = context.segment_ids == jnp.pad(context.segment_ids, ((0, 0), (back, 0)))[:, :T]
                past = jnp.where(same[..., None], past, 0)
            y += past * kernel_WxC[W - 1 - back]
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (C,)).astype(self.dtype)
        if state is None:
            return y, None
        end = (context.positions >= 0).sum(1, keepdims=True)  # tokens of this call that are no padding
        last = jnp.take_along_axis(padded, (end + jnp.arange(W - 1))[..., None], 1)
        return y, last.astype(state.dtype)


def short_conv(
    x_BxTxHxK, name: str, cfg: ModelConfig, dtype: Any, context: Context, cache, news: dict, use_bias: bool = False
) -> jax.Array:
    """Heads through the short convolution `name` if cfg.mixer.conv is not 0; its new state goes into `news`[name]."""
    if not cfg.mixer.conv:
        return x_BxTxHxK
    H = x_BxTxHxK.shape[2]
    x = einops.rearrange(x_BxTxHxK, "B T H K -> B T (H K)")
    y, state = ShortConv(cfg.mixer.conv, dtype, use_bias, name=name)(x, context, None if cache is None else cache[name])
    if cache is not None:
        news[name] = state
    return einops.rearrange(y, "B T (H K) -> B T H K", H=H)


def conv_cache(cfg: ModelConfig, batch: int, dtype: Any, **channels: int) -> dict[str, jax.Array]:
    """Empty states of the short convolutions called like the keywords, which give their channels."""
    if not cfg.mixer.conv:
        return {}
    return {name: jnp.zeros((batch, cfg.mixer.conv - 1, C), dtype) for name, C in channels.items()}


def finish(out_BxTxHxV, x_BxTxD, cfg: ModelConfig, dtype: Any, gain: float | jax.Array = 1.0) -> jax.Array:
    """Output norm and output gate of cfg.mixer, in its order, then the projection `out` to (B, T, D).

    `gain` multiplies what has been normed and gated.
    """
    out = out_BxTxHxV.astype(dtype)
    if cfg.mixer.gate_first:
        out = _output_norm(_gated(out, x_BxTxD, cfg, dtype), cfg, dtype)
    else:
        out = _gated(_output_norm(out, cfg, dtype), x_BxTxD, cfg, dtype)
    out = einops.rearrange(out * jnp.asarray(gain, dtype), "B T H V -> B T (H V)")
    return dense(cfg.width, "out", cfg, dtype, residual_std(cfg), "out")(out)


def _output_norm(out_BxTxHxV, cfg, dtype):
    if cfg.mixer.output_norm == "head":
        return nn.RMSNorm(epsilon=cfg.norm_eps, dtype=dtype, name="output_norm")(out_BxTxHxV)
    if cfg.mixer.output_norm == "full":
        # Mamba-2's groups, whose heads share queries and keys, are normed apart.
        flat = einops.rearrange(out_BxTxHxV, "B T (G R) V -> B T G (R V)", G=cfg.mixer.groups or 1)
        flat = nn.RMSNorm(epsilon=cfg.norm_eps, dtype=dtype, feature_axes=(-2, -1), name="output_norm")(flat)
        return flat.reshape(out_BxTxHxV.shape)
    return out_BxTxHxV


GATES = {"sigmoid": jax.nn.sigmoid, "silu": jax.nn.silu, "gelu": jax.nn.gelu}


def _gated(out_BxTxHxV, x_BxTxD, cfg, dtype):
    if cfg.mixer.gate in (None, "none"):
        return out_BxTxHxV
    H, V = out_BxTxHxV.shape[2:]
    if cfg.mixer.gate_rank:
        rank = V if cfg.mixer.gate_rank == -1 else cfg.mixer.gate_rank
        x_BxTxD = dense(rank, "gate_down", cfg, dtype)(x_BxTxD)
    return out_BxTxHxV * GATES[cfg.mixer.gate](project(x_BxTxD, H, V, "gate", cfg, dtype))
