"""One layer: pre-norm token mixing, then pre-norm feed-forward, each added to the residual stream."""

from typing import Any

import flax.linen as nn

from slm.config import ModelConfig
from slm.models.layers import MLP, norm
from slm.models.mixers import Context, mixer


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x) unless cfg.mlp is none.

    Called as block(x_BxTxD, context, cache) -> (x_BxTxD, cache).
    """

    cfg: ModelConfig
    mechanism: str
    dtype: Any

    @nn.compact
    def __call__(self, x, context: Context, cache=None):
        normed = norm("attention_norm", self.cfg, self.dtype)(x)
        mixed, cache = mixer(self.mechanism, self.cfg, self.dtype)(normed, context, cache)
        x = x + mixed
        if self.cfg.mlp == "none":
            return x, cache
        return x + MLP(self.cfg, self.dtype, name="mlp")(norm("mlp_norm", self.cfg, self.dtype)(x)), cache
