"""Attention mechanisms as pure functions on arrays: no Flax, no config.

Letters in names and einsums: B batch, T query time, S key time, H query heads, G key/value heads, R = H/G query heads
per key head, K size of a query/key head, V size of a value head, D width of the residual stream, F feed-forward width.
M features of a map (the size of the state in place of K), L landmarks or length of a low-rank projection, N chunks of C
tokens.
Arrays are (batch, time, heads, dim). Query head h reads key head h // R: groups are consecutive.
"""

from typing import Any

import jax

from slm.attention.delta import delta_attention
from slm.attention.dplr import dplr_attention
from slm.attention.indexer import indexed_attention
from slm.attention.linear import linear_attention, linear_attention_with_state
from slm.attention.loglinear import log_linear_attention
from slm.attention.lowrank import linformer_attention, nystrom_attention
from slm.attention.moba import moba_attention
from slm.attention.nsa import nsa_attention
from slm.attention.recurrence import decay_attention
from slm.attention.rwkv6 import rwkv6_attention
from slm.attention.softmax import cached_attention, choose_implementation, softmax_attention
from slm.attention.sparse import cached_sparse_attention, sparse_attention


def state_bytes(cache: Any) -> int:
    """Bytes of everything that decoding carries from token to token: of a cache of arrays or of abstract arrays, such
    as `jax.eval_shape(lambda: transformer.init_cache(batch, length))`, in the dtypes that it is stored in."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


__all__ = [
    "cached_attention",
    "cached_sparse_attention",
    "choose_implementation",
    "decay_attention",
    "delta_attention",
    "dplr_attention",
    "indexed_attention",
    "linear_attention",
    "linear_attention_with_state",
    "linformer_attention",
    "log_linear_attention",
    "moba_attention",
    "nsa_attention",
    "nystrom_attention",
    "rwkv6_attention",
    "softmax_attention",
    "sparse_attention",
    "state_bytes",
]
