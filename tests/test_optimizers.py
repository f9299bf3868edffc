import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from slm.config import ModelConfig, OptimConfig
from slm.errors import ConfigError
from slm.models.transformer import Transformer
from slm.training import optimizers, rules
from slm.training.schedules import make_schedule

STEPS = 12
CONFIGS = {
    name: OptimConfig(
        name=name,
        learning_rate=0.05,
        warmup_steps=3,
        schedule="constant" if name == "schedule_free_adamw" else "cosine",
        b2=0.8,
    )
    for name in ("adamw", "lion", "adafactor", "muon", "schedule_free_adamw")
}
SHAPES = {
    "embed": {"embedding": (5, 4)},
    "blocks": {
        "0": {
            "attention_norm": {"scale": (3, 4)},
            "mixer": {"query": {"kernel": (3, 4, 6), "bias": (3, 6)}, "out": {"kernel": (3, 6, 4)}},
        }
    },
    "head": {"kernel": (4, 5)},
}
DECAYED = {"blocks/0/mixer/query/kernel", "blocks/0/mixer/out/kernel", "head/kernel"}


def tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    leaf = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def flat(params):
    return dict(zip(rules.paths(params), map(np.asarray, jax.tree.leaves(params))))


@functools.cache
def optimizer(cfg):
    """(init, jitted and donating update) over the tree of SHAPES."""
    tx = optimizers.make_optimizer(cfg, STEPS, jax.eval_shape(lambda: tree(0)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def run(cfg, steps=3):
    """Parameters after `steps` steps on gradients tree(1), tree(2), ..., from tree(0), and the state."""
    init, step = optimizer(cfg)
    params = tree(0)
    state = init(params)
    for t in range(steps):
        params, state = step(params, state, tree(t + 1))
    return params, state


def test_adamw_equals_its_definition():
    cfg = CONFIGS["adamw"]
    schedule, p, grads = make_schedule(cfg, STEPS), flat(tree(0)), [flat(tree(t + 1)) for t in range(3)]
    for path in p:
        m = v = 0
        for t, g in enumerate(g[path] for g in grads):
            m, v = cfg.b1 * m + (1 - cfg.b1) * g, cfg.b2 * v + (1 - cfg.b2) * g**2
            direction = m / (1 - cfg.b1 ** (t + 1)) / (np.sqrt(v / (1 - cfg.b2 ** (t + 1))) + cfg.eps)
            decay = cfg.weight_decay * p[path] if path in DECAYED else 0
            p[path] = p[path] - float(schedule(t)) * (direction + decay)
    assert_same(flat(run(cfg)[0]), p)


def test_lion_equals_its_definition():
    cfg = CONFIGS["lion"]
    schedule, p, grads = make_schedule(cfg, STEPS), flat(tree(0)), [flat(tree(t + 1)) for t in range(3)]
    for path in p:
        m = 0
        for t, g in enumerate(g[path] for g in grads):
            direction = np.sign(cfg.b1 * m + (1 - cfg.b1) * g)
            m = cfg.b2 * m + (1 - cfg.b2) * g
            decay = cfg.weight_decay * p[path] if path in DECAYED else 0
            p[path] = p[path] - float(schedule(t)) * (direction + decay)
    assert_same(flat(run(cfg)[0]), p)


def test_schedule_free_equals_its_definition_and_evaluates_the_average():
    cfg = CONFIGS["schedule_free_adamw"]
    schedule, grads = make_schedule(cfg, STEPS), [flat(tree(t + 1)) for t in range(3)]
    y, x = flat(tree(0)), {}
    for path in y:
        z = average = y[path]
        v = weights = 0
        for t, g in enumerate(g[path] for g in grads):
            rate = float(schedule(t))
            v = cfg.b2 * v + (1 - cfg.b2) * g**2
            decay = cfg.weight_decay * y[path] if path in DECAYED else 0
            z = z - rate * (g / (np.sqrt(v / (1 - cfg.b2 ** (t + 1))) + cfg.eps) + decay)
            weights += rate**2  # warm-up only rises, so the largest rate so far is this one
            average = average + rate**2 / weights * (z - average)
            y[path] = (1 - cfg.b1) * z + cfg.b1 * average
        x[path] = average
    params, state = run(cfg)
    assert_same(flat(params), y)
    evaluated = flat(jax.jit(functools.partial(optimizers.evaluation_params, cfg))(state, params))
    assert_same(evaluated, x)
    assert all(np.abs(evaluated[path] - y[path]).max() > 1e-4 for path in y)


def assert_same(params, expected):
    for path in expected:
        np.testing.assert_allclose(params[path], expected[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_evaluation_params_of_others_are_the_params():
    params = tree(0)
    assert optimizers.evaluation_params(CONFIGS["adamw"], None, params) is params


def test_muon_serves_the_matrices_of_the_table_and_adamw_the_rest():
    cfg = CONFIGS["muon"]
    params, state = run(cfg)
    assigned = flat(optimizers.assignments(cfg, tree(0))["optimizer"])
    assert {path for path, name in assigned.items() if name == "muon"} == DECAYED - {"head/kernel"}
    assert [str(name) for name in flat(optimizers.assignments(CONFIGS["lion"], tree(0))["optimizer"]).values()] == [
        "lion"
    ] * len(assigned)
    for half in ("muon", "adamw"):
        carried = [re.search(rf"/{half}/.*/mu/(.*)", path) for path in rules.paths(state)]
        assert {m[1] for m in carried if m} == {path for path, name in assigned.items() if name == half}
    params, adamw = flat(params), flat(run(CONFIGS["adamw"])[0])
    for path, name in assigned.items():
        assert np.array_equal(params[path], adamw[path]) == (name == "adamw"), path


def test_muon_on_a_stack_orthogonalises_each_layer():
    cfg = CONFIGS["muon"]
    make = functools.partial(optimizers.make_optimizer, cfg, STEPS)
    path = ("blocks", "0", "up", "kernel")
    nest = lambda x: {"embed": {"embedding": x[0]}, "blocks": {"0": {"up": {"kernel": x}}}}  # noqa: E731
    params = nest(jnp.zeros((3, 4, 8)))
    grads = nest(tree(1, (3, 4, 8)))

    @jax.jit
    def direction(params, grads):
        tx = make(params)
        return tx.update(grads, tx.init(params), params)[0]

    stacked = functools.reduce(lambda t, k: t[k], path, direction(params, grads))
    for n in range(3):
        one = jax.tree.map(lambda a, n=n: a[n : n + 1] if a.ndim == 3 else a, (params, grads))
        alone = functools.reduce(lambda t, k: t[k], path, direction(*one))[0]
        np.testing.assert_allclose(stacked[n], alone, rtol=1e-5, atol=1e-7)
        singular = np.linalg.svd(stacked[n], compute_uv=False) / (0.05 / 3 * 0.2 * 8**0.5)  # rate * rms * sqrt(fan)
        assert ((singular > 0.6) & (singular < 1.3)).all(), singular


def test_adafactor_factors_large_matrices_and_updates_a_stack_like_its_layers():
    cfg = CONFIGS["adafactor"]
    tx = optimizers._adafactor(cfg)
    grads = tree(1, (2, 128, 130))
    first_update = jax.jit(lambda grads: tx.update(grads, tx.init(grads), grads)[0])
    state = jax.eval_shape(tx.init, grads)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim) == [
        (1,), (2, 128), (2, 128, 130), (2, 130)
    ]  # fmt: skip
    np.testing.assert_allclose(first_update(grads)[1], first_update(grads[1]), rtol=1e-5)
    without_first_moment = jax.eval_shape(optimizers._adafactor(OptimConfig(b1=0.0)).init, grads)
    assert grads.shape not in [leaf.shape for leaf in jax.tree.leaves(without_first_moment)]


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_decay_moves_exactly_the_parameters_of_the_rule(name):
    init, step = optimizer(CONFIGS[name])
    before = flat(tree(0))
    after, _ = step(tree(0), init(tree(0)), jax.tree.map(jnp.zeros_like, tree(0)))
    rate = 0.05 / 3
    expected = {path: p * (1 - rate * 0.1 * (path in DECAYED)) for path, p in before.items()}
    assert_same(flat(after), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_update_reduces_a_quadratic_in_donated_buffers(name):
    init, step = optimizer(CONFIGS[name])
    params, state = tree(0), init(tree(0))
    loss = lambda params: sum(float(jnp.sum(p**2)) for p in jax.tree.leaves(params))  # noqa: E731
    start = loss(params)
    for _ in range(STEPS):
        # Adafactor's placeholders of one number are never read, so there is nothing to donate.
        old = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.size > 1]
        params, state = step(params, state, jax.tree.map(jnp.copy, params))
        assert all(leaf.is_deleted() for leaf in old)
    assert loss(params) < 0.8 * start


def test_state_is_abstract_first_float32_or_int32_and_survives_a_checkpoint(tmp_path):
    model = Transformer(ModelConfig(vocab_size=7, layers=3, width=8, heads=2, attention=("softmax", "window")))
    params = jax.eval_shape(model.init, jax.random.key(0))
    for cfg in CONFIGS.values():
        state = jax.eval_shape(optimizers.make_optimizer(cfg, STEPS, params).init, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}, cfg.name
    states = {name: run(cfg)[1] for name, cfg in CONFIGS.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", jax.eval_shape(lambda: states))
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    for path, before, after in zip(rules.paths(states), jax.tree.leaves(states), jax.tree.leaves(restored)):
        assert (before.dtype, before.tolist()) == (after.dtype, after.tolist()), path


def test_clipping_scales_by_the_float32_norm_and_leaves_broken_gradients_alone():
    grads = {"a": jnp.full((4,), 300.0, jnp.float16), "b": jnp.zeros(3)}  # 300^2 exceeds float16
    clipped, norm = jax.jit(optimizers.clip_by_global_norm, static_argnums=1)(grads, 1.0)
    assert norm.dtype == jnp.float32
    assert norm == 600.0
    np.testing.assert_allclose(clipped["a"], 0.5, rtol=1e-3)
    assert clipped["a"].dtype == jnp.float16
    for max_norm in (None, 1e4):
        same, norm = optimizers.clip_by_global_norm(grads, max_norm)
        assert norm == 600.0
        assert (same["a"] == grads["a"]).all()
    for bad in (jnp.inf, jnp.nan):
        broken = {"a": jnp.array([bad, 2.0]), "b": jnp.ones(3)}
        same, norm = optimizers.clip_by_global_norm(broken, 1.0)
        assert not jnp.isfinite(norm)
        np.testing.assert_array_equal(same["a"], broken["a"])
        np.testing.assert_array_equal(same["b"], broken["b"])
    with pytest.raises(ConfigError, match="clip_norm"):
        optimizers.clip_by_global_norm(grads, 0.0)


def test_settings_that_contradict_are_refused():
    with pytest.raises(ConfigError, match=r"optim.b1 = 0"):
        optimizers.make_optimizer(OptimConfig(name="schedule_free_adamw", schedule="constant", b1=0.0), 200, tree(0))
    with pytest.raises(ConfigError, match="matches none of the rules"):
        optimizers.make_optimizer(OptimConfig(), 200, {**tree(0), "mystery": jnp.zeros(2)})
