"""One layer: token mixing and feed-forward, each normed and added to the residual stream."""

import dataclasses
from typing import Any

import flax.linen as nn

from slm.config import ModelConfig
from slm.models.layers import MLP, dense, norm, residual_std
from slm.models.mixers import Context, head_dim, mixer


def block(cfg: ModelConfig, mechanism: str, dtype: Any) -> nn.Module:
    """A layer of the kind that cfg asks for."""
    return (BottleneckBlock if cfg.bottleneck else Block)(cfg, mechanism, dtype)


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


class BottleneckBlock(nn.Module):
    """MobileBERT's layer (Sun et al. 2020): a narrow stream inside, with norms after each residual.

    Queries and keys read one narrow copy of x, values x itself; the mixer and the feed-forwards add to another narrow
    copy, which a projection brings back to x.
    """

    cfg: ModelConfig
    mechanism: str
    dtype: Any

    @nn.compact
    def __call__(self, x, context: Context, cache=None):
        cfg, dtype = self.cfg, self.dtype
        inner = dataclasses.replace(cfg, width=cfg.bottleneck, head_dim=head_dim(cfg))

        def narrowed(name):
            return norm(f"{name}_norm", cfg, dtype)(dense(cfg.bottleneck, name, cfg, dtype, part="mlp")(x))

        stream = narrowed("narrow")
        mixed, cache = mixer(self.mechanism, inner, dtype)(narrowed("narrow_query"), context, cache, x)
        stream = norm("attention_norm", cfg, dtype)(stream + mixed)
        for i in range(cfg.feedforwards):
            stream = norm(f"mlp{i}_norm", cfg, dtype)(stream + MLP(inner, dtype, name=f"mlp{i}")(stream))
        wide = dense(cfg.width, "widen", cfg, dtype, residual_std(cfg), "mlp")(stream)
        return norm("widen_norm", cfg, dtype)(x + wide), cache
