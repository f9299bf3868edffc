"""How far a student's next token is from a teacher's: functions of float32 (student_logits (..., V), teacher log p
(..., V), beta) -> (...), nats, differentiable in the student's logits.

p is the teacher's distribution, q the student's. A teacher's log p may be -inf, where p is 0; what remains need not sum
to one (see `dense_rows`). beta is above 0 and below 1, and may be traced.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Divergence = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
RANKED = 32
"""Tokens of the teacher, the likeliest, whose order ranking losses compare."""
_DIFFERENT = 1e-9  # probabilities closer than this are tied, and such small ones are not ranked


def forward_kl(student_logits, teacher_log_probs, beta=None):
    """KL(p || q) (Hinton et al. 2015): q covers all that p says."""
    return _kl(teacher_log_probs, jax.nn.log_softmax(student_logits))


def reverse_kl(student_logits, teacher_log_probs, beta=None):
    """KL(q || p) (MiniLLM, Gu et al. 2024): q says nothing that p does not. p must be above 0 everywhere."""
    return _kl(jax.nn.log_softmax(student_logits), teacher_log_probs)


def jsd(student_logits, teacher_log_probs, beta):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, Agarwal et al. 2024, eq. 1).

    Over beta it tends to forward_kl where beta goes to 0, over 1 - beta to reverse_kl where it goes to 1.
    """
    log_q = jax.nn.log_softmax(student_logits)
    log_m = _mixture(teacher_log_probs, log_q, beta)
    return beta * _kl(teacher_log_probs, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(student_logits, teacher_log_probs, beta):
    """KL(p || beta p + (1 - beta) q) (DistiLLM, Ko et al. 2024, eq. 4)."""
    log_q = jax.nn.log_softmax(student_logits)
    return _kl(teacher_log_probs, _mixture(teacher_log_probs, log_q, beta))


def skew_reverse_kl(student_logits, teacher_log_probs, beta):
    """KL(q || beta q + (1 - beta) p) (DistiLLM, Ko et al. 2024)."""
    log_q = jax.nn.log_softmax(student_logits)
    return _kl(log_q, _mixture(log_q, teacher_log_probs, beta))


def tvd(student_logits, teacher_log_probs, beta=None):
    """Half the sum of |p - q|: total variation distance, at most 1."""
    return jnp.abs(jnp.exp(teacher_log_probs) - jax.nn.softmax(student_logits)).sum(-1) / 2


def hinge_ranking(student_logits, teacher_log_probs, beta=None):
    """Mean of max(0, (p_i - p_j) - (q_i - q_j)) over pairs of the teacher's likeliest tokens with p_i > p_j.

    DistillKit's `hinge` with the teacher's own margin, but a mean for each token, where DistillKit takes one over all
    pairs of a batch.
    """
    p, ids = _likeliest(teacher_log_probs)
    q = jnp.take_along_axis(jax.nn.softmax(student_logits), ids, -1)
    return _mean_of_pairs(p, jax.nn.relu(_pairs(p) - _pairs(q)))


def logistic_ranking(student_logits, teacher_log_probs, beta=None):
    """Mean of log(1 + exp(-(z_i - z_j))) of the student's logits z over pairs of the teacher's likeliest tokens with
    p_i > p_j: DistillKit's `logistic_ranking`, but a mean for each token (see `hinge_ranking`)."""
    p, ids = _likeliest(teacher_log_probs)
    return _mean_of_pairs(p, jax.nn.softplus(-_pairs(jnp.take_along_axis(student_logits, ids, -1))))


def uld(student_logits, teacher_log_probs):
    """Sum of |p_(i) - q_(i)| over probabilities sorted from the largest, those that the smaller vocabulary lacks being
    0: at most 2 (Universal Logit Distillation, Boizard et al. 2024). Vocabularies may differ, and ids mean nothing."""
    both = jax.nn.log_softmax(student_logits), teacher_log_probs
    q, p = (jnp.sort(jnp.exp(x), axis=-1, descending=True) for x in both)
    size = max(q.shape[-1], p.shape[-1])
    q, p = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]) for x in (q, p))
    return jnp.abs(p - q).sum(-1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "hinge_ranking": hinge_ranking,
    "logistic_ranking": logistic_ranking,
}
"""Name in `distill.loss` to function, of those between distributions over the same tokens."""
INFINITE_AT_ZERO = ("reverse_kl",)
"""Those that need a probability above 0 for every token."""


def dense_rows(ids, log_probs, log_tail, vocab_size: int, temperature, missing: str):
    """Log-probabilities of all tokens from those of the likeliest.

    Args:
      ids: (..., k) integers, different in a row.
      log_probs: (..., k), at temperature 1.
      log_tail: (...,) log of the probability of all other tokens together; -inf if k is the vocabulary.
      vocab_size: V.
      temperature: what the distribution is wanted at. The tail counts as spread evenly, so that there is a sum to
        divide by.
      missing: what the others get: `zero` nothing, so that the row sums to less than 1; `uniform` the tail, spread
        evenly; `renormalize` nothing, and the row is divided by its sum.

    Returns:
      float32 (..., V).
    """
    k = ids.shape[-1]
    log_probs = log_probs.astype(jnp.float32) / temperature
    each = (log_tail.astype(jnp.float32) - jnp.log(max(vocab_size - k, 1))) / temperature
    rest = each + (jnp.log(vocab_size - k) if k < vocab_size else -jnp.inf)
    known = jax.nn.logsumexp(log_probs, -1)
    total = known if missing == "renormalize" else jnp.logaddexp(known, rest)
    others = each - total if missing == "uniform" and k < vocab_size else jnp.full_like(each, -jnp.inf)
    row = jnp.broadcast_to(others[..., None], (*others.shape, vocab_size))
    return jnp.put_along_axis(row, ids.astype(jnp.int32), log_probs - total[..., None], -1, inplace=False)


def _kl(log_a, log_b):
    """Sum of a (log a - log b); where a is 0, nothing. Finite in value and gradient."""
    there = jnp.isfinite(log_a)
    safe = jnp.where(there, log_a, 0)
    return jnp.where(there, jnp.exp(safe) * (safe - jnp.where(there, log_b, 0)), 0).sum(-1)


def _mixture(log_a, log_b, share):
    """log(share a + (1 - share) b)."""
    return jnp.logaddexp(log_a + jnp.log(share), log_b + jnp.log1p(-jnp.asarray(share, jnp.float32)))


def _likeliest(teacher_log_probs):
    log_p, ids = jax.lax.top_k(teacher_log_probs, min(RANKED, teacher_log_probs.shape[-1]))
    return jnp.exp(log_p), ids


def _pairs(x):
    return x[..., :, None] - x[..., None, :]


def _mean_of_pairs(p, values):
    ranked = (p > _DIFFERENT)[..., None, :] & (_pairs(p) > _DIFFERENT)
    return jnp.where(ranked, values, 0).sum((-2, -1)) / jnp.maximum(ranked.sum((-2, -1)), 1)
