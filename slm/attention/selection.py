"""Exact attention of each query over the blocks of keys chosen for it, at a cost proportional to the chosen keys.

The engine under MoBA and NSA. Queries are dealt out to the blocks that they chose, as tokens to experts (so do
MegaBlocks, Gale et al. 2023, and FlashMoBA): tiles of queries that chose the same block meet its keys in one matrix
product, and a query's pieces are merged by their normalisers. Keys are copied once a tile, not once a query. Saved for
the backward pass are q, k, v, the choice, the output and each row's log-normaliser; what a pass needs besides grows
with T times the number of chosen blocks, never with T^2 nor with T times the chosen keys' size.

Blocks are counted from the first token of each document, which makes a packed document what it is alone. A query
chooses among the whole blocks of its document that end before its own block begins; of its own block it always sees
the tokens up to itself.

Letters besides those of the package: N blocks of keys, n of them chosen, C selecting heads, M tiles of I queries and J
keys, P pieces of a query.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERIES = 256
"""Queries whose scores of blocks or tokens exist at once."""


class Places(NamedTuple):
    """Where queries stand among the keys, as indices of keys."""

    at_BxT: jax.Array
    """The query's own key; -1 where there is no query (padding), which sees nothing."""
    first_BxT: jax.Array
    """First key of its document."""
    own_BxT: jax.Array
    """First key of its own block."""
    starts_BxN: jax.Array
    """First key of each whole block, ascending; no less than S where there are fewer than N of them."""
    block: int
    """Keys in a block."""
    documents: bool
    """Blocks begin wherever documents make them begin, not at multiples of `block`."""
    cached: bool
    """Queries are others than the keys, at any positions."""

    def before(self) -> jax.Array:
        """(B, T, N): whether the block ends before the query's own begins, in its document."""
        start = self.starts_BxN[:, None]
        return (start >= self.first_BxT[..., None]) & (start + self.block <= self.own_BxT[..., None])

    def whole(self) -> jax.Array:
        """(B, T, N): whether the block ends at the query or before, in its document."""
        start = self.starts_BxN[:, None]
        return (start >= self.first_BxT[..., None]) & (start + self.block <= self.at_BxT[..., None] + 1)


def find_places(q_shape, S: int, block: int = 1, segment_ids=None, query_positions=None) -> Places:
    """Places of queries (B, T, ...) among S keys: the same tokens, in documents if `segment_ids` (B, T) is given; or
    else a cache that holds the key of position p in slot p, and queries at `query_positions` (B, T).

    Raises ValueError for shapes that do not agree, and for segments with a cache.
    """
    if block < 1:
        raise ValueError(f"block_size = {block}: must be at least 1")
    (B, T), N = q_shape[:2], S // block
    if segment_ids is not None and query_positions is not None:
        raise ValueError("segment_ids with query_positions: a cache holds one document a row; leave segment_ids out")
    if query_positions is None and S != T:
        raise ValueError(f"{T} queries for {S} keys: give query_positions where keys are a cache")
    for name, value in (("segment_ids", segment_ids), ("query_positions", query_positions)):
        if value is not None and value.shape != (B, T):
            raise ValueError(f"{name} has shape {value.shape}, expected {(B, T)}")
    starts = jnp.broadcast_to(jnp.arange(N) * block, (B, N))
    at = jnp.broadcast_to(jnp.arange(T), (B, T)) if query_positions is None else query_positions
    first = jnp.zeros((B, T), at.dtype)
    if segment_ids is not None:
        new = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)), mode="edge")[:, :T]
        first = jax.lax.cummax(jnp.where(new, at, 0), axis=1)
        last = (at - first) % block == block - 1
        starts = jnp.sort(jnp.where(last, at - block + 1, S), axis=1)[:, :N]
    own = first + jnp.maximum(at - first, 0) // block * block
    return Places(at, first, own, starts, block, segment_ids is not None, query_positions is not None)


def key_blocks(x_BxSxGxK, places: Places) -> jax.Array:
    """Keys or values by whole blocks, (B, N, block, G, K)."""
    N, J = places.starts_BxN.shape[1], places.block
    if places.documents:
        return jax.vmap(lambda x, start: _take_blocks(x, start, J))(x_BxSxGxK, places.starts_BxN)
    return x_BxSxGxK[:, : N * J].reshape(x_BxSxGxK.shape[0], N, J, *x_BxSxGxK.shape[2:])


def over_queries(f, arrays, places: Places):
    """f(arrays, places) of pieces of at most QUERIES queries, one after the other, joined; the backward pass computes
    each piece again. `arrays`, and what f returns: trees of (B, T, ...)."""
    T = places.at_BxT.shape[1]
    if T <= QUERIES:
        return f(arrays, places)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -T % QUERIES)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, QUERIES, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]

    def piece(part):
        arrays, at, first, own = part
        return f(arrays, places._replace(at_BxT=at, first_BxT=first, own_BxT=own))

    parts = jax.tree.map(split, (arrays, *places[:3]))
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(piece, prevent_cse=False), parts))


def top_blocks(scores_BxCxTxN, allowed_BxTxN, n: int) -> jax.Array:
    """Numbers of the n allowed blocks with the highest scores, (B, T, C, n) int32; N where fewer are allowed.

    Ties go to the earlier block. Not differentiable, as in the papers."""
    N = scores_BxCxTxN.shape[-1]
    scores = jnp.where(allowed_BxTxN[:, None], jax.lax.stop_gradient(scores_BxCxTxN), -jnp.inf)
    best, chosen = largest(scores, min(n, N))
    return jnp.moveaxis(jnp.where(best > -jnp.inf, chosen, N), 1, 2).astype(jnp.int32)


def largest(x, n: int, devices: int | None = None):
    """jax.lax.top_k: the n largest of the last axis and their indices, ties to the earlier one.

    Of arrays that lie on several devices XLA gathers all rows for top_k, but not for a sort, which is 10 to 25 times as
    slow on a CPU.
    """
    if (devices or jax.device_count()) == 1:
        return jax.lax.top_k(x, n)
    at = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    best, at = jax.lax.sort_key_val(-x, at)
    return -best[..., :n], at[..., :n]


def selected_attention(q, k, v, chosen_BxTxCxn, places: Places, scale: float) -> jax.Array:
    """softmax(scale * q k^T) v over the keys of the chosen blocks and of the own block up to the query, in float32.

    Args:
      q: (B, T, H, K). k: (B, S, G, K). v: (B, S, G, V).
      chosen_BxTxCxn: blocks by their number in places.starts_BxN, no one twice and all of them allowed by
        places.before(); N: none. C divides H and G divides C: head h follows selecting head h // (H/C).

    Returns:
      (B, T, H, V) of q's dtype; 0 where there is no query.
    """
    B, T, H, K = q.shape
    C, G = chosen_BxTxCxn.shape[2], k.shape[2]
    if places.cached and T == 1:
        return _one_token(q, k, v, chosen_BxTxCxn, places, scale)
    q = jnp.moveaxis(q.reshape(B, T, G, C // G, H // C, K), 1, 3)
    chosen = jnp.moveaxis(chosen_BxTxCxn, 1, 2).reshape(B, G, C // G, T, -1)
    aligned = not (places.documents or places.cached)
    out = _attention(q, k, v, chosen, tuple(places[:4]), (places.block, aligned, scale))
    return jnp.moveaxis(out, 3, 1).reshape(B, T, H, -1)


def _one_token(q, k, v, chosen_Bx1xCxn, places: Places, scale: float) -> jax.Array:
    """A decode step as one gather and one product: 1.6 times as fast as tiles of one query each (CPU, 4 rows)."""
    (B, _, H, K), (S, G), C = q.shape, k.shape[1:3], chosen_Bx1xCxn.shape[2]
    own = jnp.broadcast_to(places.own_BxT[..., None], (B, C, 1))
    starts = jnp.concatenate([chosen_Bx1xCxn[:, 0] * places.block, own], -1)
    at_BxCxP = (starts[..., None] + jnp.arange(places.block)).reshape(B, C, -1)
    # A block that was not chosen begins at or behind the query's own.
    keep = at_BxCxP <= places.at_BxT[..., None]
    keep &= jnp.repeat(
        jnp.pad(starts[..., :-1] < own, ((0, 0), (0, 0), (0, 1)), constant_values=True), places.block, -1
    )
    row, head = jnp.arange(B)[:, None, None], (jnp.arange(C) // (C // G))[:, None]
    keys, values = (x[row, jnp.clip(at_BxCxP, 0, S - 1), head] for x in (k, v))
    logits = _product("BCRK,BCPK->BCRP", q.reshape(B, C, H // C, K), keys) * scale
    weights = jax.nn.softmax(jnp.where(keep[:, :, None], logits, -1e30), -1) * keep.any(-1)[..., None, None]
    return _product("BCRP,BCPV->BCRV", weights.astype(v.dtype), values).reshape(B, 1, H, -1).astype(q.dtype)


class _Tiles(NamedTuple):
    """The work of one selecting head."""

    row_MxI: jax.Array
    """Query of each row."""
    low_MxI: jax.Array
    high_MxI: jax.Array
    """First and last key that it sees here; none where high < low."""
    start_M: jax.Array
    """First of the tile's keys."""
    where_TxP: jax.Array
    """Row, of M I, of each piece of a query: one for each chosen block, one or two for its own."""
    live_TxP: jax.Array
    """Whether it has that piece."""


def _tiles(chosen_Txn, at_T, own_T, starts_N, S: int, J: int, aligned: bool) -> _Tiles:
    (T, n), N = chosen_Txn.shape, len(starts_N)
    # Each block may leave one tile partly empty: tiles that large that about half the rows are filled at worst.
    size = max(1, min(J, T, T * n // max(N, 1) if n else T))
    spans = 1 if size == 1 or (aligned and size == J) else 2
    parts = [_own_tiles(at_T, own_T, span * J, size) for span in range(spans)]
    if n:
        parts.append(_chosen_tiles(chosen_Txn, starts_N, J, size))
    begin, where = 0, []
    for part in parts:
        where.append(part.where_TxP + begin)
        begin += part.row_MxI.size
    row, low, high, start = (jnp.concatenate(arrays) for arrays in zip(*(part[:4] for part in parts), strict=True))
    # A last block that is not whole is read together with keys before it, which `low` leaves out.
    start = jnp.minimum(start, max(S - J, 0))
    return _Tiles(
        row, low, high, start, jnp.concatenate(where, 1), jnp.concatenate([part.live_TxP for part in parts], 1)
    )


def _own_tiles(at_T, own_T, shift: int, size: int) -> _Tiles:
    """Consecutive queries against the J keys from `shift` after the first one's own block begins.

    All their own blocks lie within two blocks from there, whatever documents or offsets there are."""
    T = len(at_T)
    row = jnp.arange(-(-T // size) * size).reshape(-1, size)
    high = jnp.where(row < T, at_T[jnp.minimum(row, T - 1)], -1)
    row = jnp.minimum(row, T - 1)
    start = own_T[row[:, 0]] + shift
    low = jnp.maximum(own_T[row], start[:, None])
    return _Tiles(row, low, high, start, jnp.arange(T)[:, None], jnp.ones((T, 1), bool))


def _chosen_tiles(chosen_Txn, starts_N, J: int, size: int) -> _Tiles:
    """Pairs (query, chosen block) in order of blocks, then of queries; each block's pairs cut into tiles."""
    (T, n), N = chosen_Txn.shape, len(starts_N)
    pairs = T * n
    order = jnp.argsort(chosen_Txn.reshape(-1), stable=True)
    block_of = chosen_Txn.reshape(-1)[order]
    begin = jnp.searchsorted(block_of, jnp.arange(N + 1))
    end_tile = jnp.cumsum((begin[1:] - begin[:-1] + size - 1) // size)
    first_tile = jnp.pad(end_tile, (1, 0))[:N]
    tile = jnp.arange(min(pairs, pairs // size + N))
    of_tile = jnp.minimum(jnp.searchsorted(end_tile, tile, side="right"), N - 1)
    sorted_pair = (begin[of_tile] + (tile - first_tile[of_tile]) * size)[:, None] + jnp.arange(size)
    live = sorted_pair < begin[of_tile + 1][:, None]
    start = starts_N[of_tile]
    row = order[jnp.where(live, sorted_pair, 0)] // n
    high = jnp.where(live, (start + J - 1)[:, None], -1)
    # And the way back: pairs that chose nothing point anywhere.
    row_of_sorted = (first_tile * size - begin[:N])[jnp.minimum(block_of, N - 1)] + jnp.arange(pairs)
    where = jnp.zeros_like(order).at[order].set(jnp.where(block_of < N, row_of_sorted, 0), unique_indices=True)
    return _Tiles(row, jnp.zeros_like(row), high, start, where.reshape(T, n), chosen_Txn < N)


def _take_blocks(x_Sx, start_M, J: int):
    """(M, J, ...): rows start ... start + J - 1, or the last J if there are fewer; zeros follow if S < J."""
    x = jnp.pad(x_Sx, [(0, max(J - len(x_Sx), 0))] + [(0, 0)] * (x_Sx.ndim - 1))
    return jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(x, start, J))(start_M)


def _add_blocks(x_MxJxK, start_M, S: int):
    """The transpose of `_take_blocks`: (S, K)."""
    _, J, K = x_MxJxK.shape
    like = jax.ShapeDtypeStruct((S, K), x_MxJxK.dtype)
    return jax.linear_transpose(lambda x: _take_blocks(x, start_M, J), like)(x_MxJxK)[0]


def _logits(q_TxRxK, k_SxK, tiles: _Tiles, J: int, scale: float):
    """(queries (M, I R, K), keys (M, J, K), scaled masked logits (M, I R, J) float32) of the tiles."""
    R = q_TxRxK.shape[1]
    queries, keys = _rows(q_TxRxK, tiles), _take_blocks(k_SxK, tiles.start_M, J)
    j = (tiles.start_M[:, None] + jnp.arange(J))[:, None]
    keep = (tiles.low_MxI[..., None] <= j) & (j <= tiles.high_MxI[..., None])
    return queries, keys, jnp.where(jnp.repeat(keep, R, 1), _product("MIK,MJK->MIJ", queries, keys) * scale, -1e30)


def _rows(x_TxRx, tiles: _Tiles):
    """(M, I R, ...): what belongs to the queries of the tiles."""
    M, I = tiles.row_MxI.shape
    return x_TxRx[tiles.row_MxI].reshape(M, I * x_TxRx.shape[1], *x_TxRx.shape[2:])


def _pieces(x_MxIRx, tiles: _Tiles, R: int):
    """(T, P, R, ...): what the tiles found for each query, 0 where it has no such piece."""
    x = x_MxIRx.reshape(tiles.row_MxI.size, R, *x_MxIRx.shape[2:])[tiles.where_TxP]
    return jnp.where(tiles.live_TxP.reshape(tiles.live_TxP.shape + (1,) * (x.ndim - 2)), x, 0)


def _forward_one(q_TxRxK, k_SxK, v_SxV, chosen_Txn, at_T, first_T, own_T, starts_N, static):
    """(out (T, R, V), log-normalisers (T, R)) of one selecting head and its R query heads."""
    J, aligned, scale = static
    R = q_TxRxK.shape[1]
    tiles = _tiles(chosen_Txn, at_T, own_T, starts_N, len(k_SxK), J, aligned)
    _, _, logits = _logits(q_TxRxK, k_SxK, tiles, J, scale)
    # Above -1e30, so that a row that sees nothing here has weights of exactly 0.
    top = jnp.maximum(logits.max(-1), -1e29)
    weights = jnp.exp(logits - top[..., None])
    out = _product("MIJ,MJV->MIV", weights.astype(v_SxV.dtype), _take_blocks(v_SxV, tiles.start_M, J))
    tops = jnp.where(tiles.live_TxP[..., None], _pieces(top, tiles, R), -1e29)
    best = tops.max(1)
    factors = jnp.exp(tops - best[:, None])
    total = (factors * _pieces(weights.sum(-1), tiles, R)).sum(1)
    total = jnp.where(total > 0, total, 1)
    out = (factors[..., None] * _pieces(out, tiles, R)).sum(1) / total[..., None]
    return out.astype(q_TxRxK.dtype), best + jnp.log(total)


def _backward_one(
    q_TxRxK, k_SxK, v_SxV, chosen_Txn, log_z_TxR, inner_TxR, d_out_TxRxV, at_T, first_T, own_T, starts_N, static
):
    J, aligned, scale = static
    tiles = _tiles(chosen_Txn, at_T, own_T, starts_N, len(k_SxK), J, aligned)
    queries, keys, logits = _logits(q_TxRxK, k_SxK, tiles, J, scale)
    weights = jnp.exp(logits - _rows(log_z_TxR, tiles)[..., None])
    d_out = _rows(d_out_TxRxV, tiles)
    d_weights = _product("MIV,MJV->MIJ", d_out, _take_blocks(v_SxV, tiles.start_M, J))
    d_logits = weights * (d_weights - _rows(inner_TxR, tiles)[..., None]) * scale
    # Materialised once: XLA would otherwise recompute the exponentials inside each product's transposing copy.
    weights, d_logits = jax.lax.optimization_barrier((weights.astype(v_SxV.dtype), d_logits.astype(q_TxRxK.dtype)))
    d_q = _pieces(_product("MIJ,MJK->MIK", d_logits, keys), tiles, q_TxRxK.shape[1]).sum(1)
    d_k = _add_blocks(_product("MIJ,MIK->MJK", d_logits, queries), tiles.start_M, len(k_SxK))
    d_v = _add_blocks(_product("MIJ,MIV->MJV", weights, d_out), tiles.start_M, len(k_SxK))
    return d_q, d_k, d_v


def _product(equation: str, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _over_heads(f, static, arrays: int):
    """f of one selecting head, over batch, key heads and selecting heads; k and v have no axis of the last."""
    rest = (0,) * (arrays - 3)
    f = jax.vmap(functools.partial(f, static=static), (0, None, None, *rest, None, None, None, None))
    # Keys stay as they lie, since a decode step would otherwise turn the whole cache.
    f = jax.vmap(f, (0, 1, 1, *rest, None, None, None, None))
    return jax.vmap(f)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_BxGxCxTxRxK, k_BxSxGxK, v_BxSxGxV, chosen_BxGxCxTxn, places, static):
    return _forward(q_BxGxCxTxRxK, k_BxSxGxK, v_BxSxGxV, chosen_BxGxCxTxn, places, static)[0]


def _forward(q, k, v, chosen, places, static):
    out, log_z = _over_heads(_forward_one, static, 4)(q, k, v, chosen, *places)
    return out, (q, k, v, chosen, places, out, log_z)


def _backward(static, residuals, d_out):
    q, k, v, chosen, places, out, log_z = residuals
    # sum_j p_j dp_j of the softmax's Jacobian, from the output alone (Dao et al. 2022, eq. 4).
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    d_q, d_k, d_v = _over_heads(_backward_one, static, 7)(q, k, v, chosen, log_z, inner, d_out, *places)
    d_k, d_v = (jnp.moveaxis(d.sum(2), 1, 2) for d in (d_k, d_v))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, (None,) * 4


_attention.defvjp(_forward, _backward)
