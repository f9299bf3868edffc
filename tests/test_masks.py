"""Masks in the train step: zeros that stay, schedules by their formulas, weights that move."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_batch import one_document

from slm.compress.masks import _due, mask_transform, sparsity_at
from slm.compress.sparsity import keep_highest, keep_masks
from slm.compression import PruneConfig, prune_end
from slm.config import DataConfig, Experiment, MeshConfig, ModelConfig, OptimConfig, TrainConfig, check, override
from slm.errors import ConfigError
from slm.models.counts import abstract_parameters
from slm.models.paths import flat
from slm.training import step
from slm.training.mesh import make_mesh
from slm.training.step import Techniques

B, T, V = 4, 12, 31
BASE = Experiment(
    model=ModelConfig(vocab_size=V, layers=2, width=16, heads=2, mlp_width=32),
    data=DataConfig(sequence_length=T),
    optim=OptimConfig(learning_rate=2e-2, warmup_steps=3, ema_decay=0.5, weight_decay=0.3),
    train=TrainConfig(steps=40, batch_size=B, loss_chunk=5),
    prune=PruneConfig(sparsity=0.5, begin_step=3, end_step=23, every=4),
)


def batch_of(i):
    rng = np.random.default_rng(i)
    tokens = rng.integers(0, V, (B, T + 1), dtype=np.int32)
    return one_document(tokens[:, :-1], (tokens[:, :-1] * 3 + 1) % V)


@functools.cache
def build(**changes):
    cfg = check(override(BASE, {name.replace("__", "."): value for name, value in changes.items()}))
    shapes = abstract_parameters(cfg.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiler_options", lambda platform: {})
        techniques = Techniques({"mask": mask_transform(cfg, shapes)})
        return cfg, step.build(cfg, make_mesh(MeshConfig(), jax.devices()[:1]), techniques)


def run(steps, **changes):
    """The states after each step, on the host."""
    cfg, program = build(**changes)
    state = program.init(jax.random.key(0))
    states = [jax.tree.map(np.array, state)]
    for i in range(steps):
        state, metrics = program.train(state, batch_of(i))
        assert np.isfinite(metrics["loss"])
        states.append(jax.tree.map(np.array, state))
    assert program.train._cache_size() == 1
    return cfg, states


def masks_of(state):
    return flat(state.extra.transforms["mask"]["masks"])


def zeros(state):
    return {name: 1 - mask.mean() for name, mask in masks_of(state).items()}


def test_zeros_stay_and_come_by_the_schedule():
    _, states = run(30)
    names = set(masks_of(states[0]))
    assert names == {f"blocks/0/mixer/{n}/kernel" for n in ("query", "key", "value", "out")} | {
        f"blocks/0/mlp/{n}/kernel" for n in ("gate", "up", "down")
    }
    asked = 0.0
    for done, state in enumerate(states):
        if done >= 3 and (done - 3) % 4 == 0 and done <= 23:
            asked = 0.5 * (1 - (1 - (done - 3) / 20) ** 3)
        for name, share in zeros(state).items():
            assert share == pytest.approx(asked, abs=0.5 / 256 + 1e-6), (done, name)
        params, moments = flat(state.params), flat(state.opt_state)
        for name, mask in masks_of(state).items():
            assert not params[name][~mask].any()
            followers = [leaf for path, leaf in moments.items() if path.endswith(name)]
            assert len(followers) == 2  # Adam's mean and variance
            assert not any(leaf[~mask].any() for leaf in followers)
            # By layer: each layer of the stack has its own share.
            assert np.ptp(mask.mean((1, 2))) < 2e-3
    assert asked == 0.5
    # What was never hidden is trained as ever, and a mask only grows.
    assert (states[-1].params["embed"]["embedding"] != states[0].params["embed"]["embedding"]).all()
    for before, after in itertools.pairwise(states):
        assert all((masks_of(before)[name] >= mask).all() for name, mask in masks_of(after).items())
    # The average is evaluated with the zeros.
    _, program = build()
    seen = flat(program.evaluation_params(jax.tree.map(jnp.asarray, states[-1])))
    average = flat(states[-1].ema)
    for name, mask in masks_of(states[-1]).items():
        assert not np.asarray(seen[name])[~mask].any()
        np.testing.assert_array_equal(np.asarray(seen[name])[mask], average[name][mask])


def test_the_smallest_weights_go():
    _, states = run(4, prune__schedule="one_shot", prune__begin_step=4, optim__weight_decay=0.0)
    for name, mask in masks_of(states[4]).items():
        # The step's own update came first; the survivors still have it.
        w = flat(states[4].params)[name]
        assert np.abs(w[mask]).min() > 0
        for layer_mask in mask:
            assert (~layer_mask).sum() == layer_mask.size // 2
    assert all(share == 0 for share in zeros(states[3]).values())


@pytest.mark.parametrize(("schedule", "at", "share"), [
    ("cubic", 13, 0.5 * (1 - 0.5**3)), ("iterative", 13, 0.25), ("ste", 13, 0.5 * (1 - 0.5**3)),
    ("one_shot", 13, 0.5), ("one_shot", 2, 0.0), ("cubic", 30, 0.5), ("rigl", 0, 0.5),
])  # fmt: skip
def test_schedules(schedule, at, share):
    prune = PruneConfig(sparsity=0.5, begin_step=0 if schedule == "rigl" else 3, end_step=23, schedule=schedule)
    assert sparsity_at(prune, 23, jnp.int32(at)) == pytest.approx(share)


def test_straight_through_masters_stay_dense_and_learn():
    _, states = run(26, prune__schedule="ste")
    mask = masks_of(states[23])["blocks/0/mlp/up/kernel"]
    before, after = (flat(states[i].params)["blocks/0/mlp/up/kernel"] for i in (23, 26))
    assert before[~mask].all()
    assert (before != after)[~mask].mean() > 0.9
    seen = build(prune__schedule="ste")[1].evaluation_params(jax.tree.map(jnp.asarray, states[23]))
    assert not np.asarray(flat(seen)["blocks/0/mlp/up/kernel"])[~mask].any()


@pytest.mark.parametrize("schedule", ["set", "rigl"])
def test_sparse_from_the_start_keeps_its_share_and_moves(schedule):
    _, states = run(25, prune__schedule=schedule, prune__sparsity=0.75, prune__begin_step=0)
    for state in states:
        assert all(share == pytest.approx(0.75, abs=1e-3) for share in zeros(state).values())
    moves = []
    for before, after in itertools.pairwise(states):
        old, new = masks_of(before), masks_of(after)
        grown = {name: new[name] & ~old[name] for name in new}
        moves.append(sum(g.sum() for g in grown.values()))
        if schedule == "rigl" and moves[-1]:
            # New connections begin at zero.
            assert all(not flat(after.params)[name][g].any() for name, g in grown.items())
    total = sum(mask.sum() for mask in masks_of(states[0]).values())
    changed = [i + 1 for i, moved in enumerate(moves) if moved]
    assert set(changed) <= {4, 8, 12, 16, 20}
    # A share of the active ones, falling by a cosine; a few come straight back.
    for done in changed:
        most = 0.3 / 2 * (1 + np.cos(np.pi * done / 23)) * total
        assert 0.5 * most < moves[done - 1] <= most + 14
    assert changed[:3] == [4, 8, 12]


def test_a_skipped_step_is_made_up_for():
    """float16 overflows at the very step at which masks are due: they come with the next."""
    _, program = build(train__precision="float16", prune__schedule="one_shot", prune__begin_step=2)
    state, shares = program.init(jax.random.key(0)), []
    for i in range(4):
        if i == 1:
            state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(1e38)))
        state, metrics = program.train(state, batch_of(i))
        shares.append(max(zeros(jax.tree.map(np.array, state)).values()))
        if i == 1:
            assert metrics["skipped_in_a_row"] == 1
            state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(1024)))
    assert shares == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize("schedule", ["cubic", "ste", "rigl"])
def test_masks_are_due_once_for_each_date(schedule):
    begin, dates = 0 if schedule == "rigl" else 3, []
    prune = PruneConfig(sparsity=0.5, begin_step=begin, end_step=20, every=4, schedule=schedule)
    for done in range(1, 40):
        if _due(prune, 20, jnp.int32(done - 1), jnp.int32(done)):
            dates.append(done)
    regular = [done for done in range(max(begin, 1), 21) if (done - begin) % 4 == 0]
    assert dates == {"cubic": [*regular, 20], "rigl": regular, "ste": [*regular, 20, 24, 28, 32, 36]}[schedule]
    # Whatever was skipped between.
    assert _due(prune, 20, jnp.int32(dates[0] - 1), jnp.int32(dates[0] + 2))
    assert not _due(prune, 20, jnp.int32(dates[0]), jnp.int32(dates[0] + 3))


def test_rigl_grows_where_gradients_are_large():
    cfg, program = build(prune__schedule="rigl", prune__sparsity=0.75, prune__begin_step=0)
    transform = mask_transform(cfg, program.state.params)
    params = program.init(jax.random.key(0)).params
    state = transform.init(params)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(5), p.shape), params)
    moving = step.Moving(jnp.int32(4), transform.apply(params, {}, state, 4), {}, grads, 0)
    new, _ = transform.update(state, moving)
    old, masks, g = flat(state["masks"]), flat(new["masks"]), flat(grads)
    for name, mask in masks.items():
        for layer in range(2):
            grown = mask[layer] & ~old[name][layer]
            left = ~mask[layer] & ~old[name][layer]
            size = jnp.abs(g[name][layer])
            assert size[grown].min() >= size[left].max()


def test_movement_keeps_what_grows():
    cfg, program = build(prune__criterion="movement")
    transform = mask_transform(cfg, program.state.params)
    params = program.init(jax.random.key(0)).params
    state = transform.init(params)
    # A gradient descent on p^2 for one half of the weights and on -p^2 for the others.
    sign = jax.tree.map(lambda p: jnp.where(jnp.arange(p.shape[-1]) % 2 == 0, 1.0, -1.0) * jnp.ones(p.shape), params)
    grads = jax.tree.map(lambda p, s: s * p, params, sign)
    for done in range(1, 24):
        state, _ = transform.update(state, step.Moving(jnp.int32(done), params, {}, grads, 0))
    for name, mask in flat(state["masks"]).items():
        np.testing.assert_array_equal(mask, flat(sign)[name] < 0)


def test_n_of_m_and_blocks():
    _, states = run(16, prune__pattern="2:4", prune__sparsity=0.0)
    # By the cubic schedule a quarter is due first, then half: one weight of each group after the other.
    for done, stay in ((6, 4), (7, 3), (10, 3), (11, 2), (16, 2)):
        for name, mask in masks_of(states[done]).items():
            groups = mask.reshape(mask.shape[0], -1, 4, mask.shape[-1]).sum(2)
            assert (groups == stay).all(), (name, done)
    _, states = run(8, prune__pattern="4x8", prune__schedule="one_shot", prune__begin_step=4)
    for mask in masks_of(states[8]).values():
        L, inputs, outputs = mask.shape
        blocks = mask.reshape(L, inputs // 4, 4, outputs // 8, 8).sum((2, 4))
        assert set(np.unique(blocks)) == {0, 32}


def test_masks_by_scope():
    rng = np.random.default_rng(0)
    scores = {"a": jnp.asarray(rng.random((2, 8, 6))), "b": jnp.asarray(10 + rng.random((2, 4, 4)))}
    by_output = keep_masks(scores, 0.25, "output")
    assert all((mask.sum(-2) == mask.shape[-2] * 3 // 4).all() for mask in by_output.values())
    by_layer = keep_masks(scores, 0.25, "layer")
    assert all((mask.sum((-1, -2)) == mask[0].size * 3 // 4).all() for mask in by_layer.values())
    for score, mask in zip(scores["a"], by_layer["a"]):
        assert score[~mask].max() < score[mask].min()
    everywhere = keep_masks(scores, 0.25, "global")
    assert everywhere["b"].all()
    assert (~everywhere["a"]).sum() == 32
    # Of equals, exactly as many go as are asked for.
    assert keep_masks({"a": jnp.zeros((1, 8, 8))}, 0.5)["a"].sum() == 32


@pytest.mark.parametrize(("changes", "message"), [
    ({"prune.sparsity": 1.0}, "prune.sparsity = 1.0: must be at least 0 and below 1"),
    ({"prune.begin_step": 23}, "prune.end_step = 23 must lie behind prune.begin_step = 23"),
    ({"prune.end_step": 99}, "not behind train.steps = 40"),
    ({"prune.criterion": "wanda"}, "set prune.schedule = one_shot"),
    ({"prune.pattern": "2of4"}, "prune.pattern = '2of4'"),
    ({"prune.pattern": "2:4"}, "prune.sparsity = 0.5: prune.pattern = 2:4 has a share"),
    ({"prune.pattern": "2:4", "prune.sparsity": 0.0, "prune.scope": "output"}, "prune.scope = output: .* leave"),
    ({"prune.schedule": "rigl"}, "from step 0"),
    ({"prune.criterion": "taylor", "prune.schedule": "one_shot", "prune.begin_step": 0}, "needs gradients"),
    ({"optim.name": "schedule_free_adamw", "optim.schedule": "constant", "optim.ema_decay": None}, "schedule_free"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(override(BASE, changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"prune.skip": (".*/missing/kernel",)}, "prune.skip = '.*/missing/kernel' matches no matrix"),
    ({"prune.skip": (".*",)}, "leaves no matrix"),
    ({"prune.pattern": "2:5", "prune.sparsity": 0.0}, "the 16 inputs of blocks/0/mixer/.* are not divisible by 5"),
    ({"prune.pattern": "16x32"}, "prune.pattern = 16x32 does not divide"),
])  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(changes, message):
    cfg = check(override(BASE, changes))
    with pytest.raises(ConfigError, match=message):
        mask_transform(cfg, abstract_parameters(cfg.model))


def test_the_end_is_three_quarters_of_the_run():
    assert prune_end(override(BASE, {"prune.end_step": None})) == 30


@pytest.mark.parametrize("shape", [(3, 1000), (2, 3, 257), (9,), (5, 4), (8,)])
def test_the_lowest_go_and_of_equals_the_first(shape):
    """Against a stable sort of NumPy: negative scores, zeros of both signs, infinities, many equals."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=shape).astype(np.float32)
    signs = np.where(rng.random(shape) < 0.5, -0.0, 0.0).astype(np.float32)
    far = np.where(rng.random(shape) < 0.2, np.inf, -plain).astype(np.float32)
    for scores in (plain, np.round(plain), signs, far):
        for sparsity in (0.0, 0.1, 0.5, 0.77, 1.0):
            order = np.argsort(scores, -1, kind="stable")
            want = np.ones(shape, bool)
            np.put_along_axis(want, order[..., : round(sparsity * shape[-1])], False, -1)
            np.testing.assert_array_equal(jax.jit(keep_highest)(scores, sparsity), want)
