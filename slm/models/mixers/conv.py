"""Gated short convolutions: mixers that see cfg.mixer.conv tokens, to stand beside those that see all."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.layers import dense, residual_std
from slm.models.mixers.base import Context, Mixer, Row, ShortConv, conv_cache


class ConvMixer(Mixer):
    """Base of those below: one short convolution over the width of the model, called `conv`."""

    def convolve(self, x_BxTxD, context: Context, cache):
        """(y (B, T, D), cache). Raises ConfigError where cfg.mixer.conv = 0 leaves nothing of the layer."""
        if not self.cfg.mixer.conv:
            raise ConfigError(
                "model.mixer.conv = 0: base_conv and short_conv layers are convolutions; set it to 1 or more, or take "
                "them out of model.attention"
            )
        conv = ShortConv(self.cfg.mixer.conv, self.dtype, name="conv")
        y, state = conv(x_BxTxD, context, None if cache is None else cache["conv"])
        return y, None if cache is None else {"conv": state}

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        return conv_cache(cfg, batch, dtype, conv=cfg.width)

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """None: the filter is called `kernel`, and counted as such."""
        return 0.0


class BaseConvMixer(ConvMixer):
    """y = (conv(x) + b) * (W x + b') without a projection after it (Zoology, Arora et al. 2024, 2312.04927, section 4;
    its code adds x itself to y, which the residual stream does here)."""

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg = self.cfg
        gate = dense(cfg.width, "gate", dataclasses.replace(cfg, bias=("qkv",)), self.dtype)(x_BxTxD)
        y, cache = self.convolve(x_BxTxD, context, cache)
        bound = cfg.mixer.conv**-0.5  # as torch.nn.Conv1d begins
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)  # noqa: E731
        bias = self.param("bias", init, (cfg.width,)).astype(self.dtype)
        return (y + bias) * gate, cache


class ShortConvMixer(ConvMixer):
    """y = out(C * conv(B * h)) with B, C, h projections of x (LFM2, Liquid AI 2025)."""

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg = self.cfg
        before, after, h = (
            dense(cfg.width, name, cfg, self.dtype)(x_BxTxD) for name in ("input_gate", "output_gate", "value")
        )
        y, cache = self.convolve(before * h, context, cache)
        return dense(cfg.width, "out", cfg, self.dtype, residual_std(cfg), "out")(after * y), cache


ROWS = {
    "base_conv": Row(BaseConvMixer, MixerConfig(conv=3)),
    "short_conv": Row(ShortConvMixer, MixerConfig(conv=3)),
}
