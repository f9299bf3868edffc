"""RWKV-6's recurrence, which reads before it decays: `decay_attention` one token late, and a bonus for the present."""

import jax.numpy as jnp

from slm.attention.recurrence import changes, decay_attention


def rwkv6_attention(
    q,
    k,
    v,
    log_decay,
    bonus,
    *,
    scale=None,
    initial_state=None,
    form="chunked",
    chunk=64,
    segment_ids=None,
    reset_state=None,
    implementation="auto",
):
    """out_t = scale q_t^T (S_{t-1} + diag(bonus) k_t v_t^T);  S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T.

    Peng et al. 2024 (2404.05892), "Finch time mixing", where q is called the receptance r and bonus u.

    Args:
      q, k: (B, T, H, K). v: (B, T, H, V).
      log_decay: (B, T, H, K), or (B, T, H), <= 0.
      bonus: (H, K), the weight of a token for itself.
      segment_ids: (B, T) integers: where they differ from the token before, that token finds `reset_state`.
      scale, initial_state (B, H, K, V), form, chunk, reset_state (H, K, V), implementation: as in `decay_attention`.

    Returns:
      (out (B, T, H, V) of v's dtype, final_state (B, H, K, V) float32: S after the last token).

    Raises:
      ValueError: shapes do not agree, no such form or implementation, or the implementation cannot serve the request.
    """
    B, T, H = v.shape[:3]
    K = q.shape[-1]
    if q.shape != (B, T, H, K) or bonus.shape != (H, K):
        raise ValueError(
            f"shapes do not agree: q {q.shape}, v {v.shape}, bonus {bonus.shape}; expected (B,T,H,K), (B,T,H,V), (H,K)"
        )
    scale = K**-0.5 if scale is None else scale

    def before(x):
        """x of the token before, 0 for the first of the call or of a document: then the engine's S_t is S_{t-1}."""
        late = jnp.pad(x, ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))[:, :-1]
        if segment_ids is None:
            return late
        return jnp.where(changes(segment_ids).reshape(B, T, *(1,) * (x.ndim - 2)), 0, late)

    out, state = decay_attention(
        q, before(k), before(v), before(log_decay),
        scale=scale, initial_state=initial_state, form=form, chunk=chunk, segment_ids=segment_ids,
        reset_state=reset_state, implementation=implementation,
    )  # fmt: skip
    q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    own = scale * (q * bonus.astype(jnp.float32) * k).sum(-1, keepdims=True) * v32
    decay = jnp.exp(log_decay[:, -1].astype(jnp.float32)).reshape(B, H, -1, 1)
    state = decay * state + k[:, -1, :, :, None] * v32[:, -1, :, None]
    return (out.astype(jnp.float32) + own).astype(v.dtype), state
