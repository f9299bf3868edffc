"""Log-linear attention against its sum over pairs in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention.loglinear import levels_of, log_linear_attention

B, T, H, K, V = 2, 53, 2, 4, 3
L = levels_of(64)
SEGMENTS = np.stack([np.repeat([1, 2, 3], [5, 3, T - 8]), np.repeat([7, 1], [21, T - 21])])


def inputs(hard=1.0):
    rng = np.random.default_rng(0)
    return {
        "q": rng.normal(size=(B, T, H, K)),
        "k": rng.normal(size=(B, T, H, K)),
        "v": rng.normal(size=(B, T, H, V)),
        "log_decay": -hard * rng.random((B, T, H)),
        "level_scale": rng.random((B, T, H, L)),
    }


def starts_of(segments):
    starts = np.zeros((B, T), int)
    for b in range(B):
        for t in range(1, T):
            starts[b, t] = t if segments[b, t] != segments[b, t - 1] else starts[b, t - 1]
    return starts


def definition(q, k, v, log_decay, level_scale, segments=None):
    out = np.zeros((B, T, H, V))
    starts = starts_of(np.zeros((B, T)) if segments is None else segments)
    for b in range(B):
        for t in range(T):
            first = int(starts[b, t])
            for j in range(first, t + 1):
                level = ((t - first) ^ (j - first)).bit_length()
                decay = np.exp(log_decay[b, j + 1 : t + 1].sum(0))
                weight = level_scale[b, t, :, level] * decay * (q[b, t] * k[b, j]).sum(-1)
                out[b, t] += K**-0.5 * weight[:, None] * v[b, j]
    return out


@functools.cache
def program(form, documents):
    rows = {}
    if documents:
        rows = {"segment_ids": SEGMENTS, "positions": np.arange(T) - starts_of(SEGMENTS)}

    def loss(arrays, weights):
        out, _ = log_linear_attention(**arrays, form=form, chunk=8, **rows)
        return (out * weights).sum(), out

    return jax.jit(jax.grad(loss, has_aux=True))


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("hard", [0.3, 15.0])
def test_outputs_and_gradients_are_those_of_the_definition(form, hard, documents):
    arrays, rng = inputs(hard), np.random.default_rng(1)
    weights = rng.normal(size=(B, T, H, V))
    grads, out = program(form, documents)(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (arrays, weights)))
    segments = SEGMENTS if documents else None
    assert relative(out, definition(**arrays, segments=segments)) < 2e-5
    for name in ("q", "log_decay", "level_scale", "v"):
        direction = rng.normal(size=arrays[name].shape)
        up, down = (
            (definition(**(arrays | {name: arrays[name] + e * direction}), segments=segments) * weights).sum()
            for e in (1e-5, -1e-5)
        )
        slope = (up - down) / 2e-5
        assert abs((np.asarray(grads[name], np.float64) * direction).sum() - slope) < 1e-4 * max(1, abs(slope)), name


def test_a_state_that_is_handed_on_makes_one_text_of_pieces():
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), inputs(0.3))
    whole, last = log_linear_attention(**arrays, form="recurrent")
    state, parts = jnp.zeros_like(last), []
    for a, b in ((0, 7), (7, 8), (8, 40), (40, T)):
        piece = {name: x[:, a:b] for name, x in arrays.items()}
        positions = jnp.broadcast_to(jnp.arange(a, b), (B, b - a))
        if b == 40:  # padding leaves the state as it is
            piece = {name: jnp.pad(x, ((0, 0), (0, 2)) + ((0, 0),) * (x.ndim - 2)) for name, x in piece.items()}
            positions = jnp.pad(positions, ((0, 0), (0, 2)), constant_values=-1)
        out, state = log_linear_attention(**piece, form="recurrent", initial_state=state, positions=positions)
        parts.append(out[:, : b - a])
    assert relative(jnp.concatenate(parts, 1), np.asarray(whole)) < 1e-6
    assert relative(state, np.asarray(last)) < 1e-6


@pytest.mark.parametrize("documents", [False, True])
def test_a_gate_may_forget_everything(documents):
    """Log decays of -inf, and small ones behind large ones. Positions count from where a text begins."""
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), inputs(0.3))
    log_decay = arrays["log_decay"].at[:, 5].set(-jnp.inf).at[:, 20:30].set(-15.0).at[:, 30:].multiply(1e-3)
    arrays["log_decay"] = log_decay
    segments = jnp.asarray(np.arange(T) // 30 * np.ones((B, 1), int)) if documents else None

    @functools.partial(jax.jit, static_argnames="form")
    def run(arrays, form):
        f = lambda a: log_linear_attention(**a, form=form, chunk=16, segment_ids=segments)[0]  # noqa: E731
        out, pull = jax.vjp(f, arrays)
        return out, pull(jnp.sin(jnp.arange(out.size)).reshape(out.shape))[0]

    (out, grads), (expected, slopes) = run(arrays, "chunked"), run(arrays, "recurrent")
    assert relative(out, np.asarray(expected)) < 2e-5
    for name in arrays:
        assert relative(grads[name], np.asarray(slopes[name])) < 1e-4, name
    if documents:
        tail = {name: x[:, 30:] for name, x in arrays.items()}
        assert relative(out[:, 30:], np.asarray(log_linear_attention(**tail, chunk=16)[0])) < 2e-5


def test_equal_weights_make_it_a_recurrence_with_one_state():
    from slm.attention import decay_attention

    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), inputs())
    arrays["level_scale"] = jnp.ones((B, T, H, L))
    out, _ = log_linear_attention(**arrays, chunk=16)
    del arrays["level_scale"]
    plain, _ = decay_attention(**arrays)
    assert relative(out, np.asarray(plain)) < 2e-5


@pytest.mark.parametrize(("changes", "message"), [
    ({"chunk": 12}, "chunk = 12: must be a power of two"),
    ({"form": "parallel"}, "form = 'parallel'"),
    ({"level_scale": jnp.ones((B, T, H, 3))}, "3 levels reach over 4 tokens, not over 53"),
    ({"initial_state": jnp.zeros((B, H, L, K, V))}, "begins where a text does"),
    ({"k": jnp.zeros((B, T, 1, K))}, r"k has shape .*, expected \(2, 53, 2, 4\)"),
    ({"positions": jnp.zeros((1, T), int)}, "positions has shape"),
])  # fmt: skip
def test_bad_requests(changes, message):
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), inputs()) | changes
    with pytest.raises(ValueError, match=message):
        log_linear_attention(**arrays)
