"""Chunked cross-entropy against the formula on full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.training.loss import cross_entropy, token_losses

B, T, D, V = 2, 21, 8, 37


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D)) * 3
    unembedding = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jax.random.bernoulli(keys[3], 0.7, (B, T)).astype(jnp.float32)
    return hidden, unembedding, targets, weights


def full(hidden, unembedding, targets, weights, z_loss, cap):
    logits = hidden @ unembedding
    if cap:
        logits = cap * jnp.tanh(logits / cap)
    log_z = jax.nn.logsumexp(logits, -1)
    nats = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return ((nats + z_loss * log_z**2) * weights).sum(), (nats * weights).sum()


@pytest.mark.parametrize("chunk", [1, 7, 8, 21, 100])
@pytest.mark.parametrize(("z_loss", "cap"), [(0.0, None), (0.1, None), (0.1, 4.0)])
def test_equals_the_full_form_with_gradients(chunk, z_loss, cap):
    hidden, unembedding, targets, weights = inputs()

    def chunked(hidden, unembedding):
        value, sums = cross_entropy(
            hidden, unembedding, targets, weights, z_loss=z_loss, logit_softcap=cap, chunk=chunk
        )
        return 0.5 * value, sums  # a cotangent other than 1

    def whole(hidden, unembedding):
        value, nats = full(hidden, unembedding, targets, weights, z_loss, cap)
        return 0.5 * value, nats

    (a, sums), grads_a = jax.value_and_grad(chunked, (0, 1), has_aux=True)(hidden, unembedding)
    (b, nats), grads_b = jax.value_and_grad(whole, (0, 1), has_aux=True)(hidden, unembedding)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(chunked(hidden, unembedding)[0], b, rtol=1e-5)  # not under differentiation
    np.testing.assert_allclose(sums["nats"], nats, rtol=1e-5)
    for x, y in zip(grads_a, grads_b):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_token_losses_and_accuracy():
    hidden, unembedding, targets, weights = inputs()
    nats, correct, log_z = token_losses(hidden, unembedding, targets, chunk=6)
    logits = np.asarray(hidden @ unembedding, np.float64)
    expected = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(log_z, expected, rtol=1e-5)
    np.testing.assert_allclose(nats, expected - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0],
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    np.testing.assert_array_equal(correct, logits.argmax(-1) == targets)
    _, sums = cross_entropy(hidden, unembedding, targets, weights, chunk=6)
    assert float(sums["correct"]) == float((correct * weights).sum())


def test_full_float32_logits_are_never_held():
    """The compiled gradient's temporary memory grows with the chunk, and stays below one full set of logits."""
    B, T, D, V = 4, 256, 16, 2048
    shapes = [((B, T, D), "float32"), ((D, V), "float32"), ((B, T), "int32"), ((B, T), "float32")]
    abstract = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def temporaries(chunk):
        grad = jax.grad(lambda h, u, t, w: cross_entropy(h, u, t, w, chunk=chunk)[0], (0, 1))
        return jax.jit(grad).lower(*abstract).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < B * T * V * 4 / 2 < temporaries(T)
