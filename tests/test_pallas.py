"""The kernels are interpreted here, in the forms for TPU and for GPU, and lowered for both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from slm.attention import decay_attention, delta_attention, dplr_attention, sparse_attention
from slm.attention.pallas import sequence
from slm.attention.patterns import causal, dilated, full, global_tokens, window

B, T, G, H, K, V = 2, 41, 1, 2, 8, 12


@functools.cache
def arrays():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def unit(*shape):
        x = normal(*shape)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return {
        "q": normal(B, T, H, K),
        "k": unit(B, T, H, K),
        "v": normal(B, T, H, V),
        "a": -unit(B, T, H, K),
        "b": 0.5 * unit(B, T, H, K),
        "beta": 2 * jax.nn.sigmoid(normal(B, T, H)),
        # Hard ones among them, and ones that forget everything.
        "scalar": jnp.where(rng.random((B, T, H)) < 0.1, -jnp.inf, -15.0 * rng.random((B, T, H)) ** 4),
        "channel": jnp.asarray(-15.0 * rng.random((B, T, H, K)) ** 4, jnp.float32),
        "initial_state": normal(B, H, K, V),
        "reset_state": normal(H, K, V),
        "segment_ids": jnp.array([[0] * 5 + [1] * 17 + [2] * 19, [0] * 16 + [3] * 25]),
    }


def take(*names, **renamed):
    return {name: arrays()[name] for name in names} | {name: arrays()[source] for name, source in renamed.items()}


def states():
    return take("initial_state", "reset_state", "segment_ids")


def grouped(**sizes):
    """Fewer heads of queries and keys (decay), or of keys and values (softmax)."""
    return {name: arrays()[name][:, :, :size] for name, size in sizes.items()}


CASES = {
    "decay": (decay_attention, lambda: states() | grouped(q=G, k=G, v=H) | take(log_decay="scalar"), {"chunk": 16}),
    "no decay": (decay_attention, lambda: take("q", "k", "v") | {"log_decay": None}, {}),
    "delta": (delta_attention, lambda: take("q", "k", "v", "beta"), {"chunk": 16}),
    "gated delta": (
        delta_attention,
        lambda: states() | take("q", "k", "v", "beta", log_decay="scalar"),
        {"chunk": 16},
    ),
    "dplr": (dplr_attention, lambda: take("q", "k", "v", "a", "b", log_decay="channel"), {"chunk": 16}),
    "sparse": (
        sparse_attention,
        lambda: grouped(q=H, k=G, v=G) | take("segment_ids"),
        {"pattern": causal & (window(5) | global_tokens(2)), "block": 16, "softcap": 2.0},
    ),
    "dilated": (sparse_attention, lambda: grouped(q=H, k=G, v=G), {"pattern": dilated(3, 2), "block": 16}),
    "rows without keys": (
        sparse_attention,
        lambda: take("q", "k", "v"),
        {"pattern": ~full | (causal & global_tokens(3) & ~window(20)), "block": 16},
    ),
}


def close(ours, theirs, limit):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(x - y).max() <= limit * np.abs(y).max()


def served(case, implementation):
    """(function of its float arrays, these)."""
    function, make, options = CASES[case]
    arguments = make()
    floats = {n: x for n, x in arguments.items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {n: x for n, x in arguments.items() if n not in floats}
    return (lambda floats: function(**floats, **rest, **options, implementation=implementation)), floats


@functools.cache
def xla(case):
    function, floats = served(case, "xla")
    return jax.jit(function)(floats)


@pytest.mark.parametrize("launch", ["_as_grid", "_as_loop"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_xla(case, launch, monkeypatch):
    monkeypatch.setattr(sequence, "_as_grid", getattr(sequence, launch))
    function, floats = served(case, "pallas")
    assert "pallas_call" in str(jax.make_jaxpr(function)(floats))
    close(jax.jit(function)(floats), xla(case), 2e-5)


@pytest.mark.parametrize("case", ["decay", "delta", "sparse"])
def test_gradients_are_those_of_xla(case):
    def gradients(implementation):
        function, floats = served(case, implementation)
        return jax.jit(jax.grad(lambda x: sum((y**2).sum() for y in jax.tree.leaves(function(x)))))(floats)

    # That of -inf is nothing to ask for, but it must not spoil the others.
    ours, theirs = gradients("pallas"), gradients("xla")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ours))
    close(ours, theirs, 5e-5)


@pytest.mark.parametrize("launch", ["_as_grid", "_as_loop"])
def test_values_beyond_one_block(launch, monkeypatch):
    """Two programs share the values of a head."""
    monkeypatch.setattr(sequence, "_as_grid", getattr(sequence, launch))
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 20, 1, 4)), jnp.float32) for _ in range(2))
    v = jnp.asarray(rng.normal(size=(1, 20, 1, 140)), jnp.float32)

    def run(implementation):
        return jax.jit(lambda *x: decay_attention(*x, None, chunk=16, implementation=implementation))(q, k, v)

    close(run("pallas"), run("xla"), 2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", ["no decay", "sparse"])
def test_half_types(case, dtype):
    def run(implementation):
        function, floats = served(case, implementation)
        return jax.jit(function)({name: x.astype(dtype) for name, x in floats.items()})

    ours, theirs = run("pallas"), run("xla")
    assert [x.dtype for x in jax.tree.leaves(ours)] == [x.dtype for x in jax.tree.leaves(theirs)]
    close(*(jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (ours, theirs)), 1e-2)


@pytest.mark.parametrize(
    ("backend", "platform", "kind"), [("tpu", "tpu", "TPU v5 lite"), ("gpu", "cuda", "NVIDIA H100 80GB HBM3")]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", ["decay", "gated delta", "sparse"])
def test_lowers_for_accelerators(case, dtype, backend, platform, kind, monkeypatch):
    function, floats = served(case, "pallas")
    floats = {name: x.astype(dtype) for name, x in floats.items()}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    device = AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, backend))
    with use_abstract_mesh(device):
        # A function of its own, since what is traced depends on the backend.
        lowered = jax.jit(lambda x: function(x)).trace(floats).lower(lowering_platforms=(platform,))
    assert ("tpu_custom_call" if backend == "tpu" else "triton") in lowered.as_text()


@pytest.mark.parametrize(
    ("function", "arguments", "options", "message"),
    [
        (decay_attention, ("q", "k", "v"), {"log_decay": np.zeros((B, T, H, K))}, "not one a channel: use xla"),
        (decay_attention, ("q", "k", "v"), {"log_decay": None, "form": "recurrent"}, "chunked form only"),
        (delta_attention, ("q", "k", "v", "beta"), {"form": "recurrent"}, "chunked form only"),
        (sparse_attention, ("q", "k", "v"), {"pattern": causal, "block": 24}, "a power of two, 16 at least"),
        (
            sparse_attention,
            ("q", "k", "v", "segment_ids"),
            {"pattern": causal & global_tokens(2), "positions": np.zeros((B, T), int)},
            "positions inside of documents",
        ),
    ],
)
def test_requests_that_cannot_be_served(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(**take(*arguments), **options, implementation="pallas")


def test_auto_is_not_pallas():
    function, floats = served("decay", "auto")
    assert "pallas_call" not in str(jax.make_jaxpr(function)(floats))
