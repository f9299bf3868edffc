"""Softmax attention of low rank: Linformer and Nystromformer. Both see the whole sequence at once: bidirectional.

Computed in float32 whatever the inputs' type: approximations to study, not layers to train fast.
"""

import jax
import jax.numpy as jnp
import numpy as np

_HIGHEST = jax.lax.Precision.HIGHEST


def linformer_attention(q, k, v, e, f, *, scale=None):
    """softmax(scale q (E k)^T) (F v): keys and values projected along time, T to L (2006.04768, equation 7).

    Args:
      q, k: (B, T, H, K). v: (B, T, H, V).
      e, f: (L, T), or (H, L, T) for each head; learned, so that T is fixed.
      scale: None means K**-0.5.

    Returns:
      (B, T, H, V) of q's dtype. Every row of E and F mixes all tokens: there is no causal form.

    Raises:
      ValueError: shapes do not agree.
    """
    _check(q, k, v)
    T, H, K = q.shape[1:]
    for name, x in (("e", e), ("f", f)):
        if x.shape[-1] != T or x.shape[-2] != e.shape[-2] or (x.ndim, *x.shape[:-2]) not in ((2,), (3, H)):
            raise ValueError(f"{name} has shape {x.shape}: expected (L, {T}) or ({H}, L, {T}), with one L for e and f")
    dtype = q.dtype
    q, k, v, e, f = (x.astype(jnp.float32) for x in (q, k, v, e, f))
    k, v = (
        jnp.einsum("LT,BTHK->BLHK" if x.ndim == 2 else "HLT,BTHK->BLHK", x, y, precision=_HIGHEST)
        for x, y in ((e, k), (f, v))
    )
    weights = _softmax(q, k, K**-0.5 if scale is None else scale)
    return jnp.einsum("BHTL,BLHV->BTHV", weights, v, precision=_HIGHEST).astype(dtype)


def nystrom_attention(q, k, v, *, landmarks, iterations=6, scale=None):
    """softmax(q k~^T) softmax(q~ k~^T)^+ softmax(q~ k^T) v, landmarks q~, k~ the means of L segments (2102.03902,
    section 3, without the convolution of v that it adds).

    Args:
      q, k: (B, T, H, K). v: (B, T, H, V).
      landmarks: L <= T; segments are of equal length, within one token where L does not divide T.
      iterations: of the pseudo-inverse (`pseudo_inverse`); 6 in the paper.
      scale: None means K**-0.5.

    Returns:
      (B, T, H, V) of q's dtype. Landmarks are means over past and future: there is no causal form; libraries that mask
      the three factors and call the result causal let the future in.

    Raises:
      ValueError: shapes do not agree, or landmarks is not in 1 ... T.
    """
    _check(q, k, v)
    T, K = q.shape[1], q.shape[-1]
    if not 1 <= landmarks <= T:
        raise ValueError(f"landmarks = {landmarks}: must be between 1 and the {T} tokens")
    scale = K**-0.5 if scale is None else scale
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    segment = np.arange(T) * landmarks // T == np.arange(landmarks)[:, None]
    means_LxT = jnp.asarray(segment / segment.sum(1, keepdims=True), jnp.float32)
    q_means, k_means = (jnp.einsum("LT,BTHK->BLHK", means_LxT, x, precision=_HIGHEST) for x in (q, k))
    inverse = pseudo_inverse(_softmax(q_means, k_means, scale), iterations)
    # From the right: (L, V) is the smallest.
    values = jnp.einsum("BHLS,BSHV->BHLV", _softmax(q_means, k, scale), v, precision=_HIGHEST)
    values = jnp.matmul(inverse, values, precision=_HIGHEST)
    return jnp.einsum("BHTL,BHLV->BTHV", _softmax(q, k_means, scale), values, precision=_HIGHEST).astype(dtype)


def pseudo_inverse(a_LxL, iterations: int):
    """Moore-Penrose inverse of row-stochastic matrices (..., L, L) by a cubically convergent iteration (2102.03902,
    section 3): Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z_0 = A^T / (|A|_1 |A|_inf).

    |A|_1 is each matrix's own. transformers' init_option "original" takes the largest of the batch and of all heads, so
    that a sequence's result depends on those beside it.
    """
    multiply = lambda x, y: jnp.matmul(x, y, precision=_HIGHEST)  # noqa: E731
    absolute = jnp.abs(a_LxL)
    norms = absolute.sum(-2).max(-1) * absolute.sum(-1).max(-1)
    identity = jnp.eye(a_LxL.shape[-1], dtype=a_LxL.dtype)
    z = jnp.swapaxes(a_LxL, -1, -2) / norms[..., None, None]
    for _ in range(iterations):
        az = multiply(a_LxL, z)
        z = multiply(z, 13 * identity - multiply(az, 15 * identity - multiply(az, 7 * identity - az))) / 4
    return z


def _softmax(q, k, scale):
    """(B, H, T, S) float32."""
    return jax.nn.softmax(jnp.einsum("BTHK,BSHK->BHTS", q * scale, k, precision=_HIGHEST), -1)


def _check(q, k, v):
    if q.shape != k.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"shapes do not agree: q {q.shape}, k {k.shape}, v {v.shape}; expected (B,T,H,K), (B,T,H,K), (B,T,H,V)"
        )
