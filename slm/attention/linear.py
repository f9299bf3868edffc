"""Linear attention (Katharopoulos et al. 2020): weights phi(q_i) . phi(k_j), as a recurrence without decay."""

from collections.abc import Callable

import jax.numpy as jnp

from slm.attention.features import FEATURE_MAPS
from slm.attention.recurrence import decay_attention

NOTHING = 1e-30
"""Sums of weights below this are taken for 0. Far below any real one: a constant added instead, such as the usual 1e-6,
would bias whatever has small features."""


def linear_attention(q, k, v, **options):
    """sum_j phi(q_t) . phi(k_j) v_j over j <= t, divided by the sum of the weights: `linear_attention_with_state`
    without the state.

    Returns:
      (B, T, H, V).
    """
    return linear_attention_with_state(q, k, v, **options)[0]


def linear_attention_with_state(
    q,
    k,
    v,
    *,
    feature_map="elu1",
    normalize=True,
    scale=1.0,
    initial_state=None,
    form="chunked",
    chunk=64,
    segment_ids=None,
    reset_state=None,
    implementation="auto",
):
    """S_t = S_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t); out_t = phi(q_t)^T S_t / phi(q_t) . z_t
    (Katharopoulos et al. 2020, equations 16-20; read after the write). Everything accumulates in float32.

    Args:
      q, k: (B, T, H, K). v: (B, T, H, V).
      feature_map: phi: a name in `FEATURE_MAPS`, a function (B, T, H, K) -> (B, T, H, M), or a pair of functions for
        queries and keys.
      normalize: divide by the sum of the weights; where there is no weight at all the output is 0. Maps with negative
        features need False.
      scale: of q before the map.
      initial_state: (B, H, M, V), or (B, H, M, V + 1) with `normalize`: z is the last column; None: zeros.
      form, chunk, implementation: as in `decay_attention`.
      segment_ids: (B, T) integers: where they differ from the token before, the state becomes `reset_state`.
      reset_state: initial_state's shape without B; None: zeros.

    Returns:
      (out (B, T, H, V), final_state like initial_state, float32).

    Raises:
      ValueError: no such map, or as `decay_attention`.
    """
    query_map, key_map = _maps(feature_map)
    dtype = v.dtype
    q, k = query_map(q * jnp.asarray(scale, q.dtype)), key_map(k)
    if dtype == jnp.float16:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))  # sums over time leave its range
    if normalize:
        # One product serves numerator and denominator, which then err alike: outputs stay averages of values.
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    out, state = decay_attention(
        q,
        k,
        v,
        None,
        scale=1.0,
        initial_state=initial_state,
        form=form,
        chunk=chunk,
        segment_ids=segment_ids,
        reset_state=reset_state,
        implementation=implementation,
    )
    return (_divided(out) if normalize else out).astype(dtype), state


def _maps(feature_map) -> tuple[Callable, Callable]:
    if isinstance(feature_map, str):
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map = {feature_map!r}: must be a function or one of {', '.join(FEATURE_MAPS)}")
        feature_map = FEATURE_MAPS[feature_map]
    return feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)


def _divided(out):
    """All columns but the last over the last one."""
    total = out[..., -1:].astype(jnp.float32)
    some = jnp.abs(total) > NOTHING
    # The inner choice keeps the gradient of what is not taken from being NaN.
    quotient = out[..., :-1].astype(jnp.float32) / jnp.where(some, total, 1)
    return jnp.where(some, quotient, 0)
