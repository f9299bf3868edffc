"""linear_attention against the parallel O(T^2) form in float64, in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import linear_attention, linear_attention_with_state
from slm.attention.features import FEATURE_MAPS

B, T, H, K, V = 2, 45, 2, 4, 6
CHUNK = 16  # T is no multiple
SEGMENTS = np.array([[0] * 7 + [1] * 20 + [5] * 18, [3] * 44 + [2]])


def taylor2(x):
    outer = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
    return np.concatenate([np.ones_like(x[..., :1]), x, outer / np.sqrt(2)], -1)


MAPS = {
    "elu1": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "identity": lambda x: x,
    "taylor2": taylor2,
}
KINDS = [("elu1", True, 1.0), ("elu1", False, 0.3), ("identity", False, K**-0.5), ("taylor2", True, K**-0.5)]


def features(name):
    """M."""
    return FEATURE_MAPS[name](np.zeros((1, K), np.float32)).shape[-1]


def inputs(name, normalize, seed=0):
    """q, k, v, initial_state, reset_state; states positive, so that their sums can normalise."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, H, size)) for size in (K, K, V))
    M = features(name)
    initial, reset = (np.abs(rng.normal(size=(*shape, M, V + normalize))) for shape in ((B, H), (H,)))
    return [x.astype(np.float32) for x in (q, k, v, initial, reset)]


def definition(name, normalize, scale, segments, q, k, v, initial=None, reset=None):
    """All weights at once. `initial` and `reset` only for maps whose packing is that of MAPS."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    phi_q, phi_k = MAPS[name](q * scale), MAPS[name](k)
    if normalize:
        v = np.concatenate([v, np.ones_like(v[..., :1])], -1)
    begins = np.concatenate([np.zeros((B, 1), bool), segments[:, 1:] != segments[:, :-1]], 1)
    document = np.cumsum(begins, 1)
    see = (document[:, :, None] == document[:, None, :]) & np.tril(np.ones((T, T), bool))
    out = np.einsum("BTHM,BSHM,BTS,BSHV->BTHV", phi_q, phi_k, see, v, optimize=True)
    last = document == document[:, -1:]
    state = np.einsum("BSHM,BS,BSHV->BHMV", phi_k, last, v, optimize=True)
    if initial is not None:
        first = document == 0
        begun = np.where(
            first[:, :, None, None, None],
            initial.astype(np.float64)[:, None],
            reset.astype(np.float64)[None, None],
        )
        out += np.einsum("BTHM,BTHMV->BTHV", phi_q, begun)
        state += begun[:, -1]
    if normalize:
        out = out[..., :-1] / out[..., -1:]
    return out, state


@functools.cache
def engine(name, normalize, scale, form):
    """Jitted (q, k, v, initial, reset) -> (out, state), and gradients of the sum of both times weights."""

    def run(q, k, v, initial, reset):
        return linear_attention_with_state(
            q, k, v, feature_map=name, normalize=normalize, scale=scale, form=form, chunk=CHUNK,
            initial_state=initial, reset_state=reset, segment_ids=jnp.asarray(SEGMENTS),
        )  # fmt: skip

    def loss(arguments, weights):
        return sum((x * w).sum() for x, w in zip(run(*arguments), weights))

    return jax.jit(run), jax.jit(jax.grad(loss))


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize(("name", "normalize", "scale"), KINDS)
def test_output_and_state_are_the_definition(name, normalize, scale, form):
    q, k, v, initial, reset = inputs(name, normalize)
    if name == "taylor2":  # packs what MAPS does not: states have another layout
        initial, reset = np.zeros_like(initial), np.zeros_like(reset)
        out, state = engine(name, normalize, scale, form)[0](q, k, v, initial, reset)
        assert relative(out, definition(name, normalize, scale, SEGMENTS, q, k, v)[0]) < 2e-5
        assert state.shape == (B, H, 1 + K + K * (K + 1) // 2, V + 1)
        return
    out, state = engine(name, normalize, scale, form)[0](q, k, v, initial, reset)
    expected = definition(name, normalize, scale, SEGMENTS, q, k, v, initial, reset)
    assert out.dtype == state.dtype == jnp.float32
    assert relative(out, expected[0]) < 2e-5
    assert relative(state, expected[1]) < 2e-5


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_gradients_are_those_of_the_definition(form):
    """Against central differences of the float64 form, in random directions of each input alone."""
    name, normalize, scale = "elu1", True, 1.0
    arguments = inputs(name, normalize)
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=(B, T, H, V)), rng.normal(size=(B, H, K, V + 1))]
    grads = engine(name, normalize, scale, form)[1](arguments, [w.astype(np.float32) for w in weights])

    def loss(arguments):
        results = definition(name, normalize, scale, SEGMENTS, *arguments)
        return sum((x * w).sum() for x, w in zip(results, weights))

    for i, grad in enumerate(grads):
        for _ in range(3):
            direction = rng.normal(size=grad.shape)
            step = [x.astype(np.float64) for x in arguments]
            ends = []
            for sign in (1, -1):
                moved = list(step)
                moved[i] = step[i] + sign * 1e-6 * direction
                ends.append(loss(moved))
            slope = (ends[0] - ends[1]) / 2e-6
            size = np.linalg.norm(np.asarray(grad, np.float64))  # of a typical directional derivative
            assert abs((np.asarray(grad, np.float64) * direction).sum() - slope) < 5e-5 * size, i


def test_split_anywhere_it_goes_on_from_its_state():
    q, k, v, *_ = inputs("elu1", True)
    whole, last = linear_attention_with_state(q, k, v, chunk=CHUNK)
    cut = 21
    first, state = linear_attention_with_state(q[:, :cut], k[:, :cut], v[:, :cut], chunk=CHUNK)
    second, state = linear_attention_with_state(
        q[:, cut:], k[:, cut:], v[:, cut:], initial_state=state, form="recurrent"
    )
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=2e-6)
    np.testing.assert_allclose(state, last, rtol=1e-5)
    np.testing.assert_array_equal(linear_attention(q, k, v, chunk=CHUNK), whole)


def test_functions_serve_as_maps_alone_and_in_pairs():
    q, k, v, *_ = inputs("elu1", True)
    by_name = linear_attention(q, k, v, feature_map="elu1", scale=0.5)
    np.testing.assert_array_equal(linear_attention(q, k, v, feature_map=FEATURE_MAPS["elu1"], scale=0.5), by_name)
    pair = (lambda q: FEATURE_MAPS["elu1"](q * 0.5), FEATURE_MAPS["elu1"])
    np.testing.assert_array_equal(linear_attention(q, k, v, feature_map=pair), by_name)
    swapped = linear_attention(q, k, v, feature_map=pair[::-1])
    assert np.abs(swapped - by_name).max() > 1e-2


def test_outputs_are_averages_of_values():
    """Numerator and denominator err alike, also with weights of any size."""
    q, k, v, *_ = inputs("elu1", True)
    constant = np.broadcast_to(v[:, :1], v.shape)
    np.testing.assert_allclose(linear_attention(q * 5 - 20, k * 5 - 8, constant), constant, rtol=1e-5)


def test_without_any_weight_the_output_is_zero_and_has_no_gradient():
    q, k, v, *_ = inputs("elu1", True)
    k[0, :9] = -np.abs(k[0, :9])

    def attend(q, k, v):
        return linear_attention(q, k, v, feature_map="relu")

    out, backward = jax.vjp(attend, q, k, v)
    np.testing.assert_array_equal(out[0, :9], 0)
    assert (np.asarray(out[1]) != 0).any(-1).any(-1)[3:].all()
    for grad in backward(jnp.ones_like(out)):
        assert np.isfinite(grad).all()
        np.testing.assert_array_equal(grad[0, :9] if grad.shape == q.shape else 0, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_errs_by_its_own_rounding(dtype):
    q, k, v, *_ = inputs("elu1", True)
    half = [jnp.asarray(x, dtype) for x in (q, k, v)]
    out, state = linear_attention_with_state(*half, chunk=CHUNK)
    assert out.dtype == dtype
    assert state.dtype == jnp.float32
    exact = definition("elu1", True, 1.0, np.zeros((B, T)), *(np.asarray(x, np.float64) for x in half))[0]
    assert relative(out.astype(jnp.float32), exact) < 3 * float(jnp.finfo(dtype).eps)
    many = linear_attention(half[0] + 60, half[1] + 60, half[2], chunk=CHUNK)  # sums beyond float16
    assert np.isfinite(many.astype(jnp.float32)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"feature_map": "softmax"}, "feature_map = 'softmax': .* elu1"), ({"form": "parallel"}, "form"),
     ({"initial_state": np.zeros((B, H, K, V))}, "initial_state has shape .* expected .* 7"),
     ({"v": np.zeros((B, T - 1, H, V))}, "shapes do not agree")],
)  # fmt: skip
def test_bad_arguments_are_refused(change, message):
    q, k, v, *_ = inputs("elu1", True)
    with pytest.raises(ValueError, match=message):
        linear_attention(**{"q": jnp.asarray(q), "k": jnp.asarray(k), "v": jnp.asarray(v)} | change)
