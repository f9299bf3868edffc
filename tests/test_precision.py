"""Loss scaling, by its formulas and in float16 runs that need it; why master weights are float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_batch import one_document

from slm.config import DataConfig, Experiment, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from slm.training import precision, step
from slm.training.mesh import make_mesh
from slm.training.objective import Objective, plain_objective
from slm.training.optimizers import make_optimizer
from slm.training.state import LossScale

B, T, V, STEPS, SPIKE = 8, 16, 29, 60, 40
CFG = Experiment(
    model=ModelConfig(vocab_size=V, layers=2, width=32, heads=2, mlp_width=64),
    data=DataConfig(sequence_length=T, packing="stream"),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=3, schedule="constant", ema_decay=0.9),
    train=TrainConfig(steps=STEPS, batch_size=B, precision="float16"),
)


def scale_of(scale, good=0, skipped=0, row=0):
    return LossScale(jnp.float32(scale), jnp.int32(good), jnp.int32(skipped), jnp.int32(row))


def values(loss_scale):
    return tuple(float(x) for x in jax.tree.leaves(loss_scale))


def test_cast_touches_matrices_only():
    params = {"embed": {"embedding": jnp.ones(2)}, "mixer": {"query": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}},
              "decay": jnp.ones(2), "norm": {"scale": jnp.ones(2)}}  # fmt: skip
    out = precision.cast(params, precision.compute_dtype("bfloat16"))
    assert out["embed"]["embedding"].dtype == out["mixer"]["query"]["kernel"].dtype == jnp.bfloat16
    assert {out["mixer"]["query"]["bias"].dtype, out["decay"].dtype, out["norm"]["scale"].dtype} == {
        np.dtype("float32")
    }
    assert precision.compute_dtype("float32") == jnp.float32
    assert precision.compute_dtype("float16") == jnp.float16


def test_scaling_saves_a_gradient_that_underflows_in_float16():
    def loss(w, loss_scale):
        y = (w.astype(jnp.float16) * jnp.float16(1e-4)).astype(jnp.float32)
        return y * 1e-5 * loss_scale.scale

    # The cotangent 1e-5 is a subnormal float16, and 1e-9 is none at all.
    plain = jax.grad(loss)(jnp.float32(1), scale_of(1))
    scaled = precision.unscale(jax.grad(loss)(jnp.float32(1), scale_of(2.0**15)), scale_of(2.0**15))
    assert plain == 0
    np.testing.assert_allclose(scaled, 1e-9, rtol=2e-3)


def test_all_finite_sees_one_bad_element():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    assert precision.all_finite(tree)
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        assert not precision.all_finite({**tree, "a": tree["a"].at[1, 2].set(bad)})


def test_update_grows_halves_and_counts_within_its_bounds():
    update = jax.jit(precision.update)
    n = precision.GROW_AFTER
    assert values(update(scale_of(8, good=5, skipped=2, row=2), True)) == (8, 6, 2, 0)
    assert values(update(scale_of(8, good=n - 2), True)) == (8, n - 1, 0, 0)
    assert values(update(scale_of(8, good=n - 1), True)) == (16, 0, 0, 0)
    assert values(update(scale_of(2.0**24, good=n - 1), True)) == (2.0**24, 0, 0, 0)
    assert values(update(scale_of(8, good=n - 1, skipped=2, row=1), False)) == (4, 0, 3, 2)
    assert values(update(scale_of(1), False)) == (1, 0, 1, 1)
    before, after = LossScale.create(), update(LossScale.create(), True)
    assert [x.dtype for x in jax.tree.leaves(before)] == [x.dtype for x in jax.tree.leaves(after)]


def test_stuck_only_after_the_smallest_scale_has_failed_ten_times():
    update = jax.jit(precision.update)
    loss_scale, failures_at_smallest = scale_of(2.0**24), 0
    while loss_scale.skipped_in_a_row < precision.STUCK_AFTER:
        failures_at_smallest += float(loss_scale.scale) == precision.SMALLEST
        loss_scale = update(loss_scale, False)
    assert failures_at_smallest == 10
    assert update(loss_scale, True).skipped_in_a_row == 0


def batch_of(i):
    """Chains in which each token but one in five tells the next."""
    rng = np.random.default_rng(i)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    told = rng.random((B, T + 1)) < 0.8
    for t in range(T):
        tokens[:, t + 1] = np.where(told[:, t + 1], (tokens[:, t] * 3 + 1) % V, tokens[:, t + 1])
    return one_document(tokens[:, :-1], tokens[:, 1:])


@functools.cache
def faint():
    """The program of a loss times 1e-5, and times 1e9 in one step; with a number that the objective learns."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    plain = plain_objective(step.make_transformer(CFG, mesh), CFG)

    def apply(params, learned, batch, teacher, step):
        value, sums = plain.apply(params, {}, batch, teacher, step)
        return (value + (learned["gain"] - 1) ** 2) * jnp.where(step == SPIKE, 1e9, 1e-5), sums

    objective = Objective(lambda key: {"gain": jnp.zeros(())}, apply)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiler_options", lambda platform: {})
        return step.build(CFG, mesh, step.Techniques(objective=objective))


@functools.cache
def run(scale):
    """(states on the host by step, metrics of each step) of a run whose loss scale begins at `scale`."""
    made = faint()
    state = made.init(jax.random.key(0)).replace(loss_scale=scale_of(scale))
    state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, made.state))
    states, rows = {}, []
    for i in range(STEPS):
        state, metrics = made.train(state, batch_of(i))
        rows.append({name: float(value) for name, value in metrics.items()})
        if i + 1 in (1, SPIKE, SPIKE + 1, STEPS):
            states[i + 1] = jax.tree.map(np.array, state)
    assert made.train._cache_size() == 1
    return states, rows


def test_faint_gradients_vanish_in_float16_and_are_saved_by_the_loss_scale():
    zeros, losses = {}, {}
    for scale in (1, 2.0**15):  # a scale of 1 is none, and would grow after GROW_AFTER steps only
        states, rows = run(scale)
        moments = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(states[1].opt_state[0].mu)])
        zeros[scale], losses[scale] = (moments == 0).mean(), np.mean([row["loss"] for row in rows[-10:]])
    assert zeros[1] > 0.5
    assert zeros[2.0**15] < 0.05
    assert losses[1] - losses[2.0**15] > 0.3


def test_one_spike_costs_one_step_and_moves_nothing_else():
    states, rows = run(2.0**15)
    before, after, last = states[SPIKE], states[SPIKE + 1], states[STEPS]
    assert [i for i, row in enumerate(rows) if row["skipped_in_a_row"]] == [SPIKE]
    assert rows[-1]["skipped"] == 1
    assert rows[SPIKE]["loss_scale"] == rows[-1]["loss_scale"] == rows[SPIKE - 1]["loss_scale"] / 2
    for name in ("params", "opt_state", "ema", "extra"):
        one, other = (jax.tree_util.tree_leaves_with_path(getattr(state, name)) for state in (before, after))
        assert len(one) == len(other) > 0
        for (path, a), (_, b) in zip(one, other, strict=True):
            assert np.array_equal(a, b), name + jax.tree_util.keystr(path)
    assert after.step == before.step + 1
    assert 0 < before.extra.learned["objective"]["gain"] < last.extra.learned["objective"]["gain"]
    assert (before.ema["embed"]["embedding"] != last.ema["embed"]["embedding"]).all()
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-10:]) < np.mean(losses[SPIKE - 10 : SPIKE])


def test_weights_kept_in_bfloat16_would_not_move():
    """Why masters are float32: an update below half the spacing of bfloat16's numbers is rounded away, every time."""
    key = jax.random.key(0)
    start = {"up": {"kernel": 0.02 * jax.random.normal(key, (2, 32, 64))}, "norm": {"scale": jnp.ones((2, 32))}}
    slow = OptimConfig(learning_rate=1e-5, warmup_steps=0, schedule="constant", weight_decay=0)
    optimizer = make_optimizer(slow, 100, start)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), start)

    @jax.jit
    def update(params, state):
        updates, state = optimizer.update(jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), state, params)
        return optax.apply_updates(params, updates), state

    moved = {}
    for dtype in ("float32", "bfloat16"):
        params = first = jax.tree.map(lambda p, t=dtype: p.astype(t), start)
        state = optimizer.init(params)
        for _ in range(100):
            params, state = update(params, state)
        moved[dtype] = jax.tree.map(lambda a, b: float((a != b).mean()), first, params)
    assert moved["float32"]["up"]["kernel"] > 0.99
    assert moved["bfloat16"]["up"]["kernel"] < 0.3
    assert (moved["float32"]["norm"]["scale"], moved["bfloat16"]["norm"]["scale"]) == (1, 0)
