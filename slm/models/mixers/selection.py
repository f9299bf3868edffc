"""Attention to what content selects: blocks (MoBA, NSA) or tokens (the indexer of DeepSeek sparse attention).

All keys and values stay in the cache; what is kept besides to select by (means or compressed blocks, index keys) is in
it too. A decode step reads the chosen ones only.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slm.attention import cached_attention, choose_implementation, indexed_attention, moba_attention, nsa_attention
from slm.attention.indexer import attach_loss, choose_form
from slm.attention.moba import mean_keys_of_blocks
from slm.attention.nsa import FORCED, compressed_attention, mean_of_blocks, mix_branches
from slm.attention.selection import find_places, selected_attention
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.layers import dense
from slm.models.mixers.base import (
    Context,
    Mixer,
    Row,
    even_share,
    finish,
    head_dim,
    logit_scale,
    normalise,
    project,
    rotate,
)
from slm.models.mixers.cache import key_value_cache, store
from slm.models.mixers.softmax import attend_and_store, mean_keys
from slm.models.rope import rope_tables


class MobaMixer(Mixer):
    """Mixture of block attention (Lu et al. 2025, 2502.13189, section 2.2) over grouped heads.

    The paper has blocks of 512 to 4096 tokens, of which a query sees 3 to 12; the defaults are scaled down with the
    length of the sequences.
    """

    int8_cache = False

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m = self.cfg, self.cfg.mixer
        check_backend(cfg)
        q = queries(self, x_BxTxD, context)
        k, v = keys_and_values(self, x_BxTxD, context)
        sizes = {"block_size": m.block_size, "top_k": m.top_k, "scale": logit_scale(cfg)}
        if cache is None:
            out = moba_attention(q, k, v, segment_ids=context.segment_ids, **sizes)
        else:
            at = context.positions
            news = store(part(cache), {"key": k, "value": v, "positions": at})
            means = refresh(cache["block_mean"], news["key"], at, m.block_size, mean_keys_of_blocks)
            keys, values = (news[name].astype(q.dtype) for name in ("key", "value"))
            out = moba_attention(q, keys, values, query_positions=at, block_means=means, **sizes)
            cache = news | {"block_mean": means}
        return finish(out, x_BxTxD, cfg, self.dtype), cache

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """Keys and values of `length` tokens, and the mean key of each whole block."""
        K, G = head_dim(cfg), cfg.kv_heads or cfg.heads
        means = jnp.zeros((batch, length // cfg.mixer.block_size, G, K), jnp.float32)
        return key_value_cache(batch, length, G, K, K, dtype) | {"block_mean": means}

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """q k^T and weights v over the keys that a query sees, and q times the means of past blocks."""
        past, seen = selected_keys(cfg, length)
        return cfg.heads * head_dim(cfg) * (4 * seen + 2 * past)


class NsaMixer(Mixer):
    """Native sparse attention (Yuan et al. 2025, 2502.11089, section 3.3): compressed, selected and window branch, each
    times sigmoid(W x) of its own for every head.

    As in the paper, each branch has keys and values of its own (`branch_keys`) and a block is compressed by a learned
    map (`compression`); flash-linear-attention's layer shares the keys and takes means. Blocks of compression do not
    overlap (the paper has blocks of 32 tokens every 16, and selects blocks of 64): they are the blocks that are
    selected. Keys are compressed after rotation. The paper selects 16 blocks and has a window of 512; the defaults
    are scaled down with the length of the sequences.
    """

    int8_cache = False

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m = self.cfg, self.cfg.mixer
        check_backend(cfg)
        if m.top_k < FORCED:
            raise ConfigError(
                f"model.mixer.top_k = {m.top_k}: nsa needs at least {FORCED}, since it counts the first block, the "
                "query's own and the one before, which every query sees"
            )
        q = queries(self, x_BxTxD, context)
        # Of the compressed, the selected and the window branch.
        branches = ["block_", "", "window_"] if m.branch_keys else [""]
        pairs = [keys_and_values(self, x_BxTxD, context, prefix) for prefix in branches]
        gates = jax.nn.sigmoid(project(x_BxTxD, cfg.heads, 3, "branch_gate", cfg, self.dtype).astype(jnp.float32))
        compress = (mean_of_blocks, mean_of_blocks)
        if m.compression == "mlp":
            compress = tuple(Compression(cfg, self.dtype, name=f"compress_{name}") for name in ("key", "value"))
        if cache is None:
            k, v = zip(*(pairs if m.branch_keys else pairs * 3), strict=True)
            out = nsa_attention(
                q, k, v, gates, block_size=m.block_size, top_k=m.top_k, window=m.window, compress=compress,
                scale=logit_scale(cfg), segment_ids=context.segment_ids, implementation=m.implementation,
            )  # fmt: skip
        else:
            new = {
                prefix: {"key": k, "value": v, "positions": context.positions}
                for prefix, (k, v) in zip(branches, pairs, strict=True)
            }
            out, cache = self.extend(q, new, gates, compress, cache)
        return finish(out, x_BxTxD, cfg, self.dtype), cache

    def extend(self, q, new, gates, compress, cache):
        """(attention of new queries over a cache, cache with the new keys and values)."""
        m, at, scale = self.cfg.mixer, new[""]["positions"], logit_scale(self.cfg)
        news = store(part(cache), new[""])
        keys, values = (news[name].astype(q.dtype) for name in ("key", "value"))
        if m.branch_keys:
            begun = part(cache, "block_")
            # Slots are positions modulo the block; those of this call follow.
            raw = {n: jnp.concatenate([begun[n], x.astype(begun[n].dtype)], 1) for n, x in new["block_"].items()}
            origin = at[:, :1]
            news |= prefixed("block_", store(begun, new["block_"]))
        else:
            raw, origin = news, None
        compressed = {
            name: refresh(cache[f"compressed_{name}"], raw[name], at, m.block_size, f, origin)
            for name, f in zip(("key", "value"), compress, strict=True)
        }
        places = find_places(q.shape, keys.shape[1], m.block_size, query_positions=at)
        coarse, chosen = compressed_attention(q, compressed["key"], compressed["value"], places, m.top_k, scale)
        fine = selected_attention(q, keys, values, chosen, places, scale)
        if m.branch_keys:
            k, v = new["window_"]["key"], new["window_"]["value"]
            near, window = attend_and_store(q, k, v, at, part(cache, "window_"), m.window, scale=scale)
            news |= prefixed("window_", window)
        else:
            near = attend_near(q, keys, values, at, m.window, scale)
        return mix_branches(gates, coarse, fine, near), news | prefixed("compressed_", compressed)

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """Keys and values of `length` tokens, compressed ones of each whole block; with `branch_keys` also those of the
        block that is not whole yet, and of the window."""
        m, K, G = cfg.mixer, head_dim(cfg), cfg.kv_heads or cfg.heads
        cache = key_value_cache(batch, length, G, K, K, dtype)
        blocks = jnp.zeros((batch, length // m.block_size, G, K), dtype)
        cache |= {"compressed_key": blocks, "compressed_value": blocks}
        if m.branch_keys:
            for prefix, slots in (("block_", m.block_size), ("window_", min(length, m.window))):
                cache |= prefixed(prefix, key_value_cache(batch, slots, G, K, K, dtype))
        return cache

    @classmethod
    def backend(cls, cfg: ModelConfig, length: int, dtype: Any, platform: str, segments: bool) -> str:
        window = cfg.mixer.implementation
        if window == "auto":
            shape = (1, length, cfg.heads, head_dim(cfg))
            window = choose_implementation(shape, dtype, window=cfg.mixer.window, extras=segments, platform=platform)
        return f"xla, window {window}"

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """q k^T and weights v of the three branches; less what counting the compression's matrices once a token, not
        once a block, is too much."""
        m, K, at = cfg.mixer, head_dim(cfg), np.arange(length)
        _, seen = selected_keys(cfg, length)
        keys = ((at + 1) // m.block_size).mean() + seen + mean_keys(length, m.window)
        extra = 0.0
        if m.compression == "mlp":
            G, (up, down) = cfg.kv_heads or cfg.heads, Compression.matrices(cfg)
            extra = 2 * 2 * (up + down) * (G / m.block_size - 1)
        return 4 * cfg.heads * K * keys + extra


class Compression(nn.Module):
    """One key or value from a block of them: W2 relu(W1 [x_1 + p_1, ..., x_J + p_J]), with learned positions p in the
    block (2502.11089, eq. 7, whose MLP the paper does not detail). Heads share it. (B, N, J, G, K) -> (B, N, G, K)."""

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxNxJxGxK):
        B, N, J, G, K = x_BxNxJxGxK.shape
        position_JxK = self.param("position", nn.initializers.normal(self.cfg.init_std), (J, K)).astype(self.dtype)
        x = x_BxNxJxGxK.astype(self.dtype) + position_JxK[:, None]
        x = jnp.swapaxes(x, 2, 3).reshape(B, N, G, J * K)
        # Keys must not be small for attention to tell them apart, so not with the model's init_std.
        x = jax.nn.relu(dense(2 * K, "up", self.cfg, self.dtype, std=(2 / (J * K)) ** 0.5)(x))
        return dense(K, "down", self.cfg, self.dtype, std=(2 * K) ** -0.5)(x)

    @classmethod
    def matrices(cls, cfg: ModelConfig) -> tuple[int, int]:
        """Sizes of W1 and W2."""
        K = head_dim(cfg)
        return cfg.mixer.block_size * K * 2 * K, 2 * K * K


class IndexedMixer(Mixer):
    """DeepSeek sparse attention (DeepSeek-V3.2, 2512.02556, section 2): an indexer of few small heads chooses top_k
    tokens for each query, all heads attend to just those. Here over grouped heads; DeepSeek's are latent (MLA).

    The indexer reads x without a gradient. It learns from KL(mean attention of the heads || softmax of its scores) over
    the chosen tokens (eq. 4), averaged over the tokens of the call. A mixer returns no loss, so that gradient joins in
    the backward pass (`attach_loss`): the loss that is reported is the language model's alone, and gradients of the
    indexer are not its derivatives. Nothing else reaches the indexer's parameters, and Adam does not see the term's
    scale; gradient clipping does, and so does accumulation, which adds up one such mean for each micro-batch.
    Sequences of at most top_k tokens are attended to densely, which is the paper's warm-up stage.
    """

    int8_cache = False
    own_loss = True

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m = self.cfg, self.cfg.mixer
        check_backend(cfg)
        q = queries(self, x_BxTxD, context)
        k, v = keys_and_values(self, x_BxTxD, context)
        x, I, J = jax.lax.stop_gradient(x_BxTxD), m.index_heads, m.index_dim
        index_q = project(x, I, J, "index_query", cfg, self.dtype)
        index_k = project(x, 1, J, "index_key", cfg, self.dtype)
        index_k = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="index_key_norm")(index_k)
        index_q, index_k = self.rotate_index(index_q, context), self.rotate_index(index_k, context)[:, :, 0]
        index_w = dense(I, "index_weight", cfg, self.dtype)(x).astype(jnp.float32) * (I * J) ** -0.5
        if cache is None:
            out, loss = indexed_attention(
                q, k, v, index_q, index_k, index_w, top_k=m.top_k, segment_ids=context.segment_ids,
                scale=logit_scale(cfg), implementation=m.implementation,
            )  # fmt: skip
            out = attach_loss(out, loss.mean())
        else:
            new = {"key": k, "value": v, "positions": context.positions, "index_key": index_k}
            cache = store(cache, new)
            keys, values, index_keys = (cache[name].astype(q.dtype) for name in ("key", "value", "index_key"))
            out, _ = indexed_attention(
                q, keys, values, index_q, index_keys, index_w, top_k=m.top_k, query_positions=context.positions,
                scale=logit_scale(cfg), implementation=m.implementation,
            )  # fmt: skip
        return finish(out, x_BxTxD, cfg, self.dtype), cache

    def rotate_index(self, x_BxTxIxJ, context: Context):
        """Rotary positions on the same share of an index head as of an attention head."""
        cfg = self.cfg
        size = even_share(cfg, cfg.mixer.index_dim)
        if not context.rope or not size:
            return x_BxTxIxJ
        if size not in context.rope:
            tables = rope_tables(context.positions, size, cfg.rope)
            context = context.replace(rope={size: tables})
        return rotate(x_BxTxIxJ, context, size)

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        """Keys, values and index keys of `length` tokens."""
        K, G = head_dim(cfg), cfg.kv_heads or cfg.heads
        index_key = jnp.zeros((batch, length, cfg.mixer.index_dim), dtype)
        return key_value_cache(batch, length, G, K, K, dtype) | {"index_key": index_key}

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Index scores of all past tokens, and q k^T and weights v over the chosen ones."""
        m = cfg.mixer
        scores = 2 * m.index_heads * (m.index_dim + 1) * mean_keys(length)
        return scores + 4 * cfg.heads * head_dim(cfg) * mean_keys(length, m.top_k)

    @classmethod
    def backend(cls, cfg: ModelConfig, length: int, dtype: Any, platform: str, segments: bool) -> str:
        m = cfg.mixer
        return choose_form(length, m.top_k) if m.implementation == "auto" else m.implementation


def check_backend(cfg: ModelConfig) -> None:
    """Raises ConfigError for a backend that selection does not have."""
    if cfg.mixer.implementation not in ("auto", "xla"):
        raise ConfigError(
            f"model.mixer.implementation = {cfg.mixer.implementation}: attention that selects by content has only xla: "
            "use auto"
        )


def queries(mixer: Mixer, x_BxTxD, context: Context) -> jax.Array:
    cfg, dtype = mixer.cfg, mixer.dtype
    q = normalise(project(x_BxTxD, cfg.heads, head_dim(cfg), "query", cfg, dtype), "query_norm", cfg, dtype)
    return rotate(q, context, mixer.rotary_size(cfg))


def keys_and_values(mixer: Mixer, x_BxTxD, context: Context, prefix: str = "") -> tuple[jax.Array, jax.Array]:
    """From projections called `prefix` and key or value."""
    cfg, dtype, K = mixer.cfg, mixer.dtype, head_dim(mixer.cfg)
    G = cfg.kv_heads or cfg.heads
    k = normalise(project(x_BxTxD, G, K, f"{prefix}key", cfg, dtype), f"{prefix}key_norm", cfg, dtype)
    return rotate(k, context, mixer.rotary_size(cfg)), project(x_BxTxD, G, K, f"{prefix}value", cfg, dtype)


def selected_keys(cfg: ModelConfig, length: int) -> tuple[float, float]:
    """(past blocks to choose among, keys seen in chosen blocks and the own one), means over `length` positions."""
    J, at = cfg.mixer.block_size, np.arange(length)
    past = at // J
    return past.mean(), (np.minimum(past, cfg.mixer.top_k - 1) * J + at % J + 1).mean()


KEY_VALUE = ("key", "value", "positions")


def part(cache: dict, prefix: str = "") -> dict:
    """The key/value cache whose entries begin with `prefix`."""
    return {name: cache[prefix + name] for name in KEY_VALUE}


def prefixed(prefix: str, arrays: dict) -> dict:
    return {prefix + name: array for name, array in arrays.items()}


def refresh(summaries_BxNxGxK, x_BxSxGxK, positions_BxT, block: int, summarise, origin_Bx1=None):
    """`summaries` of blocks with those computed anew that tokens at `positions` have changed.

    `x` holds the token of position p in slot p; or, with `origin`, the tokens of earlier calls in the first `block`
    slots, at p modulo `block`, and behind them those of this call, which begins at position `origin`. Blocks that are
    not whole yet get summaries that mean nothing: they are not seen before their last token has come.
    """
    N, T = summaries_BxNxGxK.shape[1], positions_BxT.shape[1]
    if not N:
        return summaries_BxNxGxK
    number = positions_BxT[:, :1] // block + jnp.arange(min((T + block - 2) // block + 1, N))
    at = number[..., None] * block + jnp.arange(block)
    if origin_Bx1 is not None:
        new = at >= origin_Bx1[..., None]
        at = jnp.where(new, block + at - origin_Bx1[..., None], at % block)
    blocks = jax.vmap(lambda x, at: x[at])(x_BxSxGxK, jnp.clip(at, 0, x_BxSxGxK.shape[1] - 1))
    # A row of padding alone begins nowhere.
    row, number = jnp.arange(len(number))[:, None], jnp.where(positions_BxT[:, :1] < 0, N, number)
    news = summarise(blocks).astype(summaries_BxNxGxK.dtype)
    return summaries_BxNxGxK.at[row, number].set(news, mode="drop")


def attend_near(q, k_BxSxGxK, v_BxSxGxV, positions_BxT, window: int, scale: float):
    """Window attention over a cache with the key of position p in slot p, at a cost of the window's keys only."""
    S, T = k_BxSxGxK.shape[1], positions_BxT.shape[1]
    at = positions_BxT[:, :1] - window + 1 + jnp.arange(min(window + T - 1, S + window))
    k, v = (jax.vmap(lambda x, at: x[at])(x, jnp.clip(at, 0, S - 1)) for x in (k_BxSxGxK, v_BxSxGxV))
    key_positions = jnp.where((at < 0) | (at >= S), -1, at)
    return cached_attention(q, k, v, positions_BxT, key_positions, window=window, scale=scale)


SELECTION = MixerConfig(
    qk_norm="none", rope_fraction=1.0, gate="none", gate_rank=0, implementation="auto", top_k=4, block_size=64
)
NSA = dataclasses.replace(SELECTION, block_size=32, window=128, compression="mlp", branch_keys=True)
ROWS = {
    "moba": Row(MobaMixer, SELECTION),
    "nsa": Row(NsaMixer, NSA),
    # flash-linear-attention's layer.
    "nsa_shared": Row(NsaMixer, dataclasses.replace(NSA, compression="mean", branch_keys=False)),
    # The paper: 64 index heads of 128, 2048 tokens.
    "dsa": Row(IndexedMixer, dataclasses.replace(SELECTION, block_size=None, top_k=256, index_heads=4, index_dim=32)),
}
