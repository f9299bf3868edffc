"""Attention through a fixed mask: windows, strides, local and random blocks, global tokens, and their compositions."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from slm.attention.block_table import block_table
from slm.attention.patterns import Pattern, causal, parse, reach
from slm.attention.sparse import blocks_computed, cached_sparse_attention, sparse_attention
from slm.config import ModelConfig
from slm.errors import ConfigError
from slm.models.mixers.base import Context, Mixer, Row, finish, head_dim, logit_scale
from slm.models.mixers.cache import key_value_cache, remember
from slm.models.mixers.softmax import SOFTMAX, projections

BLOCK = 64


class SparseMixer(Mixer):
    """Softmax attention over grouped heads to what `cfg.mixer.pattern` makes visible of the past.

    All heads see the same. Positions in the pattern are those inside a document, so that packed documents are what each
    is alone.
    """

    int8_cache = True

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m = self.cfg, self.cfg.mixer
        check_backend(cfg)
        q, k, v = projections(x_BxTxD, cfg, self.dtype, context, self.rotary_size(cfg))
        see = {"pattern": mask(cfg), "scale": logit_scale(cfg), "softcap": m.softcap or None}
        if cache is None:
            ids = context.segment_ids
            positions = None if ids is None else context.positions
            out = sparse_attention(q, k, v, segment_ids=ids, positions=positions, block=BLOCK, **see)
        else:
            sinks, window = reach(mask(cfg)) or (0, None)
            new = {"key": k, "value": v, "positions": context.positions}
            seen, cache = remember(cache, new, window, sinks)
            keys, values = seen["key"].astype(q.dtype), seen["value"].astype(q.dtype)
            out = cached_sparse_attention(q, keys, values, context.positions, seen["positions"], **see)
        return finish(out, x_BxTxD, cfg, self.dtype), cache

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """Empty key/value cache of `length` slots, or of what the pattern can reach if that is less."""
        K, bound = head_dim(cfg), reach(mask(cfg))
        slots = length if bound is None else min(length, sum(bound))
        return key_value_cache(batch, slots, cfg.kv_heads or cfg.heads, K, K, dtype)

    @classmethod
    def rewinds(cls, cfg: ModelConfig) -> bool:
        return reach(mask(cfg)) is None

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """q k^T and weights v over the keys that a query sees, mean over positions; blocks have more."""
        return 4 * cfg.heads * head_dim(cfg) * block_table(mask(cfg), length, BLOCK).pairs / length

    @classmethod
    def backend(cls, cfg: ModelConfig, length: int, dtype: Any, platform: str, segments: bool) -> str:
        check_backend(cfg)
        N = -(-length // BLOCK)
        share = blocks_computed(mask(cfg), length, block=BLOCK, documents=segments) / (N * (N + 1) / 2)
        return f"xla, {share:.0%} of the causal blocks"


def mask(cfg: ModelConfig) -> Pattern:
    """cfg.mixer.pattern and causality. Raises ConfigError if it cannot be read."""
    try:
        return causal & parse(cfg.mixer.pattern)
    except ValueError as error:
        raise ConfigError(f"model.mixer.pattern: {error}") from None


def check_backend(cfg: ModelConfig) -> None:
    """Raises ConfigError for an implementation that attention through a pattern does not have."""
    if cfg.mixer.implementation not in ("auto", "xla"):
        raise ConfigError(
            f"model.mixer.implementation = {cfg.mixer.implementation}: attention through a pattern has only xla; use "
            "auto or xla"
        )


def row(pattern: str) -> Row:
    return Row(SparseMixer, dataclasses.replace(SOFTMAX, sink_logits=None, pattern=pattern))


ROWS = {
    "sparse": row("window(128) | global_tokens(4)"),
    "local_blocks": row("local_blocks(64, 1)"),
    # Beltagy et al. 2020, section 3.1.
    "dilated": row("dilated(64, 4)"),
    # Sparse Transformer (Child et al. 2019, 1904.10509, section 4.3), strides and summaries as for its text model. The
    # paper's two sets of keys are one here, as in its merged heads.
    "strided": row("strided(128)"),
    "fixed_pattern": row("fixed(128, 32)"),
    # Beltagy et al. 2020 (2004.05150): 512 keys, 256 on each side. The paper's projections of their own for global
    # tokens are left out.
    "longformer": row("window(256) | global_tokens(1)"),
    # Zaheer et al. 2020 (2007.14062), internal transformer construction of the base model: blocks of 64, 3 of them
    # local, 3 random, 2 global.
    "bigbird": row("local_blocks(64, 1) | global_tokens(128) | random_blocks(3, 64, 0)"),
    # Llama 4, whose chunks have 8192 tokens; scaled down with the length of the sequences.
    "chunked_local": row("chunked(256)"),
}
