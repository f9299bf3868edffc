"""Divergences against their formulas in NumPy, float64, one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.compress.divergences import DIVERGENCES, RANKED, dense_rows

N, V = 5, 40
BETA = 0.3


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, V)) * 2, log_softmax(rng.normal(size=(N, V)) * 2)


def kl(a, b):
    return sum(x * np.log(x / y) for x, y in zip(a, b))


def pairs(p, value):
    """Mean of value(i, j) over the ranked pairs with p_i > p_j."""
    top = np.argsort(-p)[:RANKED]
    return np.mean([value(i, j) for i in top for j in top if p[i] > p[j] + 1e-9])


NAIVE = {
    "forward_kl": lambda z, p, q: kl(p, q),
    "reverse_kl": lambda z, p, q: kl(q, p),
    "jsd": lambda z, p, q: BETA * kl(p, BETA * p + (1 - BETA) * q) + (1 - BETA) * kl(q, BETA * p + (1 - BETA) * q),
    "skew_kl": lambda z, p, q: kl(p, BETA * p + (1 - BETA) * q),
    "skew_reverse_kl": lambda z, p, q: kl(q, BETA * q + (1 - BETA) * p),
    "tvd": lambda z, p, q: np.maximum(p - q, 0).sum(),
    "hinge_ranking": lambda z, p, q: pairs(p, lambda i, j: max(0.0, p[i] - p[j] - q[i] + q[j])),
    "logistic_ranking": lambda z, p, q: pairs(p, lambda i, j: np.log1p(np.exp(z[j] - z[i]))),
}


def naive(name, z, log_p):
    return np.array([NAIVE[name](row, np.exp(p), np.exp(log_softmax(row))) for row, p in zip(z, log_p)])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_is_its_formula_with_its_gradient(name):
    z, log_p = inputs()
    function = jax.jit(lambda z, log_p, beta: DIVERGENCES[name](z, log_p, beta))
    got = function(jnp.float32(z), jnp.float32(log_p), BETA)
    np.testing.assert_allclose(got, naive(name, z, log_p), rtol=2e-5, atol=2e-6)
    grad = jax.grad(lambda z: function(z, jnp.float32(log_p), BETA).sum())(jnp.float32(z))
    for at in [(0, 0), (1, 7), (4, 39), (2, int(log_p[2].argmax()))]:
        step = np.zeros((N, V))
        step[at] = 1e-6
        slope = (naive(name, z + step, log_p) - naive(name, z - step, log_p)).sum() / 2e-6
        np.testing.assert_allclose(grad[at], slope, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if "ranking" not in name])
def test_vanishes_between_equals_and_only_there(name):
    z, log_p = (jnp.float32(x) for x in inputs())
    np.testing.assert_allclose(DIVERGENCES[name](z, jax.nn.log_softmax(z), BETA), 0, atol=1e-6)
    grad = jax.grad(lambda z, log_p: DIVERGENCES[name](z, log_p, BETA).sum())(z, jax.nn.log_softmax(z))
    if name != "tvd":  # which has a corner there
        np.testing.assert_allclose(grad, 0, atol=1e-6)
    assert (DIVERGENCES[name](z, log_p, BETA) > 0.01).all()


def test_of_a_teacher_that_is_certain_forward_kl_is_cross_entropy():
    z, _ = inputs()
    log_p = jnp.full((N, V), -jnp.inf).at[jnp.arange(N), jnp.arange(N)].set(0.0)
    nats, grad = jax.vmap(jax.value_and_grad(DIVERGENCES["forward_kl"]))(jnp.float32(z), log_p)
    np.testing.assert_allclose(nats, -log_softmax(z)[np.arange(N), np.arange(N)], rtol=1e-5)
    np.testing.assert_allclose(grad, np.exp(log_softmax(z)) - np.eye(N, V), atol=1e-6)


def test_jsd_tends_to_both_kls():
    """Agarwal et al. 2024: JSD(beta) / beta -> KL(p || q), and by symmetry / (1 - beta) -> KL(q || p)."""
    z, log_p = (jnp.float32(x) for x in inputs())
    small = 1e-4
    np.testing.assert_allclose(
        DIVERGENCES["jsd"](z, log_p, small) / small, DIVERGENCES["forward_kl"](z, log_p), rtol=0.05
    )
    np.testing.assert_allclose(
        DIVERGENCES["jsd"](z, log_p, 1 - small) / small, DIVERGENCES["reverse_kl"](z, log_p), rtol=0.05
    )


def test_skew_begins_at_kl_with_a_finite_gradient():
    z, log_p = (jnp.float32(x) for x in inputs())
    for skew, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        one, other = (
            jax.value_and_grad(lambda z, name=name: DIVERGENCES[name](z, log_p, jnp.float32(0)).sum())(z)
            for name in (skew, plain)
        )
        np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
        np.testing.assert_allclose(one[1], other[1], atol=1e-5)


def rows(k, temperature, missing):
    _, log_p = inputs(1)
    order = np.argsort(-log_p, -1)
    ids, rest = order[:, :k], order[:, k:]
    known = np.take_along_axis(log_p, ids, -1)
    tail = np.exp(np.take_along_axis(log_p, rest, -1)).sum(-1)
    with np.errstate(divide="ignore"):
        got = dense_rows(jnp.asarray(ids), jnp.float32(known), jnp.float32(np.log(tail)), V, temperature, missing)
    return log_p, ids, tail, np.exp(np.asarray(got, np.float64))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("missing", ["zero", "uniform", "renormalize"])
def test_all_tokens_of_the_vocabulary_are_the_dense_teacher(temperature, missing):
    log_p, _, _, got = rows(V, temperature, missing)
    expected = np.exp(log_p / temperature)
    np.testing.assert_allclose(got, expected / expected.sum(-1, keepdims=True), rtol=1e-5)


def test_rows_of_few_tokens():
    k = 6
    for missing, temperature in (("zero", 1), ("uniform", 1), ("renormalize", 1), ("uniform", 2), ("zero", 2)):
        log_p, ids, tail, got = rows(k, temperature, missing)
        for row in range(N):
            p = np.full(V, tail[row] / (V - k))
            p[ids[row]] = np.exp(log_p[row, ids[row]])
            p = p ** (1 / temperature)
            p /= p.sum()
            others = np.setdiff1d(np.arange(V), ids[row])
            if missing != "uniform":
                p[others] = 0
            if missing == "renormalize":
                p /= p.sum()
            np.testing.assert_allclose(got[row], p, rtol=1e-5, atol=1e-8)


def test_what_the_tail_can_hide_is_bounded():
    """With the tail left out, KL differs from the dense one by what the tail's tokens contribute to it."""
    z, _ = inputs()
    log_p, ids, _, _ = rows(6, 1.0, "zero")
    _, _, _, got = rows(6, 1.0, "zero")
    with np.errstate(divide="ignore"):
        sparse = DIVERGENCES["forward_kl"](jnp.float32(z), jnp.float32(np.log(got)))
    dense = naive("forward_kl", z, log_p)
    hidden = np.exp(log_p) * (log_p - log_softmax(z))
    np.put_along_axis(hidden, ids, 0, -1)
    np.testing.assert_allclose(sparse, dense - hidden.sum(-1), rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "reverse_kl"])
def test_a_teacher_that_says_zero_leaves_values_and_gradients_finite(name):
    z, log_p = (jnp.float32(x) for x in inputs())
    log_p = log_p.at[:, 5:].set(-jnp.inf)
    value, grad = jax.value_and_grad(lambda z: DIVERGENCES[name](z, log_p, BETA).sum())(z)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert np.abs(grad).max() > 0
