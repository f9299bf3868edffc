"""Mixture of block attention (MoBA; Lu et al. 2025, arXiv 2502.13189)."""

import jax
import jax.numpy as jnp

from slm.attention.selection import find_places, key_blocks, over_queries, selected_attention, top_blocks


def moba_attention(q, k, v, *, block_size, top_k, scale=None, segment_ids=None, query_positions=None, block_means=None):
    """softmax(scale * q k^T) v over the query's own block, up to the query, and the top_k - 1 past blocks whose mean
    key has the largest product with the query (eq. 2, 5, 6 of section 2.2). Every query head chooses for itself.

    Args:
      q: (B, T, H, K).
      k: (B, T, G, K), G divides H; query head h reads key head h // (H/G).
      v: (B, T, G, V).
      block_size: keys in a block. Blocks are counted from each document's first token.
      top_k: blocks that a query sees, its own included; fewer exist early in a document.
      scale: of the softmax; None means K**-0.5. (It would not change the choice.)
      segment_ids: (B, T) integers: a query sees only keys of its own segment.
      query_positions: (B, T) integers: k (B, S, G, K) and v are then a cache with the key of position p in slot p, and
        -1 marks padding.
      block_means: (B, S // block_size, G, K) float32: mean keys of whole blocks where they are known already.

    Returns:
      (B, T, H, V) of q's dtype. The choice has no gradient. Cost: O(T top_k block_size), and T^2 / block_size products
      of queries and means.

    Raises:
      ValueError: shapes do not agree, or a size is below 1.
    """
    check_heads(q, k, v)
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1, since it counts the query's own block")
    B, T, H, K = q.shape
    G, places = k.shape[2], find_places(q.shape, k.shape[1], block_size, segment_ids, query_positions)
    means = mean_keys_of_blocks(key_blocks(k, places)) if block_means is None else block_means

    def choose(q, places):
        # To the last bit, since a choice may hang on it: float32 at full precision whatever the input's type.
        gate = jnp.einsum("BTGRK,BNGK->BGRTN", q.astype(jnp.float32), means, precision="highest")
        return top_blocks(gate.reshape(B, H, *gate.shape[3:]), places.before(), top_k - 1)

    means = jax.lax.stop_gradient(means)
    chosen = over_queries(choose, jax.lax.stop_gradient(q).reshape(B, T, G, H // G, K), places)
    return selected_attention(q, k, v, chosen, places, K**-0.5 if scale is None else scale)


def mean_keys_of_blocks(k_BxNxJxGxK):
    """(B, N, G, K) float32."""
    return k_BxNxJxGxK.astype(jnp.float32).mean(2)


def check_heads(q, k, v):
    """Raises ValueError unless q (B, T, H, K), k (B, S, G, K) and v (B, S, G, V) fit, with G dividing H."""
    B, _, H, K = q.shape
    if k.shape[0] != B or k.shape[3] != K or v.shape[:3] != k.shape[:3] or H % k.shape[2]:
        raise ValueError(
            f"shapes do not agree: q {q.shape}, k {k.shape}, v {v.shape}; expected (B,T,H,K), (B,S,G,K), (B,S,G,V) "
            "with G dividing H"
        )
