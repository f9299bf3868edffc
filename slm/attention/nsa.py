"""Native sparse attention (NSA; Yuan et al. 2025, arXiv 2502.11089).

Three branches, mixed by gates (eq. 5): compressed keys (eq. 7), selected blocks (eq. 8 to 12), and a window. Here a
block of compression is a block of selection (l = d = l' in the paper, as in flash-linear-attention), so that the
scores of blocks are the probabilities of compressed attention themselves (eq. 9).
"""

import jax
import jax.numpy as jnp

from slm.attention.moba import check_heads
from slm.attention.selection import Places, find_places, key_blocks, over_queries, selected_attention, top_blocks
from slm.attention.softmax import softmax_attention

FORCED = 3
"""Blocks that every query sees: the first one, its own and the one before (section 4.1 of the paper)."""


def nsa_attention(
    q, k, v, gates, *, block_size, top_k, window, compress=None, scale=None, segment_ids=None, implementation="auto"
):
    """gates . (compressed attention, selected attention, window attention), eq. 5.

    Args:
      q: (B, T, H, K).
      k: (B, T, G, K), G divides H; query head h reads key head h // (H/G). Or three such arrays, one for each branch in
        the order above: the paper's branches have keys and values of their own.
      v: (B, T, G, V), or three.
      gates: (B, T, H, 3), of the branches in the order above.
      block_size: keys in a block. Blocks are counted from each document's first token, and do not overlap.
      top_k: blocks of the selected branch. The first block of the document, the query's own and the one before are
        always among them; the others have the highest probabilities in compressed attention, summed over the heads
        that share a key head (eq. 10), which therefore share the choice. The choice has no gradient.
      window: tokens of the window branch, the query's own included.
      compress: (keys, values): functions from whole blocks (B, N, block, G, K or V) to (B, N, G, K or V); None: means.
      scale: None means K**-0.5.
      segment_ids: (B, T) integers: a query sees only keys of its own segment.
      implementation: of the window branch, as in `softmax_attention`.

    Returns:
      (B, T, H, V) of q's dtype. Cost: O(T (top_k block_size + window + T / block_size)).

    Raises:
      ValueError: shapes do not agree, top_k leaves out the blocks that are always seen, or a size is below 1.
    """
    keys, values = (x if isinstance(x, tuple | list) else (x, x, x) for x in (k, v))
    for key, value in zip(keys, values, strict=True):
        check_heads(q, key, value)
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates has shape {gates.shape}, expected {(*q.shape[:3], 3)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    places = find_places(q.shape, keys[0].shape[1], block_size, segment_ids)
    compress_key, compress_value = compress or (mean_of_blocks, mean_of_blocks)
    compressed, chosen = compressed_attention(
        q,
        compress_key(key_blocks(keys[0], places)),
        compress_value(key_blocks(values[0], places)),
        places,
        top_k,
        scale,
    )
    selected = selected_attention(q, keys[1], values[1], chosen, places, scale)
    local = softmax_attention(
        q, keys[2], values[2], window=window, scale=scale, segment_ids=segment_ids, implementation=implementation
    )
    return mix_branches(gates, compressed, selected, local)


def compressed_attention(q, k_BxNxGxK, v_BxNxGxV, places: Places, top_k: int, scale: float):
    """(attention over the compressed blocks that end at the query or before (B, T, H, V) of q's dtype, 0 where there is
    none; numbers of the top_k - 1 chosen blocks besides the own one (B, T, G, n), for `selected_attention`)."""
    if top_k < FORCED:
        raise ValueError(
            f"top_k = {top_k}: must be at least {FORCED}: it counts the first block, the query's own and the one before"
        )
    (B, T, H, K), (N, G), V = q.shape, k_BxNxGxK.shape[1:3], v_BxNxGxV.shape[3]
    if N == 0:
        return jnp.zeros((B, T, H, V), q.dtype), jnp.zeros((B, T, G, 0), jnp.int32)

    def attend(q, places):
        # Full precision, since a choice may hang on the last bit.
        logits = jnp.einsum(
            "BTGRK,BNGK->BGRTN", q, k_BxNxGxK.astype(q.dtype), precision="highest", preferred_element_type=jnp.float32
        )
        keep = places.whole()[:, None, None]
        logits = jnp.where(keep, logits * scale, -1e30)
        probabilities = jnp.where(keep, jax.nn.softmax(logits, -1), 0)
        values = v_BxNxGxV.astype(q.dtype)
        out = jnp.einsum("BGRTN,BNGV->BTGRV", probabilities.astype(q.dtype), values, preferred_element_type=jnp.float32)
        start, before = places.starts_BxN[:, None], places.before()
        forced = (start == places.first_BxT[..., None]) | (start + places.block == places.own_BxT[..., None])
        scores = jnp.where(forced[:, None], jnp.inf, probabilities.sum(2))
        return out.astype(q.dtype), top_blocks(scores, before, top_k - 1)

    out, chosen = over_queries(attend, q.reshape(B, T, G, H // G, K), places)
    return out.reshape(B, T, H, V), chosen


def mean_of_blocks(x_BxNxJxGxK):
    """(B, N, G, K) of the same dtype, summed in float32."""
    return x_BxNxJxGxK.astype(jnp.float32).mean(2).astype(x_BxNxJxGxK.dtype)


def mix_branches(gates_BxTxHx3, *branches):
    """Sum of the branches (B, T, H, V), each times its gate, in float32; of the first one's dtype."""
    gates = gates_BxTxHx3.astype(jnp.float32)
    out = sum(gates[..., i : i + 1] * branch.astype(jnp.float32) for i, branch in enumerate(branches))
    return out.astype(branches[0].dtype)
