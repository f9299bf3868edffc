"""Slots for what attention remembers of each token: its keys and values, at its position.

A cache of dtype int8 holds what stands for one head of one token as integers, with one float32 scale beside them: about
a quarter of float32, half of bfloat16. It is what `remember` shows that is dequantized, so mixers need not know.
"""

from typing import Any

import jax
import jax.numpy as jnp

_SCALE = "_scale"


def empty_slots(batch: int, slots: int, dtype: Any, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Empty slots at position -1 for entries called like the keywords, which give the shape of one token's."""
    cache = {"positions": jnp.full((batch, slots), -1, jnp.int32)}
    for name, shape in shapes.items():
        cache[name] = jnp.zeros((batch, slots, *shape), dtype)
        if jnp.dtype(dtype) == jnp.int8:
            cache[name + _SCALE] = jnp.zeros((batch, slots, *shape[:-1]), jnp.float32)
    return cache


def key_value_cache(batch: int, slots: int, G: int, K: int, V: int, dtype: Any) -> dict[str, jax.Array]:
    """Empty slots for keys (B, S, G, K) and values (B, S, G, V)."""
    return empty_slots(batch, slots, dtype, key=(G, K), value=(G, V))


def remember(cache: dict, new: dict, window: int | None = None, sinks: int = 0) -> tuple[dict, dict]:
    """(what the tokens of `new` may see, as numbers; the cache after them); see `store`."""
    stored = store(cache, new, sinks)
    if window is None or new["positions"].shape[1] == 1:
        return _numbers(stored), stored
    # In a ring no longer than the window, a late token of this call may overwrite what an early one still sees.
    new = _as_stored(cache, new)
    return _numbers({name: jnp.concatenate([cache[name], new[name]], 1) for name in cache}), stored


def store(cache: dict, new: dict, sinks: int = 0) -> dict:
    """`cache` with the tokens of `new` written; entries are (B, slots, ...) and (B, T, ...), `positions` among them.

    The first `sinks` positions keep slots of their own; the others share a ring of what is left: what there is no slot
    for overwrites the oldest, so whoever makes a cache without a window must make it long enough. Tokens at position -1
    are not written.
    """
    positions = new["positions"]
    slots = cache["positions"].shape[1]
    ring = max(slots - sinks, 1)
    # Two tokens of one call may share a slot, and scatter order is undefined: only the later one is written.
    live = (positions >= 0) & ((positions < sinks) | (positions > positions.max(1, keepdims=True) - ring))
    slot = jnp.where(positions < sinks, positions, sinks + (positions - sinks) % ring)
    slot = jnp.where(live, slot, slots)
    row = jnp.arange(positions.shape[0])[:, None]
    return {name: cache[name].at[row, slot].set(a, mode="drop") for name, a in _as_stored(cache, new).items()}


def _as_stored(cache: dict, new: dict) -> dict:
    """The entries of `new` under the names and in the dtypes of `cache`."""
    packed = {}
    for name, value in new.items():
        if name + _SCALE in cache:
            value = value.astype(jnp.float32)
            scale = jnp.abs(value).max(-1) / 127
            packed[name + _SCALE] = scale
            value = jnp.round(value / jnp.where(scale == 0, 1, scale)[..., None])
        packed[name] = value.astype(cache[name].dtype)
    return packed


def _numbers(cache: dict) -> dict:
    """The entries of a cache without their scales."""
    return {
        name: value.astype(jnp.float32) * cache[name + _SCALE][..., None] if name + _SCALE in cache else value
        for name, value in cache.items()
        if not name.endswith(_SCALE)
    }
