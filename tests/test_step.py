"""The train step against formulas written out here: accumulation, precision, averages, donation, one trace."""

import collections
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from slm.config import DataConfig, Experiment, MeshConfig, ModelConfig, OptimConfig, TrainConfig, override
from slm.models.layers import lookup
from slm.models.transformer import Transformer
from slm.training import precision, step
from slm.training.mesh import make_mesh
from slm.training.schedules import make_schedule
from slm.training.state import LossScale

B, T, V, STEPS = 4, 12, 31, 60
BASE = Experiment(
    model=ModelConfig(vocab_size=V, layers=2, width=16, heads=2),
    data=DataConfig(sequence_length=T),
    optim=OptimConfig(learning_rate=2e-2, warmup_steps=3, ema_decay=0.5),
    train=TrainConfig(steps=STEPS, batch_size=B, loss_chunk=5),
)


TRACES = collections.Counter()
"""Times that the step of each Experiment was traced."""


@functools.cache
def program(**changes):
    """The program of BASE with `section__field=value` changed, on one device."""
    cfg = override(BASE, {name.replace("__", "."): value for name, value in changes.items()})
    make = step.make_train_step

    def make_counting(transformer, optimizer, cfg, *techniques):
        function = make(transformer, optimizer, cfg, *techniques)

        def train_step(state, batch):
            TRACES[cfg] += 1
            return function(state, batch)

        return train_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", make_counting)
        # Options that make a step faster make its compilation slower, which is the cost here.
        patch.setattr(step, "compiler_options", lambda platform: {})
        return step.build(cfg, make_mesh(MeshConfig(), jax.devices()[:1]))


def start(program):
    return program.init(jax.random.key(0))


def make_batch(seed=0):
    """Rows of two documents and padding; weights so uneven that no two micro-batches weigh alike."""
    rng = np.random.default_rng(seed)
    at = np.arange(T)
    ends = [(5, 12), (12, 12), (3, 7), (1, 2)]  # of the documents in each row; padding behind
    segment_ids = np.stack([np.where(at < a, 1, np.where(at < b, 2, 0)) for a, b in ends])
    positions = np.stack([np.where(at < a, at, np.where(at < b, at - a, 0)) for a, b in ends])
    scored = rng.random((B, T)) < np.array([0.9, 0.3, 1.0, 0.5])[:, None]
    scored[3] = at == 0  # one lonely target in the last row
    return {
        "tokens": rng.integers(0, V, (B, T), dtype=np.int32),
        "targets": rng.integers(0, V, (B, T), dtype=np.int32),
        "weights": ((segment_ids > 0) & scored).astype(np.float32),
        "segment_ids": segment_ids.astype(np.int32),
        "positions": positions.astype(np.int32),
    }


def copy(tree):
    """On the host, out of reach of donation."""
    return jax.tree.map(np.array, tree)


def assert_trees(compare, one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        compare(a, b, err_msg=jax.tree_util.keystr(path))


assert_equal = functools.partial(assert_trees, np.testing.assert_array_equal)


def mean_loss(params, batch, segments):
    """The textbook loss of the whole batch, on full logits."""
    model = Transformer(BASE.model)
    hidden, _ = model.hidden(
        params, batch["tokens"], segment_ids=batch["segment_ids"] if segments else None, positions=batch["positions"]
    )
    log_p = jax.nn.log_softmax(model.logits(params, hidden))
    nats = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    return (nats * batch["weights"]).sum() / batch["weights"].sum()


@functools.cache
def reference(packing):
    params, batch = start(program()).params, make_batch()
    return jax.jit(jax.value_and_grad(mean_loss), static_argnums=2)(params, batch, packing == "documents")


@pytest.mark.parametrize(
    ("accumulation", "packing", "clip_norm"),
    [(1, "documents", None), (2, "documents", None), (4, "documents", 0.1), (4, "stream", None)],
)
def test_accumulated_gradients_are_those_of_the_whole_ragged_batch(accumulation, packing, clip_norm):
    """With the optimizer p - g the step shows its gradients."""
    changes = {"train.accumulation": accumulation, "data.packing": packing, "optim.clip_norm": clip_norm}
    cfg = override(BASE, changes)
    sgd = optax.sgd(1.0)
    params = start(program()).params
    state = start(program()).replace(opt_state=sgd.init(params))
    new, metrics = jax.jit(step.make_train_step(program().transformer, sgd, cfg))(state, make_batch())
    loss, expected = reference(packing)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(expected)))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert clip_norm is None or norm > 2 * clip_norm
    shown = jax.tree.map(lambda p, q: p - q, params, new.params)
    expected = jax.tree.map(lambda g: g * (1 if clip_norm is None else clip_norm / norm), expected)
    assert_trees(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), shown, expected)


def test_documents_and_uneven_micro_batches_matter_in_these_tests():
    assert abs(reference("documents")[0] - reference("stream")[0]) > 1e-4
    batch = make_batch()
    parts = [{name: array[i::4] for name, array in batch.items()} for i in range(4)]
    loss = jax.jit(mean_loss, static_argnums=2)
    micro = [float(loss(start(program()).params, part, True)) for part in parts]
    assert abs(np.mean(micro) - reference("documents")[0]) > 1e-2


def test_metrics_are_sums_divided_once():
    state, batch = start(program()), make_batch()
    scores = copy(program().evaluate(state.params, batch))
    weights, schedule = batch["weights"], make_schedule(BASE.optim, STEPS)
    for i in range(3):
        state, metrics = program().train(state, batch)
        assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")}
        assert all(m.shape == () for m in metrics.values())
        np.testing.assert_allclose(metrics["loss"], (scores["nats"] * weights).sum() / weights.sum(), rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], (scores["correct"] * weights).sum() / weights.sum(), rtol=1e-5)
        assert metrics["tokens"] == weights.sum()
        np.testing.assert_allclose(metrics["learning_rate"], schedule(i), rtol=1e-6)
        assert state.step == i + 1
        scores = copy(program().evaluate(state.params, batch))


def test_targets_of_weight_0_do_not_exist():
    batch = make_batch()
    assert 0 < batch["weights"].mean() < 0.6
    changed = copy(batch)
    unscored, padding = batch["weights"] == 0, batch["segment_ids"] == 0
    changed["targets"][unscored] = (batch["targets"][unscored] + 7) % V
    changed["tokens"][padding] = (batch["tokens"][padding] + 7) % V
    changed["positions"][padding] = 3
    one, metrics = program().train(start(program()), batch)
    other, same = program().train(start(program()), changed)
    assert_equal(one, other)
    assert_equal(metrics, same)
    scored = copy(batch)
    scored["targets"][~unscored] = (batch["targets"][~unscored] + 7) % V
    assert program().train(start(program()), scored)[1]["loss"] != metrics["loss"]


def test_a_batch_without_targets_changes_nothing_but_by_decay():
    batch = make_batch() | {"weights": np.zeros((B, T), np.float32)}
    old = copy(start(program()).params)
    state, metrics = program().train(start(program()), batch)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens"] == 0
    assert_equal(old["embed"], copy(state.params["embed"]))  # which is not decayed
    chex.assert_tree_all_finite(state.params)


def test_overfits_one_batch():
    state, batch = start(program()), make_batch()
    losses = []
    for _ in range(STEPS):
        state, metrics = program().train(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 3
    assert losses[-1] < 0.1
    assert metrics["accuracy"] == 1


def test_average_follows_its_formula_and_is_what_is_evaluated():
    state, batch = start(program()), make_batch()
    assert_equal(copy(state.params), copy(state.ema))
    average = copy(state.ema)
    decays = []
    for i in range(12):
        state, _ = program().train(state, batch)
        decays.append(min(0.5, (1 + i) / (10 + i)))
        average = jax.tree.map(lambda e, p, d=decays[-1]: d * e + (1 - d) * np.asarray(p), average, state.params)
    assert decays[0] == 0.1
    assert decays.count(0.5) > 1
    assert_trees(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), average, copy(state.ema))
    assert_equal(copy(program().evaluation_params(state)), copy(state.ema))
    assert np.abs(state.ema["embed"]["embedding"] - state.params["embed"]["embedding"]).max() > 1e-3
    plain = dataclasses.replace(state, ema=None)
    assert_equal(copy(program(optim__ema_decay=None).evaluation_params(plain)), copy(state.params))


def test_one_trace_serves_five_steps():
    state = start(program())
    for seed in range(5):
        state, _ = program().train(state, make_batch(seed))
    assert state.step == 5
    assert TRACES[BASE] == 1
    program().train.trace(state, jax.tree.map(lambda x: x[:2], make_batch()))
    assert TRACES[BASE] == 2  # the counter counts


def test_abstract_values_are_the_real_ones():
    state, batch = start(program()), make_batch()
    for abstract, real in ((program().state, state), (program().batch, batch)):
        assert_trees(lambda a, b, err_msg: chex.assert_equal(a.dtype, b.dtype), abstract, real)
        chex.assert_trees_all_equal_shapes(abstract, real)
    assert {leaf.sharding.is_equivalent_to(SingleDeviceSharding(jax.devices()[0]), leaf.ndim)
            for leaf in jax.tree.leaves(state)} == {True}  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_old_state_is_donated(name):
    chosen = program() if name == "adamw" else program(optim__name=name)
    old = start(chosen)
    new, _ = chosen.train(old, make_batch())
    jax.block_until_ready(new)
    leaves = jax.tree_util.tree_leaves_with_path(old)
    # Adafactor keeps placeholders of one element for what it does not factor; XLA may not reuse all of those.
    kept = [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.size > 1 and not leaf.is_deleted()]
    assert not kept
    assert sum(leaf.size > 1 for _, leaf in leaves) > 30
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_z_loss_moves_the_gradient_but_not_the_reported_loss():
    batch = make_batch()
    state, plain = program().train(start(program()), batch)
    squared = program(train__z_loss=1.0)
    moved, metrics = squared.train(start(squared), batch)
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)
    assert metrics["accuracy"] == plain["accuracy"]
    assert abs(metrics["grad_norm"] / plain["grad_norm"] - 1) > 0.01
    assert np.abs(moved.params["embed"]["embedding"] - state.params["embed"]["embedding"]).max() > 1e-3


def test_bfloat16_computes_short_and_keeps_float32_masters():
    half = program(train__precision="bfloat16")
    batch, state = make_batch(), start(half)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
    full_loss = program().train(start(program()), batch)[1]["loss"]
    losses = []
    for _ in range(STEPS):
        state, metrics = half.train(state, batch)
        losses.append(float(metrics["loss"]))
    assert 0 < abs(losses[0] / full_loss - 1) < 0.01
    assert losses[-1] < 0.2
    floats = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}
    embedding = state.params["embed"]["embedding"]
    assert (embedding.astype(jnp.bfloat16) != embedding).mean() > 0.9  # masters hold what bfloat16 cannot
    assert types_of_logits(half) == {"bfloat16"}
    assert types_of_logits(program()) == {"float32"}


def products(jaxpr):
    """The operands of each matrix product, at all levels of a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [atom.aval for atom in equation.invars]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            yield from products(inner) if hasattr(inner, "eqns") else ()


def types(made):
    """(types of the operands, whether one has the vocabulary's size) of each product of the step."""
    found = products(made.train.trace(made.state, made.batch).jaxpr.jaxpr)
    return [(tuple(str(a.dtype) for a in pair), any(V in a.shape for a in pair)) for pair in found]


def types_of_logits(made):
    return {name for pair, logits in types(made) if logits for name in pair}


@functools.cache
def learned(precision):
    """(last state, losses) on chains in which each token but one in five tells the next."""
    made, losses = program(train__precision=precision), []
    state = start(made)
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
        for t in range(T):
            tokens[:, t + 1] = np.where(rng.random(B) < 0.8, (tokens[:, t] * 3 + 1) % V, tokens[:, t + 1])
        batch = make_batch() | {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        batch |= {"weights": np.ones((B, T), np.float32), "segment_ids": np.ones((B, T), np.int32)}
        state, metrics = made.train(state, batch)
        losses.append(float(metrics["loss"]))
    assert made.train._cache_size() == 1
    return state, np.array(losses)


@pytest.mark.parametrize(("precision", "within"), [("bfloat16", 0.01), ("fp8", 0.03)])
def test_short_compute_learns_what_float32_learns(precision, within):
    state, losses = learned(precision)
    full = learned("float32")[1]
    assert full[-10:].mean() < full[0] - 1
    assert losses[-10:].mean() == pytest.approx(full[-10:].mean(), rel=within)
    assert (losses != full).all()
    floats = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}


def test_fp8_is_in_the_products_of_layers_in_training_and_nowhere_else():
    made, state = program(train__precision="fp8"), learned("fp8")[0]
    assert types_of_logits(made) == {"bfloat16"}
    short = collections.Counter(pair for pair, _ in types(made) if "float8" in str(pair))
    # Seven matrices in a layer, each once forward and twice backward.
    assert sum(short.values()) == 21, short
    assert short["float8_e4m3fn", "float8_e4m3fn"] == 7
    assert short["float8_e5m2", "float8_e4m3fn"] + short["float8_e4m3fn", "float8_e5m2"] == 14
    # Whoever evaluates has the model of a bfloat16 run, to the bit.
    nats = [program(train__precision=name).evaluate(state.params, make_batch())["nats"] for name in ("fp8", "bfloat16")]
    assert np.array_equal(*nats)


def test_float16_skips_steps_that_overflow_and_goes_on():
    half = program(train__precision="float16")
    batch, state = make_batch(), start(half)
    full_loss = program().train(start(program()), batch)[1]["loss"]
    state, metrics = half.train(state, batch)
    np.testing.assert_allclose(metrics["loss"], full_loss, rtol=1e-2)
    assert (metrics["skipped"], metrics["loss_scale"]) == (0, 2.0**15)

    # The scale divided by the batch's weight exceeds what float16 holds.
    largest = LossScale(jnp.float32(precision.LARGEST), jnp.int32(5), jnp.int32(0), jnp.int32(0))
    state = jax.device_put(state.replace(loss_scale=largest), jax.tree.map(lambda a: a.sharding, half.state))
    before, skipped = copy((state.params, state.opt_state)), 0
    while True:
        state, metrics = half.train(state, batch)
        if metrics["skipped_in_a_row"] == 0:
            break
        skipped += 1
        assert_equal(copy((state.params, state.opt_state)), before)
        assert not np.isfinite(metrics["grad_norm"])
        np.testing.assert_allclose(metrics["loss"], full_loss, rtol=0.1)
        assert metrics["skipped"] == metrics["skipped_in_a_row"] == skipped
        assert metrics["loss_scale"] == precision.LARGEST / 2**skipped
        assert state.loss_scale.good_steps == 0
        assert state.step == 1 + skipped
        assert skipped < 20
    assert skipped >= 1
    # The optimizer and its schedule count only what was done.
    np.testing.assert_allclose(metrics["learning_rate"], make_schedule(BASE.optim, STEPS)(1), rtol=1e-6)
    first = float(metrics["loss"])
    for _ in range(40):
        state, metrics = half.train(state, batch)
    assert state.step == 1 + skipped + 1 + 40
    assert metrics["loss"] < first / 3
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_a_frequent_tokens_embedding_gradient_survives_bfloat16():
    """Thousands of contributions to one row: summed in bfloat16, most of them would be rounded away."""
    table = jax.random.normal(jax.random.key(0), (5, 8))
    tokens = jnp.zeros(4096, jnp.int32).at[::100].set(3)
    d_rows = jnp.ones((4096, 8)) / 64

    def gradient(dtype):
        return jax.grad(lambda t: (lookup(t.astype(dtype), tokens) * d_rows.astype(dtype)).sum().astype(float))(table)

    np.testing.assert_allclose(gradient(jnp.bfloat16), gradient(jnp.float32), rtol=0.01)
