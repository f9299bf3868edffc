"""From logits to a token: temperature, top-k, nucleus (top-p), min-p. Pure functions of arrays.

The filters set what they drop to -inf and take their strength as an array, so that changing it compiles nothing anew.
Tokens of equal probability are kept or dropped together, so no filter depends on the order of the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm.errors import ConfigError


class Sampling(NamedTuple):
    """How tokens are drawn, as numbers only: 0 temperature is greedy; 0 top_k, 1 top_p and 0 min_p are off.

    For `sample`, each may also be an array (B,): a setting for each row.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float


def make_sampling(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Sampling:
    """Checked settings; None is off. Raises ConfigError naming the one that is out of range."""
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature = {temperature}: must be at least 0 (0 always takes the likeliest token)")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k = {top_k}: must be at least 1; leave it out to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p}: must be above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ConfigError(f"min_p = {min_p}: must be from 0 to 1")
    return Sampling(float(temperature), top_k or 0, 1.0 if top_p is None else float(top_p), float(min_p or 0))


def keep_top_k(logits, k):
    """Keeps the k largest logits (..., V) and whatever equals the k-th (Fan et al. 2018).

    k () or (...) int32; 0 is off.
    """
    k = jnp.asarray(k)

    def keep(logits):
        return jnp.where(_largest(logits, lambda chosen: chosen.sum(-1) >= k) | (k <= 0)[..., None], logits, -jnp.inf)

    return jax.lax.cond((k > 0).any(), keep, lambda logits: logits, logits)


def keep_top_p(logits, p):
    """Keeps the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020).

    logits (..., V); p () or (...) in (0, 1]; 1 is off. A tie at the edge is kept as a whole.
    """

    p = jnp.asarray(p)

    def keep(logits):
        probability = jax.nn.softmax(logits)
        enough = _largest(probability, lambda chosen: jnp.where(chosen, probability, 0).sum(-1) >= p)
        return jnp.where(enough | (p >= 1)[..., None], logits, -jnp.inf)

    return jax.lax.cond((p < 1).any(), keep, lambda logits: logits, logits)


def keep_min_p(logits, p):
    """Keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024).

    logits (..., V); p () or (...) in [0, 1]; 0 is off.
    """
    return jnp.where(logits - logits.max(-1, keepdims=True) >= jnp.log(p)[..., None], logits, -jnp.inf)


def sample(keys, logits, sampling: Sampling):
    """One token for each row: temperature first, then top-k, top-p and min-p on what each left.

    Args:
      keys: (B,) PRNG keys, one a row, so that a row's token does not depend on the rows beside it.
      logits: (B, V) float32; -inf is never drawn.
      sampling: of scalars, or arrays () or (B,).

    Returns:
      (B,) int32.
    """

    def draw(logits):
        return jax.vmap(jax.random.categorical)(keys, drawn_from(logits, sampling))

    greedy = jnp.asarray(sampling.temperature) == 0
    return jax.lax.cond(greedy.all(), lambda logits: logits.argmax(-1), draw, logits).astype(jnp.int32)


def drawn_from(logits, sampling: Sampling):
    """What `sample` draws from, as log-probabilities but for a constant: (..., V) like the logits, -inf for tokens that
    are never drawn, which are all but the likeliest at temperature 0. Settings are scalars or of shape (...)."""
    greedy = (jnp.asarray(sampling.temperature) == 0)[..., None]
    # Relative to the largest, so that a tiny temperature cannot overflow.
    best = logits.max(-1, keepdims=True)
    scaled = (logits - best) / jnp.where(greedy, 1, jnp.asarray(sampling.temperature)[..., None])
    kept = keep_top_k(scaled, sampling.top_k)
    kept = keep_min_p(keep_top_p(kept, sampling.top_p), sampling.min_p)
    first = jnp.arange(logits.shape[-1]) == logits.argmax(-1, keepdims=True)
    return jnp.where(greedy, jnp.where(first, 0.0, -jnp.inf), kept)


def _largest(values, enough):
    """The smallest set of largest values (..., V), ties kept together, that is `enough`; all of them if none is.

    enough: boolean (..., V) -> boolean (...), which stays true as the set grows.

    The bits of a float, its sign handled, sort like the float: the threshold is found bit by bit, in 32 sweeps over the
    vocabulary, which costs a small part of sorting it.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    top = jnp.uint32(2**31)
    order = jnp.where(bits & top, ~bits, bits | top)

    def refine(i, threshold):
        higher = threshold | (top >> i)
        return jnp.where(enough(order >= higher[..., None]), higher, threshold)

    threshold = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), refine, jnp.zeros(values.shape[:-1], jnp.uint32))
    return order >= threshold[..., None]
