"""The elementwise recurrence against its definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention.diagonal import diagonal_recurrence

B, T, D = 2, 37, 3
SEGMENTS = np.stack([np.repeat([1, 2, 3], [5, 3, 29]), np.repeat([7, 1], [16, 21])])


def inputs(hard=1.0):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(B, T, D)),
        "log_decay": -hard * rng.random((B, T, D)),
        "initial_state": rng.normal(size=(B, D)),
        "reset_state": rng.normal(size=(D,)),
    }


def definition(x, log_decay, initial_state, reset_state):
    """float64, token by token."""
    h, out = np.array(initial_state), np.zeros_like(x)
    for t in range(T):
        if t:
            h = np.where((SEGMENTS[:, t] != SEGMENTS[:, t - 1])[:, None], reset_state, h)
        h = np.exp(log_decay[:, t]) * h + x[:, t]
        out[:, t] = h
    return out, h


@functools.cache
def program(form):
    def loss(arrays, weights):
        h, final = diagonal_recurrence(**arrays, form=form, chunk=8, segment_ids=SEGMENTS)
        return (h * weights[0]).sum() + (final * weights[1]).sum(), (h, final)

    return jax.jit(jax.grad(loss, has_aux=True))


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("hard", [1.0, 15.0])
def test_outputs_state_and_gradients_are_those_of_the_definition(form, hard):
    arrays = inputs(hard)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(B, T, D)), rng.normal(size=(B, D))
    singles = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (arrays, weights))
    grads, (h, final) = program(form)(*singles)
    expected_h, expected_final = definition(**arrays)
    assert relative(h, expected_h) < 2e-5
    assert relative(final, expected_final) < 2e-5

    def value(arrays):
        h, final = definition(**arrays)
        return (h * weights[0]).sum() + (final * weights[1]).sum()

    for name, grad in grads.items():
        direction = rng.normal(size=arrays[name].shape)
        moved = [value(arrays | {name: arrays[name] + sign * 1e-6 * direction}) for sign in (1, -1)]
        slope = (moved[0] - moved[1]) / 2e-6
        assert abs((np.asarray(grad, np.float64) * direction).sum() - slope) < 5e-5 * max(1, abs(slope)), name


def test_a_state_that_is_handed_on_makes_one_text_of_two():
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in inputs().items() if name != "reset_state"}
    whole, final = diagonal_recurrence(**arrays)
    state, parts = arrays["initial_state"], []
    for a, b in ((0, 11), (11, 12), (12, T)):
        part, state = diagonal_recurrence(arrays["x"][:, a:b], arrays["log_decay"][:, a:b], initial_state=state)
        parts.append(part)
    assert relative(jnp.concatenate(parts, 1), np.asarray(whole)) < 1e-6
    assert relative(state, np.asarray(final)) < 1e-6


def test_a_state_that_never_decays_and_one_that_is_forgotten_at_once():
    x = jnp.ones((1, 100, 1))
    kept, _ = diagonal_recurrence(x, jnp.zeros_like(x))
    np.testing.assert_allclose(kept[0, :, 0], np.arange(1, 101))
    gone, _ = diagonal_recurrence(x, jnp.full_like(x, -jnp.inf))
    np.testing.assert_array_equal(gone, x)


def test_bad_requests():
    x = jnp.ones((1, 4, 2))
    with pytest.raises(ValueError, match="log_decay has shape"):
        diagonal_recurrence(x, x[..., :1])
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 2\), expected \(1, 2\)"):
        diagonal_recurrence(x, x, initial_state=jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="chunk = 0"):
        diagonal_recurrence(x, x, chunk=0)
    with pytest.raises(ValueError, match="form = 'parallel'"):
        diagonal_recurrence(x, x, form="parallel")
