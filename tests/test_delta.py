"""The delta rule: both forms against a float64 token loop with hand-written gradients, forwards and backwards."""

import functools

import delta_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_reference import relative

from slm.attention import delta_attention, dplr_attention
from slm.attention.triangular import inverse_unit_lower

B, T, H, K, V = 2, 37, 2, 8, 6
GATES = ("none", "scalar", "channel")
FORMS = ("recurrent", "chunked")


def request(gate, T=T, seed=0, hard=None, norm=1.0, beta=None, documents=True):
    """Keyword arguments of the engine, and what the output and the final state are multiplied with."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    k = normal(B, T, H, K) + 1.5 * normal(B, 1, H, K) * (norm > 1)  # long keys are correlated ones too
    arrays = {
        "q": normal(B, T, H, K),
        "k": norm * k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(B, T, H, V),
        "beta": rng.uniform(0, 2, (B, T, H)).astype(np.float32) if beta is None else np.full((B, T, H), beta, "f"),
        "initial_state": normal(B, H, K, V),
        "reset_state": normal(H, K, V),
    }
    if gate != "none":
        shape = (B, T, H) if gate == "scalar" else (B, T, H, K)
        arrays["log_decay"] = -rng.uniform(0, 1, shape).astype(np.float32)
        if hard is not None:
            arrays["log_decay"][rng.uniform(size=shape) < hard] = -15.0
    segment_ids = np.zeros((B, T), int)
    if documents:  # three in one chunk of 16; one that begins where a chunk does
        segment_ids[0] = np.searchsorted([3, 4, 11, 30], np.arange(T), "right")
        segment_ids[1] = 7 - np.searchsorted([16], np.arange(T), "right")
    return arrays, segment_ids, (normal(B, T, H, V), normal(B, H, K, V))


@functools.cache
def engine(function, form, chunk):
    """Compiled: (arrays, segment_ids, weights) -> ((out, final state), gradients by name)."""

    def loss(arrays, segment_ids, weights):
        results = function(**arrays, segment_ids=segment_ids, form=form, chunk=chunk)
        return sum((x * w).sum() for x, w in zip(results, weights)), results

    def run(*args):
        gradients, results = jax.grad(loss, has_aux=True)(*args)
        return results, gradients

    return jax.jit(run)


@functools.cache
def forward(form, chunk=16):
    return jax.jit(functools.partial(delta_attention, form=form, chunk=chunk))


def expected(arrays, segment_ids, weights):
    arrays = {"log_decay": None} | {name: x.astype(np.float64) for name, x in arrays.items()}
    out, state, gradients = reference.delta(
        **arrays, segment_ids=segment_ids, scale=None, d_out=weights[0], d_final=weights[1]
    )
    return (out, state), gradients


def assert_exact(arrays, segment_ids, weights, form, chunk, outputs=2e-5, gradients=5e-5):
    results, found = engine(delta_attention, form, chunk)(arrays, segment_ids, weights)
    true_results, true_gradients = expected(arrays, segment_ids, weights)
    for name, ours, true in zip(("out", "state"), results, true_results):
        assert relative(ours, true) < outputs, name
    assert set(found) == set(true_gradients)
    for name in found:
        assert relative(found[name], true_gradients[name]) < gradients, name


def test_the_references_gradients_are_finite_differences():
    arrays, segment_ids, weights = request("channel", T=7)
    segment_ids = segment_ids.copy()
    segment_ids[:, 5:] += 100
    arrays = {name: x.astype(np.float64) for name, x in arrays.items()}
    gradients = expected(arrays, segment_ids, weights)[1]
    for name in arrays:
        direction = np.random.default_rng(1).standard_normal(arrays[name].shape)
        ends = [
            sum((x * w).sum() for x, w in zip(expected(arrays | {name: moved}, segment_ids, weights)[0], weights))
            for moved in (arrays[name] + 1e-6 * direction, arrays[name] - 1e-6 * direction)
        ]
        assert np.isclose((ends[0] - ends[1]) / 2e-6, (gradients[name] * direction).sum(), rtol=1e-7), name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", FORMS)
def test_output_state_and_gradients(form, gate):
    assert_exact(*request(gate), form=form, chunk=16)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_strong_decay_is_exact_over_hundreds_of_tokens(gate):
    soft, segment_ids, weights = request(gate, T=200, hard=0.3, beta=2.0, documents=False)
    assert_exact(soft, segment_ids, weights, form="chunked", chunk=64, gradients=2e-4)
    # Gradients of the decay are as small as exp(-15) here, and still exact relative to themselves.
    all_hard = soft | {"log_decay": np.full_like(soft["log_decay"], -15.0)}
    assert_exact(all_hard, segment_ids, weights, form="chunked", chunk=64, gradients=2e-4)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_small_decays_stay_exact_behind_huge_ones_in_a_chunk(gate):
    arrays, segment_ids, weights = request(gate, T=64, documents=False)
    arrays["log_decay"][:, :40] = -100.0
    (out, state), _ = expected(arrays, segment_ids, weights)
    ours = forward("chunked", 64)(**arrays, segment_ids=segment_ids)
    assert relative(ours[0], out) < 2e-6
    assert relative(ours[1], state) < 2e-6


def test_minus_infinity_forgets_and_everything_stays_finite():
    arrays, segment_ids, weights = request("channel", T=200, documents=False)
    arrays["log_decay"] = np.where(arrays["log_decay"] < -0.8, -np.inf, arrays["log_decay"])
    assert_exact(arrays, segment_ids, weights, form="chunked", chunk=64, gradients=2e-4)


def test_long_correlated_keys_that_make_the_state_explode():
    arrays, segment_ids, weights = request("none", T=20, norm=3.0, beta=2.0, documents=False)
    assert np.abs(expected(arrays, segment_ids, weights)[0][0]).max() > 1e15
    assert_exact(arrays, segment_ids, weights, form="chunked", chunk=32)


def test_chunks_of_any_size_and_sequences_of_any_length_agree():
    for T, chunk in ((1, 64), (3, 64), (21, 5)):
        arrays, segment_ids, _ = request("scalar", T=T)
        ours, other = (forward(form, chunk)(**arrays, segment_ids=segment_ids) for form in FORMS)
        for x, y in zip(ours, other):
            assert relative(x, np.asarray(y, np.float64)) < 2e-5, (T, chunk)


def test_defaults_are_zeros_and_the_inverse_root_of_the_key_size():
    arrays, *_ = request("none", T=5)
    tokens = {name: arrays[name] for name in ("q", "k", "v", "beta")}
    zeros = jnp.zeros((B, H, K, V))
    for form in FORMS:
        plain = forward(form)(**tokens)
        spelled = forward(form)(**tokens, scale=K**-0.5, initial_state=zeros, log_decay=jnp.zeros((B, 5, H)))
        for ours, other in zip(plain, spelled):
            np.testing.assert_allclose(ours, other, atol=1e-6)


def test_split_anywhere_and_token_by_token():
    arrays, *_ = request("channel", documents=False)
    del arrays["reset_state"]
    whole, final = forward("chunked")(**arrays)
    state, outs = arrays.pop("initial_state"), []
    for start, stop, form in ((0, 21, "chunked"), (21, 22, "recurrent"), (22, 23, "recurrent"), (23, T, "chunked")):
        part = {name: x[:, start:stop] for name, x in arrays.items()}
        out, state = forward(form)(**part, initial_state=state)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=2e-5)
    np.testing.assert_allclose(state, final, atol=2e-5)


@pytest.mark.parametrize("gate", GATES)
def test_the_future_changes_no_bit_also_inside_a_chunk(gate):
    arrays, segment_ids, weights = request(gate, documents=False)
    run = engine(delta_attention, "chunked", 16)
    before = run(arrays, segment_ids, weights)[0][0]
    for t in (9, 20):
        changed = {name: x.copy() for name, x in arrays.items()}
        for name in changed.keys() - {"initial_state", "reset_state"}:
            changed[name][:, t:] *= 0.5
        after = run(changed, segment_ids, weights)[0][0]
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any()


def test_half_precision_inputs_accumulate_in_float32():
    arrays, segment_ids, weights = request("channel")
    half = {n: jnp.asarray(x, jnp.bfloat16) if n in ("q", "k", "v") else x for n, x in arrays.items()}
    rounded = {n: np.asarray(x, np.float64) for n, x in half.items()}
    (out, state), _ = expected(rounded, segment_ids, weights)
    for form in FORMS:
        ours = forward(form)(**half, segment_ids=segment_ids)
        assert (ours[0].dtype, ours[1].dtype) == (jnp.bfloat16, jnp.float32)
        assert relative(ours[0], out) < 5e-3  # that of rounding the output
        assert relative(ours[1], state) < 2e-5


def test_per_channel_decay_is_a_case_of_the_general_form():
    arrays, segment_ids, weights = request("channel")
    beta = arrays["beta"][..., None]
    general = {name: arrays[name] for name in ("q", "v", "log_decay", "initial_state", "reset_state")} | {
        "k": beta * arrays["k"],
        "a": np.exp(arrays["log_decay"]) * arrays["k"],
        "b": -beta * arrays["k"],
    }
    ours = engine(delta_attention, "chunked", 16)(arrays, segment_ids, weights)
    other = engine(dplr_attention, "chunked", 16)(general, segment_ids, weights)
    for x, y in zip(ours[0], other[0]):
        assert relative(x, np.asarray(y, np.float64)) < 2e-5
    for name in ("q", "v", "initial_state", "reset_state"):
        assert relative(ours[1][name], np.asarray(other[1][name], np.float64)) < 5e-5, name


@pytest.mark.parametrize("gate", GATES)
def test_backward_keeps_states_of_chunks_not_of_tokens(gate):
    K, chunk = 64, 64

    def floats(T):
        """(kept for the backward pass, of which inputs)"""
        arrays = {name: jax.ShapeDtypeStruct((1, T, 1, K), jnp.float32) for name in ("q", "k", "v")}
        arrays["beta"] = jax.ShapeDtypeStruct((1, T, 1), jnp.float32)
        if gate != "none":
            arrays["log_decay"] = jax.ShapeDtypeStruct((1, T, 1) if gate == "scalar" else (1, T, 1, K), jnp.float32)
        kept = jax.eval_shape(lambda x: jax.vjp(lambda x: delta_attention(**x, chunk=chunk), x)[1], arrays)
        return np.array([sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (kept, arrays)])

    kept, inputs = floats(2048) - floats(1024)
    states, inverses, values = 1024 // chunk * K * K, 1024 * chunk, 1024 * K
    assert kept <= inputs + states + inverses + values


def test_triangular_systems_that_a_power_series_cannot_solve():
    rng = np.random.default_rng(0)
    for size in (1, 4, 8, 64):
        lower = np.tril(rng.standard_normal((3, size, size)), -1).astype(np.float32)
        if size > 1:
            lower[0] = np.tril(np.full((size, size), 2.0), -1)  # beta = 2 and one key again and again
        true = np.linalg.inv(np.eye(size) + lower.astype(np.float64))
        found = jax.jit(inverse_unit_lower)(lower)
        for ours, exact in zip(found, true):
            assert relative(ours, exact) < 2e-5
        assert not np.triu(found, 1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((B, T, 1, K))}, "shapes do not agree"),
        ({"beta": np.zeros((B, T))}, "beta has shape"),
        ({"log_decay": np.zeros((B, T))}, "log_decay has shape"),
        ({"initial_state": np.zeros((H, K, V))}, "initial_state has shape"),
        ({"reset_state": np.zeros((H, V, K))}, "reset_state has shape"),
        ({"segment_ids": np.zeros((B, T + 1))}, "segment_ids has shape"),
        ({"form": "parallel"}, "must be recurrent or chunked"),
        ({"chunk": 0}, "at least 1"),
        ({"implementation": "pallas", "form": "recurrent"}, "chunked form only"),
        ({"implementation": "cudnn"}, "must be auto, xla or pallas"),
    ],
)
def test_requests_that_cannot_be_served(change, message):
    arrays, *_ = request("scalar")
    with pytest.raises(ValueError, match=message):
        delta_attention(**arrays | change)
