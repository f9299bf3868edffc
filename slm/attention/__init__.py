"""Attention mechanisms as pure functions on arrays: no Flax, no config.

Letters in names and einsums: B batch, T query time, S key time, H query heads, G key/value heads, R = H/G query heads
per key head, K size of a query/key head, V size of a value head, D width of the residual stream, F feed-forward width.
Arrays are (batch, time, heads, dim). Query head h reads key head h // R: groups are consecutive.
"""

from typing import Any

import jax

from slm.attention.softmax import cached_attention, choose_implementation, softmax_attention


def state_bytes(cache: Any) -> int:
    """Bytes of everything that decoding carries from token to token: of a cache of arrays or of abstract arrays, such
    as `jax.eval_shape(lambda: transformer.init_cache(batch, length))`, in the dtypes that it is stored in."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


__all__ = ["cached_attention", "choose_implementation", "softmax_attention", "state_bytes"]
