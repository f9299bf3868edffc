"""Linformer and Nystromformer against their definitions in float64, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import linformer_attention, nystrom_attention, softmax_attention
from slm.attention.lowrank import pseudo_inverse

B, T, H, K, V, L = 2, 24, 2, 8, 5, 6


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def inputs():
    return arrays((B, T, H, K), (B, T, H, K), (B, T, H, V))


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


def softmax(q, k, scale=K**-0.5):
    x = np.einsum("BTHK,BSHK->BHTS", q, k) * scale
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(L, T), (H, L, T)])
def test_linformer_is_its_equation(shape):
    q, k, v = inputs()
    e, f = arrays(shape, shape, seed=1)
    q64, k64, v64, e64, f64 = (x.astype(np.float64) for x in (q, k, v, e, f))
    heads = [np.broadcast_to(x, (H, L, T)) for x in (e64, f64)]
    keys, values = (np.einsum("HLT,BTHK->BLHK", x, y) for x, y in zip(heads, (k64, v64)))
    expected = np.einsum("BHTL,BLHV->BTHV", softmax(q64, keys), values)
    assert relative(jax.jit(linformer_attention)(q, k, v, e, f), expected) < 2e-5


def test_linformer_of_full_rank_is_softmax():
    q, k, v = inputs()
    exact = softmax_attention(q, k, v, causal=False)
    np.testing.assert_allclose(linformer_attention(q, k, v, np.eye(T), np.eye(T)), exact, atol=1e-6)


def nystrom(q, k, v, landmarks, iterations):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    segments = [np.flatnonzero(np.arange(T) * landmarks // T == i) for i in range(landmarks)]
    assert {len(s) for s in segments} <= {T // landmarks, -(-T // landmarks)}
    q_means, k_means = (np.stack([x[:, s].mean(1) for s in segments], 1) for x in (q, k))
    a = softmax(q_means, k_means)
    z = np.swapaxes(a, -1, -2) / a.sum(-2).max(-1)[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * np.eye(landmarks) - az @ (15 * np.eye(landmarks) - az @ (7 * np.eye(landmarks) - az))) / 4
    out = softmax(q, k_means) @ z @ softmax(q_means, k) @ v.transpose(0, 2, 1, 3)
    return out.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("landmarks", [6, 7])
def test_nystrom_is_its_equation(landmarks):
    q, k, v = inputs()
    out = jax.jit(nystrom_attention, static_argnames="landmarks")(q, k, v, landmarks=landmarks)
    assert relative(out, nystrom(q, k, v, landmarks, 6)) < 2e-5


def test_nystrom_with_every_token_a_landmark_is_softmax():
    """A A^+ A = A, as far as the iteration has come; a token that sees itself most makes it come soon."""
    q, _, v = inputs()
    q *= 2
    exact = np.einsum("BHTS,BSHV->BTHV", softmax(q.astype(np.float64), q.astype(np.float64)), v)
    errors = [relative(nystrom_attention(q, q, v, landmarks=T, iterations=n), exact) for n in (2, 6, 12)]
    assert errors[0] > 5e-2 > 2e-2 > errors[1] > 1e-3
    assert errors[2] < 2e-5


def test_pseudo_inverse_converges_and_sees_no_other_matrix():
    rng = np.random.default_rng(0)
    a = rng.dirichlet(np.full(5, 0.1), size=(3, 2, 5)) * 0.4 + 0.6 * np.eye(5)
    inverse = pseudo_inverse(jnp.asarray(a, jnp.float32), 12)
    np.testing.assert_allclose(inverse, np.linalg.pinv(a), atol=1e-4)
    alone = pseudo_inverse(jnp.asarray(a[:1, :1], jnp.float32), 3)
    np.testing.assert_allclose(pseudo_inverse(jnp.asarray(a, jnp.float32), 3)[:1, :1], alone, atol=1e-6)


def test_both_differentiate_and_keep_the_dtype():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
    e, f = (jnp.asarray(x, jnp.bfloat16) for x in arrays((L, T), (L, T)))

    def loss(q, k, v, e, f):
        outs = linformer_attention(q, k, v, e, f), nystrom_attention(q, k, v, landmarks=L)
        assert all(out.dtype == jnp.bfloat16 and out.shape == (B, T, H, V) for out in outs)
        return sum(out.astype(jnp.float32).sum() for out in outs)

    for grad in jax.jit(jax.grad(loss, argnums=range(5)))(q, k, v, e, f):
        assert np.isfinite(grad.astype(jnp.float32)).all()
        assert (grad != 0).any()


def test_bad_arguments_are_refused():
    q, k, v = inputs()
    e, f = arrays((L, T), (L, T))
    with pytest.raises(ValueError, match=r"e has shape \(6, 23\): expected \(L, 24\)"):
        linformer_attention(q, k, v, e[:, 1:], f)
    with pytest.raises(ValueError, match="f has shape"):
        linformer_attention(q, k, v, e, f[1:])
    with pytest.raises(ValueError, match="landmarks = 25"):
        nystrom_attention(q, k, v, landmarks=25)
    with pytest.raises(ValueError, match="shapes do not agree"):
        nystrom_attention(q, k[:, 1:], v, landmarks=L)
