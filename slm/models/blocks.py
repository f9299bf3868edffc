"""One layer: pre-norm token mixing, then pre-norm feed-forward, each added to the residual stream."""

from typing import Any

import flax.linen as nn

from slm.config import ModelConfig
from slm.models.layers import MLP, norm
from slm.models.mixers import MIXERS, Context


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x). Called as block(x_BxTxD, context, cache) -> (x_BxTxD, cache)."""

    cfg: ModelConfig
    mixer: str
    dtype: Any

    @nn.compact
    def __call__(self, x, context: Context, cache=None):
        mixed, cache = MIXERS[self.mixer](self.cfg, self.dtype, name="mixer")(
            norm("attention_norm", self.cfg, self.dtype)(x), context, cache
        )
        x = x + mixed
        return x + MLP(self.cfg, self.dtype, name="mlp")(norm("mlp_norm", self.cfg, self.dtype)(x)), cache
