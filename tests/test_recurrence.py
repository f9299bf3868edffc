"""Diagonal-decay recurrences: both forms against the definition in numpy float64, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import chunks, decay_attention

B, T, H, K, V = 2, 77, 4, 6, 5
DOCUMENTS = np.stack([np.repeat([3, 1, 2, 9], [20, 1, 30, 26]), np.repeat([0, 4], [33, 44])])
NAMES = ("q", "k", "v", "log_decay", "initial_state", "reset_state")


def inputs(per="head", decays="soft", groups=H, length=T, seed=0):
    """Float64 arrays by name; `per` head, channel or none (no decay)."""
    rng = np.random.default_rng(seed)
    shape = {"head": (B, length, H), "channel": (B, length, H, K), "none": None}[per]
    arrays = {
        "q": rng.normal(size=(B, length, groups, K)),
        "k": rng.normal(size=(B, length, groups, K)),
        "v": rng.normal(size=(B, length, H, V)),
        "initial_state": rng.normal(size=(B, H, K, V)),
        "reset_state": rng.normal(size=(H, K, V)),
    }
    if shape:
        u = rng.random(shape)
        # mixed: from 0 to -15, hard and soft side by side
        arrays["log_decay"] = {"soft": -u / 16, "mixed": -15 * u**6, "hard": -15 * np.ones(shape), "no": 0 * u}[decays]
    return arrays


def definition(q, k, v, log_decay=None, initial_state=None, reset_state=None, segment_ids=None, scale=None):
    """(out, final state) in float64."""
    length, R = v.shape[1], v.shape[2] // q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = np.repeat(q, R, 2), np.repeat(k, R, 2)
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state.copy()
    outs = []
    for t in range(length):
        for b in range(B):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                S[b] = 0 if reset_state is None else reset_state
        if log_decay is not None:
            S = np.exp(log_decay[:, t]).reshape(B, H, -1, 1) * S
        S = S + k[:, t, :, :, None] * v[:, t, :, None]
        outs.append(scale * np.einsum("bhk,bhkv->bhv", q[:, t], S))
    return np.stack(outs, 1), S


def weights(arrays):
    """Of a scalar of the outputs whose gradient is taken."""
    rng = np.random.default_rng(9)
    return rng.normal(size=arrays["v"].shape), rng.normal(size=(B, H, K, V))


@functools.cache
def jitted(form, chunk, documents, names):
    segment_ids = DOCUMENTS if documents else None

    def loss(arrays, weights):
        out, state = decay_attention(
            **{"log_decay": None} | arrays, form=form, chunk=chunk, segment_ids=segment_ids, scale=0.7
        )
        return (out * weights[0]).sum() + (state * weights[1]).sum(), (out, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(arrays, form="chunked", chunk=16, documents=False):
    """((out, state), gradients by name) in float32."""
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (arrays, weights(arrays)))
    (_, outs), grads = jitted(form, chunk, documents, tuple(arrays))(*low)
    return outs, grads


def assert_near(actual, expected, tolerance):
    """Relative to the largest value."""
    for path, one in jax.tree_util.tree_leaves_with_path(actual):
        other = dict(jax.tree_util.tree_leaves_with_path(expected))[path]
        assert np.isfinite(one).all(), path
        error = np.abs(np.asarray(one) - other).max() / np.abs(other).max()
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize("per", ["head", "channel", "none"])
def test_the_recurrent_form_is_the_definition(per):
    arrays = inputs(per, "mixed", groups=2)
    outs, _ = run(arrays, "recurrent", documents=True)
    assert_near(outs, definition(**arrays, segment_ids=DOCUMENTS, scale=0.7), 2e-5)


def test_gradients_of_the_recurrent_form_are_those_of_the_definition():
    """By differences in a random direction of each argument."""
    arrays = inputs("channel", "mixed", groups=2)
    _, grads = run(arrays, "recurrent", documents=True)
    w_out, w_state = weights(arrays)
    rng = np.random.default_rng(5)

    def loss(arrays):
        out, state = definition(**arrays, segment_ids=DOCUMENTS, scale=0.7)
        return (out * w_out).sum() + (state * w_state).sum()

    for name in NAMES:
        direction, step = rng.normal(size=arrays[name].shape), 1e-5
        up, down = (loss(arrays | {name: arrays[name] + sign * step * direction}) for sign in (1, -1))
        size = np.linalg.norm(grads[name]) * np.linalg.norm(direction)
        assert abs((up - down) / (2 * step) - (np.asarray(grads[name]) * direction).sum()) < 1e-5 * size, name


@pytest.mark.parametrize(
    ("per", "decays", "groups", "documents", "at_once"),
    [
        ("head", "soft", H, False, 1),
        ("head", "mixed", 2, True, 2),  # three blocks of two chunks, of which the last is padding
        ("head", "hard", H, False, 8),
        ("channel", "soft", H, False, 1),
        ("channel", "mixed", 2, True, 2),
        ("channel", "hard", H, False, 8),
        ("channel", "no", H, False, 1),
        ("none", "", 1, True, 1),
        ("none", "", H, False, 2),
    ],
)
def test_the_chunked_form_is_the_recurrent_one(monkeypatch, per, decays, groups, documents, at_once):
    """Outputs, final state and all gradients; T is no multiple of the chunk, K is not V."""
    monkeypatch.setattr(chunks, "_at_once", lambda size: at_once)
    jitted.cache_clear()
    arrays = inputs(per, decays, groups)
    if not documents:
        del arrays["reset_state"]
    outs, grads = run(arrays, documents=documents)
    _, same_grads = run(arrays, "recurrent", documents=documents)
    segment_ids = DOCUMENTS if documents else None
    assert_near(outs, definition(**arrays, segment_ids=segment_ids, scale=0.7), 2e-5)
    assert_near(grads, jax.tree.map(np.asarray, same_grads), 5e-5)


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
@pytest.mark.parametrize("per", ["head", "channel"])
def test_the_chunk_does_not_matter(per, chunk):
    arrays = inputs(per, "mixed", length=21)
    low = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    outs = jax.jit(functools.partial(decay_attention, chunk=chunk, scale=0.7))(**low)
    assert_near(outs, definition(**arrays | {"reset_state": None}, scale=0.7), 2e-5)


@pytest.mark.parametrize("per", ["head", "channel"])
def test_hard_decays_over_many_tokens_are_exact(per):
    """200 steps of -15 and, among them, ones that keep all: e^-3000 is 0 here, and nothing divides by it."""
    arrays = inputs(per, "hard", length=200)
    del arrays["reset_state"]
    arrays["log_decay"][:, ::7] = -1e-3
    outs, grads = run(arrays, chunk=64)
    assert_near(outs, definition(**arrays, scale=0.7), 2e-6)
    _, same_grads = run(arrays, "recurrent")
    assert_near(grads, jax.tree.map(np.asarray, same_grads), 5e-6)


@pytest.mark.parametrize("per", ["head", "channel"])
def test_a_log_decay_of_minus_infinity_forgets_everything(per):
    arrays = inputs(per, "soft")
    starts = np.diff(DOCUMENTS, axis=1, prepend=DOCUMENTS[:, :1]) != 0
    del arrays["reset_state"]
    expected = definition(**arrays, segment_ids=DOCUMENTS, scale=0.7)
    arrays["log_decay"][starts] = -np.inf
    for form in ("chunked", "recurrent"):
        outs, grads = run(arrays, form)
        assert_near(outs, expected, 2e-5)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert (np.asarray(grads["log_decay"])[starts] == 0).all()


def test_a_document_has_no_part_in_another_to_the_bit():
    """Nor in its gradients, those of decays included."""
    arrays = inputs("head", "soft", length=40)
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {n: arrays[n] for n in ("q", "k", "v", "log_decay")})
    segment_ids = np.where(np.arange(40) < 18, 1, 2)[None].repeat(B, 0)

    @jax.jit
    def second(arrays):
        return jax.vjp(lambda a: decay_attention(**a, chunk=16, segment_ids=segment_ids)[0][:, 18:], arrays)

    out, pull = second(low)
    for g in jax.tree.leaves(pull(jnp.ones_like(out))):
        assert (g[:, :18] == 0).all()
        assert (g[:, 20:] != 0).any()
    other = jax.tree.map(lambda x: x.at[:, :18].multiply(0.5), low)
    np.testing.assert_array_equal(second(other)[0], out)


@pytest.mark.parametrize("per", ["head", "channel"])
def test_low_precision_is_only_that_of_the_inputs(per):
    """bfloat16 in and out; a sum of 4096 ones in bfloat16 would stay at 256."""
    length = 4096
    ones = jnp.ones((1, length, 1, 1), jnp.bfloat16)
    log_decay = jnp.zeros((1, length, 1) + ((1,) if per == "channel" else ()), jnp.bfloat16)
    out, state = jax.jit(decay_attention)(ones, ones, ones, log_decay)
    assert out.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert state.item() == length
    np.testing.assert_allclose(np.asarray(out, np.float32).ravel(), np.arange(1, length + 1), rtol=2**-8)


@pytest.mark.parametrize("per", ["head", "channel"])
def test_what_is_kept_for_the_backward_pass_is_inputs_and_chunk_states(monkeypatch, per):
    monkeypatch.setattr(chunks, "_at_once", lambda size: 1)

    def kept(length, chunk):
        like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        q, v = like(1, length, 2, 32), like(1, length, 2, 48)
        log_decay = like(1, length, 2, 32) if per == "channel" else like(1, length, 2)
        given = (q, q, v, log_decay)
        pull = jax.eval_shape(lambda *a: jax.vjp(functools.partial(decay_attention, chunk=chunk), *a)[1], *given)
        return sum(x.size for x in jax.tree.leaves(pull)) - sum(x.size for x in given)

    state, constants = 2 * 32 * 48, 100
    for chunk in (32, 64):
        assert 0 <= kept(4096, chunk) - 4096 // chunk * state < constants


def test_requests_that_make_no_sense_are_refused():
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in inputs(length=4).items()}
    del arrays["reset_state"]
    for change, message in [
        ({"q": arrays["q"][:, :3]}, "shapes do not agree"),
        ({"q": arrays["q"][:, :, :3], "k": arrays["k"][:, :, :3]}, "G dividing H"),
        ({"log_decay": arrays["log_decay"][..., None]}, "log_decay has shape"),
        ({"initial_state": arrays["initial_state"][0]}, "initial_state has shape"),
        ({"segment_ids": np.zeros(4)}, "segment_ids has shape"),
        ({"reset_state": arrays["initial_state"]}, "reset_state has shape"),
        ({"form": "parallel"}, "form = 'parallel'"),
        ({"chunk": 0}, "chunk = 0"),
        ({"implementation": "pallas", "form": "recurrent"}, "chunked form only"),
        ({"implementation": "cudnn"}, "implementation = 'cudnn'"),
    ]:
        with pytest.raises(ValueError, match=message):
            decay_attention(**arrays | change)
