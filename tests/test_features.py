"""Feature maps against the kernels that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import linear_attention
from slm.attention.features import (
    FEATURE_MAPS,
    SIGNED,
    cosformer,
    dpfp,
    favor_keys,
    favor_queries,
    hedgehog,
    random_features,
)

B, T, H, K = 2, 7, 3, 5


def arrays(count, seed=0, size=K):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, H, size)).astype(np.float32) for _ in range(count)]


def kernel(phi_q, phi_k):
    return np.einsum("BTHM,BSHM->BHTS", np.asarray(phi_q, np.float64), np.asarray(phi_k, np.float64))


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def doubled(x):
    """The features of `dpfp` with nu = 2, one by one."""
    r = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1)
    pairs = [r[..., i] * r[..., i - n] for n in (1, 2) for i in range(2 * K)]
    return np.stack(pairs, -1)


def test_maps_are_their_definitions():
    q, k = arrays(2)
    q64, k64 = q.astype(np.float64), k.astype(np.float64)
    s = kernel(q, k)
    expected = {
        "identity": s,
        "elu1": kernel(*(np.where(x > 0, x + 1, np.exp(x)) for x in (q64, k64))),
        "relu": kernel(np.maximum(q64, 0), np.maximum(k64, 0)),
        "silu": kernel(*(x / (1 + np.exp(-x)) for x in (q64, k64))),
        "taylor2": 1 + s + s**2 / 2,
        "quadratic": s**2,
        "hedgehog": kernel(*(np.concatenate([softmax(x), softmax(-x)], -1) for x in (q64, k64))),
    }
    sizes = {"taylor2": 1 + K + K * (K + 1) // 2, "quadratic": K * (K + 1) // 2, "dpfp": 2 * K, "hedgehog": 2 * K}
    for name, phi in FEATURE_MAPS.items():
        assert phi(q).shape == (B, T, H, sizes.get(name, K))
        if name in expected:
            assert relative(kernel(phi(q), phi(k)), expected[name]) < 1e-6, name
        assert (kernel(phi(q), phi(k)) >= 0).all() == (name not in SIGNED)
        assert phi(jnp.asarray(q, jnp.bfloat16)).dtype == jnp.bfloat16
    assert set(FEATURE_MAPS) == {*expected, "dpfp"}
    np.testing.assert_allclose(np.sort(dpfp(q, 2)), np.sort(doubled(q)), rtol=1e-6)


def test_elu1_keeps_small_features():
    x = jnp.array([-20.0, -1e-3, 0.0, 3.0])
    np.testing.assert_allclose(FEATURE_MAPS["elu1"](x), [np.exp(-20), np.exp(-1e-3), 1, 4], rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(FEATURE_MAPS["elu1"]))(x), [np.exp(-20), np.exp(-1e-3), 1, 1], rtol=1e-6
    )


def test_hedgehog_maps_each_head_with_its_own_matrix():
    (q,) = arrays(1)
    matrices = np.random.default_rng(1).normal(size=(H, K, 4))
    y = np.stack([q[:, :, h] @ matrices[h] for h in range(H)], 2)
    expected = np.concatenate([softmax(y), softmax(-y)], -1)
    assert relative(hedgehog(jnp.asarray(q), jnp.asarray(matrices, jnp.float32)), expected) < 1e-6
    assert np.isfinite(hedgehog(jnp.asarray(q) * 1e4)).all()


def test_cosformer_reweights_by_distance_up_to_its_horizon():
    q, k = arrays(2)
    at = np.array([[0, 3, 4, 10, 20, 30, 40], [5, 6, 7, 8, 9, 10, 45]])
    horizon = 40
    weights = kernel(cosformer(q, jnp.asarray(at), horizon), cosformer(k, jnp.asarray(at), horizon))
    apart = (at[:, :, None] - at[:, None, :])[:, None]
    assert relative(weights, kernel(np.maximum(q, 0), np.maximum(k, 0)) * np.cos(np.pi / 2 * apart / horizon)) < 1e-6
    assert np.abs(weights[0, :, 6, 0]).max() < 1e-6  # a distance of the horizon weighs nothing


def test_random_directions_are_gaussian_and_orthogonal_in_blocks():
    M = 20
    w = np.asarray(random_features(jax.random.key(0), 8, M), np.float64)
    assert w.shape == (M, 8)
    for start in range(0, M, 8):
        gram = w[start : start + 8] @ w[start : start + 8].T
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-5)
    assert np.abs(w[:8] @ w[8:16].T).max() > 0.1
    draws = np.asarray(jax.vmap(lambda key: random_features(key, 4, 6))(jax.random.split(jax.random.key(1), 4000)))
    # Each row by itself is standard normal: fourth moments too, so that lengths are chi-distributed, not sqrt(K).
    np.testing.assert_allclose(draws.mean(0), 0, atol=0.08)
    np.testing.assert_allclose((draws**2).mean(0), 1, atol=0.12)
    np.testing.assert_allclose((draws**4).mean(), 3, atol=0.12)
    assert len(np.unique(draws[:, 0, 0])) == 4000


def favor_kernel(q, k, w):
    """The estimate of exp(q . k) in float64, from its definition."""
    phi = [np.exp(x @ w.T - (x**2).sum(-1, keepdims=True) / 2) for x in (q, k)]
    return phi[0] @ phi[1].T / len(w)


def test_favor_estimates_exponentials_without_bias_and_better_if_orthogonal():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 6, 4)) * 0.4
    exact = np.exp(q @ k.T)
    keys = jax.random.split(jax.random.key(0), 3000)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: random_features(key, 4, 4)))(keys), np.float64)
    estimates = np.stack([favor_kernel(q, k, w) for w in draws])
    independent = np.stack([favor_kernel(q, k, rng.normal(size=(4, 4))) for _ in range(3000)])
    uncertain = estimates.std(0) / np.sqrt(3000)
    assert (np.abs(estimates.mean(0) - exact) < 4 * uncertain).all()
    assert (uncertain < 0.04 * exact).all()
    assert ((estimates - exact) ** 2).mean() < 0.9 * ((independent - exact) ** 2).mean()


@functools.cache
def performer(M, size):
    """q, k, v, scaled by K**-1/4 -> FAVOR+ attention with M features; and its directions."""
    w = random_features(jax.random.key(3), size, M)
    maps = (lambda q: favor_queries(q, w), lambda k: favor_keys(k, w))
    return jax.jit(lambda q, k, v: linear_attention(q, k, v, feature_map=maps)), np.asarray(w, np.float64)


@pytest.mark.parametrize("length", [0.5, 6.0])
def test_favor_attention_is_the_unstabilised_definition(length):
    """Also for queries and keys so long that exponents span tens: the stabilisers cancel."""
    q, k, v = arrays(3, size=8)
    q, k = q * length * 8**-0.5, k * length * 8**-0.5
    attend, w = performer(24, 8)
    weights = np.stack([[favor_kernel(q[b, :, h], k[b, :, h], w) for h in range(H)] for b in range(B)])
    weights = np.tril(weights)
    expected = np.einsum("BHTS,BSHV->BTHV", weights / weights.sum(-1, keepdims=True), v)
    assert relative(attend(q, k, v), expected) < 2e-5
    assert np.isfinite(attend(q * 100, k, v)).all()


def test_favor_approaches_softmax_with_the_number_of_features():
    """The error of the weights falls like 1 / sqrt(M); each M has the same 2048 directions to draw from."""
    q, k = (x * 0.35 for x in arrays(2, size=8))
    exact, errors = softmax(kernel(q, k)), []
    w = random_features(jax.random.key(0), 8, 2048)
    phi_q, phi_k = np.asarray(favor_queries(q, w)), np.asarray(favor_keys(k, w))
    for M in (8, 64, 512):
        squares = []
        for start in range(0, 2048, M):
            weights = kernel(phi_q[..., start : start + M], phi_k[..., start : start + M])
            squares.append(np.square(weights / weights.sum(-1, keepdims=True) - exact).mean())
        errors.append(np.sqrt(np.mean(squares)))
    assert errors[0] > 1.7 * errors[1] > 1.7 * 1.7 * errors[2]
    assert errors[2] < 0.02


def test_a_key_has_the_features_that_it_has_alone():
    """Public stabilisers take the largest feature of all keys, the future ones included."""
    _, k = arrays(2, size=8)
    w = jnp.asarray(performer(24, 8)[1], jnp.float32)
    louder = k.copy()
    louder[:, 4] *= 20
    np.testing.assert_array_equal(favor_keys(k, w)[:, :4], favor_keys(louder, w)[:, :4])
    # Exponents are at most |w|^2 / 2, where k = w.
    peak = favor_keys(jnp.broadcast_to(w[:, None], (24, 1, 8)), w)
    np.testing.assert_allclose(np.log(np.diagonal(peak[:, 0])), (np.asarray(w) ** 2).sum(-1) / 2, rtol=1e-4)


def test_exponentials_leave_float16():
    k = jnp.asarray(arrays(1)[0], jnp.float16)
    w = random_features(jax.random.key(0), K, 4)
    assert favor_keys(k, w).dtype == favor_queries(k, w).dtype == hedgehog(k).dtype == jnp.float32
    assert favor_keys(k.astype(jnp.bfloat16), w).dtype == jnp.bfloat16
