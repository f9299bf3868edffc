"""From scores of weights to masks: which patterns of zeros there are, and what weights compete with.

A matrix is (..., in, out), stacked over layers. Masks are bool, True where a weight stays. All of it traces, and
`sparsity` may be a traced scalar, so that a schedule needs no compilation of its own.
"""

import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import ConfigError

SCOPES = ("layer", "output", "global")
"""What weights compete with: those of their matrix (in their layer), of their output, or all of the model."""
FEW = 8
"""Numbers that are ranked by comparing each with each: the groups of N:M patterns."""


def keep_masks(
    scores: dict[str, jax.Array], sparsity: Any, scope: str | None = None, pattern: str = "unstructured"
) -> dict[str, jax.Array]:
    """Masks of exactly the asked share of zeros (to the nearest weight, block, or group): dict like `scores`.

    Args:
      scores: name of a matrix to (layers, in, out) float: the lowest go.
      sparsity: share of zeros, from 0 to 1; of an N:M pattern at most its own, to the nearest weight of a group.
      scope: see SCOPES; None: layer. Of no meaning for N:M.
      pattern: `unstructured`; `N:M`, at most N of M weights that follow each other along the inputs stay (`2:4`); or
        `RxC`, blocks of R inputs and C outputs that go together (`16x16`).

    Raises ConfigError for a pattern that is none of these, or that does not divide a matrix.
    """
    kind, numbers = parse_pattern(pattern)
    if kind == "n:m":
        return {name: _n_of_m(score, *numbers, sparsity, name) for name, score in scores.items()}
    blocks = {name: _blocks(score, *numbers, name) for name, score in scores.items()}
    if scope == "global":
        flat = jnp.concatenate([b.reshape(-1) for b in blocks.values()])
        parts = jnp.split(keep_highest(flat, sparsity), _offsets(blocks.values()))
        masks = {name: part.reshape(b.shape) for (name, b), part in zip(blocks.items(), parts)}
    elif scope == "output":
        masks = {
            name: jnp.swapaxes(keep_highest(jnp.swapaxes(b, -1, -2), sparsity), -1, -2) for name, b in blocks.items()
        }
    elif scope in (None, "layer"):
        masks = {
            name: keep_highest(b.reshape(*b.shape[:-2], -1), sparsity).reshape(b.shape) for name, b in blocks.items()
        }
    else:
        raise ConfigError(f"prune.scope = {scope!r}: one of {', '.join(SCOPES)}")
    rows, columns = numbers
    return {name: jnp.repeat(jnp.repeat(mask, rows, -2), columns, -1) for name, mask in masks.items()}


def random_scores(weights: dict[str, Any], seed: Any) -> dict[str, jax.Array]:
    """Uniform scores from 0 to 1, of each matrix its own. Only names and shapes of `weights` matter."""
    return {
        name: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), w.shape)
        for name, w in weights.items()
    }


def parse_pattern(pattern: str) -> tuple[str, tuple[int, int]]:
    """("n:m", (N, M)) or ("blocks", (rows, columns)), 1 x 1 for unstructured. Raises ConfigError."""
    if pattern == "unstructured":
        return "blocks", (1, 1)
    if found := re.fullmatch(r"(\d+):(\d+)", pattern):
        n, m = int(found[1]), int(found[2])
        if 0 < n < m:
            return "n:m", (n, m)
    if (found := re.fullmatch(r"(\d+)x(\d+)", pattern)) and int(found[1]) and int(found[2]):
        return "blocks", (int(found[1]), int(found[2]))
    raise ConfigError(f"prune.pattern = {pattern!r}: unstructured, N:M such as 2:4, or blocks such as 16x16")


def keep_highest(scores, sparsity):
    """Bool like scores (..., n): all but the round(sparsity n) lowest of the last axis; of equals, the later stay.

    Bits of a float, as an integer, are in the order of the floats: the lowest score that stays is found bit by bit, by
    counting. 18 times as fast as sorting 26 M weights (CPU), needs no copy of them, and where they lie on several
    devices only counts travel.
    """
    n = scores.shape[-1]
    drop = jnp.round(jnp.asarray(sparsity, jnp.float32) * n).astype(jnp.int32)
    if n <= FEW:
        mine, other = scores[..., :, None], scores[..., None, :]
        earlier = np.arange(n) < np.arange(n)[:, None]
        return ((other < mine) | ((other == mine) & earlier)).sum(-1) >= drop
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores).astype(jnp.float32), jnp.uint32)
    keys = bits ^ jnp.where(bits >> 31, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))
    lowest = _largest(32, keys, lambda number: _count(keys < number) <= drop)
    equal, places = keys == lowest, jax.lax.broadcasted_iota(jnp.uint32, keys.shape, keys.ndim - 1)
    spare = drop - _count(keys < lowest)
    first = _largest(n.bit_length(), keys, lambda number: _count(equal & (places < number)) <= spare)
    return (keys > lowest) | (equal & (places >= first))


def _largest(bits, like, fits):
    """(..., 1) uint32, one for each row of `like`: the largest number of so many bits that fits; smaller ones do."""

    def next_bit(i, found):
        more = found | (jnp.uint32(1 << (bits - 1)) >> i.astype(jnp.uint32))
        return jnp.where(fits(more), more, found)

    return jax.lax.fori_loop(0, bits, next_bit, jnp.zeros((*like.shape[:-1], 1), jnp.uint32))


def _count(where):
    return where.sum(-1, keepdims=True, dtype=jnp.int32)


def full_sparsity(sparsity: float, pattern: str) -> float:
    """The share of zeros that is meant: an N:M pattern's own, or `sparsity`."""
    kind, (n, m) = parse_pattern(pattern)
    return 1 - n / m if kind == "n:m" else sparsity


def _n_of_m(scores, n, m, sparsity, name):
    inputs, outputs = scores.shape[-2:]
    if inputs % m:
        raise ConfigError(f"prune.pattern = {n}:{m}: the {inputs} inputs of {name} are not divisible by {m}")
    groups = jnp.swapaxes(scores.reshape(*scores.shape[:-2], inputs // m, m, outputs), -1, -2)
    return jnp.swapaxes(keep_highest(groups, sparsity), -1, -2).reshape(scores.shape)


def _blocks(scores, rows, columns, name):
    inputs, outputs = scores.shape[-2:]
    if inputs % rows or outputs % columns:
        raise ConfigError(f"prune.pattern = {rows}x{columns} does not divide {name}, which is {inputs} x {outputs}")
    if rows == columns == 1:
        return scores
    return scores.reshape(*scores.shape[:-2], inputs // rows, rows, outputs // columns, columns).sum((-3, -1))


def _offsets(arrays):
    sizes, total = [math.prod(a.shape) for a in arrays], 0
    offsets = []
    for size in sizes[:-1]:
        total += size
        offsets.append(total)
    return offsets
