"""One layer: token mixing and feed-forward, each normed and added to the residual stream."""

from typing import Any

import flax.linen as nn

from slm.config import ModelConfig
from slm.models.layers import MLP, norm
from slm.models.mixers import Context, mixer


class Block(nn.Module):
    """A mixer and, unless cfg.mlp is none, a feed-forward, joined as cfg.residual says.

    Called as block(x_BxTxD, context, cache) -> (x_BxTxD, cache).
    """

    cfg: ModelConfig
    mechanism: str
    dtype: Any

    @nn.compact
    def __call__(self, x, context: Context, cache=None):
        cfg = self.cfg
        if cfg.residual == "post":
            return self._post(x, context, cache)
        normed = self._norm("attention_norm", x) if cfg.first_norm else x
        mixed, cache = mixer(self.mechanism, cfg, self.dtype)(normed, context, cache)
        if cfg.residual == "sandwich":
            mixed = self._norm("attention_post_norm", mixed)
        mixed = x + self._scaled(mixed)
        if cfg.mlp == "none":
            return mixed, cache
        mlp = MLP(cfg, self.dtype, name="mlp")
        if cfg.residual == "parallel_shared":
            return mixed + self._scaled(mlp(normed)), cache
        hidden = mlp(self._norm("mlp_norm", x if cfg.residual == "parallel" else mixed))
        if cfg.residual == "sandwich":
            hidden = self._norm("mlp_post_norm", hidden)
        return mixed + self._scaled(hidden), cache

    def _post(self, x, context, cache):
        """Both parts read the stream as it is, and the norms stand on it."""
        mixed, cache = mixer(self.mechanism, self.cfg, self.dtype)(x, context, cache)
        x = self._norm("attention_norm", x + self._scaled(mixed))
        if self.cfg.mlp == "none":
            return x, cache
        hidden = MLP(self.cfg, self.dtype, name="mlp")(x)
        return self._norm("mlp_norm", x + self._scaled(hidden)), cache

    def _norm(self, name, x):
        return norm(name, self.cfg, self.dtype)(x)

    def _scaled(self, x):
        return x if self.cfg.residual_scale == 1 else x * self.cfg.residual_scale
