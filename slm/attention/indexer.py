"""DeepSeek sparse attention: a small indexer chooses the tokens that each query sees (DeepSeek-V3.2; arXiv 2512.02556).

The choice has no gradient, so the indexer learns from a loss of its own: the divergence of its scores' softmax from the
attention that the main heads pay to the chosen tokens (eq. 4, the sparse stage).
"""

import jax
import jax.numpy as jnp

from slm.attention.moba import check_heads
from slm.attention.selection import find_places, largest, over_queries

GATHER_BEYOND = 8
"""Times top_k keys, from which on gathering the chosen ones is faster than masking the others, forwards and backwards
together (measured on a CPU)."""


def indexed_attention(
    q,
    k,
    v,
    index_q,
    index_k,
    index_w,
    *,
    top_k,
    scale=None,
    segment_ids=None,
    query_positions=None,
    implementation="auto",
):
    """softmax(scale * q k^T) v over the top_k tokens up to the query with the highest index scores (eq. 2).

    All heads share the choice.

    Args:
      q: (B, T, H, K). k: (B, T, G, K), G divides H; query head h reads key head h // (H/G). v: (B, T, G, V).
      index_q, index_k, index_w: as in `index_scores`.
      top_k: tokens that a query sees; ties go to the earlier token.
      scale: None means K**-0.5.
      segment_ids: (B, T) integers: a query sees only keys of its own segment.
      query_positions: (B, T) integers: k, v and index_k (B, S, ...) are then a cache with the key of position p in slot
        p, and -1 marks padding.
      implementation: "gather" copies the chosen keys for each query; "xla" masks the others in one product of queries
        and all keys, at O(T^2); "auto": see `choose_form`. The choice of tokens costs O(T^2) index products in both.

    Returns:
      (out (B, T, H, V) of q's dtype, loss (B, T) float32: `indexer_loss` of each query against its heads' mean
      attention). `out` depends differentiably on q, k, v only, `loss` on index_q, index_k, index_w only, as in the
      paper.

    Raises:
      ValueError: shapes do not agree, top_k is below 1, or there is no such implementation.
    """
    check_heads(q, k, v)
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if implementation == "auto":
        implementation = choose_form(S, top_k)
    if implementation not in ("gather", "xla"):
        raise ValueError(f"implementation = {implementation!r}: must be auto, gather or xla")
    gather, scale = implementation == "gather", K**-0.5 if scale is None else scale
    where = {"segment_ids": segment_ids, "query_positions": query_positions}
    tokens = choose_tokens(index_q, index_k, index_w, top_k=top_k, **where)
    theirs = "BTS" if gather else "BS"  # whether each query has keys of its own

    def attend(arrays, places):
        del places
        q, index_q, index_w, tokens = arrays
        keep, keys, values, index_keys = tokens >= 0, k, v, index_k
        if gather:
            keys, values, index_keys = (
                jax.vmap(lambda x, at: x[at])(x, jnp.maximum(tokens, 0)) for x in (k, v, index_k)
            )
        else:
            keep = _mask(tokens, S)
        logits = _product(f"BTGRK,{theirs}GK->BGRTS", q, keys) * scale
        # Finite, so that padding, which sees nothing, stays NaN-free.
        weights = jax.nn.softmax(jnp.where(keep[:, None, None], logits, -1e30), -1)
        out = _product(f"BGRTS,{theirs}GV->BTGRV", weights.astype(v.dtype), values)
        scores = _weigh(_product(f"BTIK,{theirs}K->BTIS", index_q, index_keys), index_w)
        return out.astype(q.dtype), indexer_loss(scores, weights.mean((1, 2)), keep)

    arrays = (q.reshape(B, T, G, H // G, K), index_q, index_w, tokens)
    out, loss = over_queries(attend, arrays, find_places(q.shape, S, **where))
    return out.reshape(B, T, H, v.shape[3]), loss


def choose_form(S: int, top_k: int) -> str:
    """What `implementation="auto"` means for S keys."""
    return "gather" if GATHER_BEYOND * top_k < S else "xla"


def index_scores(index_q_BxTxIxK, index_k_BxSxK, index_w_BxTxI):
    """I_ts = sum_i w_ti relu(q_ti . k_s), (B, T, S) float32 (eq. 1). Any scale belongs into w."""
    # At full precision, since a choice may hang on the last bit.
    return _weigh(_product("BTIK,BSK->BTIS", index_q_BxTxIxK, index_k_BxSxK, "highest"), index_w_BxTxI)


def choose_tokens(index_q, index_k, index_w, *, top_k, segment_ids=None, query_positions=None):
    """Indices of each query's min(top_k, S) tokens (B, T, n) int32, best first; -1 where it sees fewer.

    Arguments as in `indexed_attention`. Not differentiable.
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1")
    S, j = index_k.shape[1], jnp.arange(index_k.shape[1])
    index_q, index_k, index_w = jax.lax.stop_gradient((index_q, index_k, index_w))

    def choose(arrays, places):
        scores = index_scores(arrays[0], index_k, arrays[1])
        keep = (j >= places.first_BxT[..., None]) & (j <= places.at_BxT[..., None])
        best, tokens = largest(jnp.where(keep, scores, -jnp.inf), min(top_k, S))
        return jnp.where(best > -jnp.inf, tokens, -1)

    return over_queries(choose, (index_q, index_w), find_places(index_q.shape, S, 1, segment_ids, query_positions))


def indexer_loss(index_scores, attention, keep):
    """KL(attention || softmax(index_scores)) over the last axis where `keep`, float32; 0 where nothing is (eq. 4).

    `attention` (..., n) is the target, without a gradient: probabilities of the main heads, summed over heads and
    normalised. The gradient for the scores is softmax(index_scores) - attention.
    """
    attention = jax.lax.stop_gradient(attention.astype(jnp.float32))
    log_p = jax.nn.log_softmax(jnp.where(keep, index_scores.astype(jnp.float32), -1e30), -1)
    log_target = jnp.log(jnp.where(attention > 0, attention, 1))
    return jnp.where(keep, attention * (log_target - log_p), 0).sum(-1)


@jax.custom_vjp
def attach_loss(x, loss):
    """x, unchanged, with a backward pass as if `loss` (a scalar) had been added to the objective.

    For losses that belong to a layer and have parameters of their own, such as the indexer's: they need no way of their
    own through the model then. The loss joins with weight 1 whatever becomes of x, so its parameters should get
    gradients from nothing else, or the balance is arbitrary.
    """
    del loss
    return x


attach_loss.defvjp(lambda x, loss: (x, loss), lambda loss, d_x: (d_x, jnp.ones_like(loss)))


def _weigh(products_BxTxIxS, index_w_BxTxI):
    return (jax.nn.relu(products_BxTxIxS) * index_w_BxTxI.astype(jnp.float32)[..., None]).sum(2)


def _mask(tokens_BxTxn, S: int):
    """(B, T, S): which tokens are listed."""
    # One row at a time, so that XLA need not gather the rows of several devices.
    row = lambda tokens: jnp.zeros(S, bool).at[jnp.where(tokens < 0, S, tokens)].set(True, mode="drop")  # noqa: E731
    return jax.vmap(jax.vmap(row))(tokens_BxTxn)


def _product(equation: str, a, b, precision=None):
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
