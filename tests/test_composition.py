"""Techniques in one step, pair by pair: each keeps its own promise beside every other, and the loss falls."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_batch import one_document

from slm.compress.distill import distill_objective
from slm.compress.techniques import transforms_of
from slm.config import (
    DataConfig,
    Experiment,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    check,
    override,
)
from slm.models.paths import flat, nested
from slm.models.transformer import Transformer
from slm.training import step
from slm.training.mesh import make_mesh
from slm.training.step import Techniques
from slm.training.transforms import ParamTransform, replaced

B, T, V, STEPS = 8, 16, 29, 30
BASE = Experiment(
    model=ModelConfig(vocab_size=V, layers=2, width=32, heads=2, mlp_width=64),
    data=DataConfig(sequence_length=T),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=3, schedule="constant"),
    train=TrainConfig(steps=STEPS, batch_size=B, loss_chunk=5),
)
TEACHER = Transformer(ModelConfig(vocab_size=V, layers=3, width=16, heads=2))
TECHNIQUES = {
    "distill": {"distill.cached": "made here", "distill.alpha": 0.5},
    "prune": {"prune.sparsity": 0.5, "prune.begin_step": 2, "prune.end_step": 20, "prune.every": 3},
    "quantize": {"quantize.scheme": "int4", "quantize.group_size": 16},
    "lsq": {"quantize.scheme": "int4", "quantize.method": "lsq"},
    "adapter": {},
    "float16": {"train.precision": "float16"},
    "bfloat16": {"train.precision": "bfloat16"},
    "accumulation": {"train.accumulation": 2},
    "fp8": {"train.precision": "fp8"},
}
EXCLUDE_EACH_OTHER = [{"quantize", "lsq"}, {"float16", "bfloat16"}]
PAIRS = [
    pair for pair in itertools.combinations(TECHNIQUES, 2) if set(pair) not in EXCLUDE_EACH_OTHER and "fp8" not in pair
]  # fmt: skip
# fp8 changes nothing but products, so all that it may meet meets it at once; quantize refuses it.
PAIRS.append(("distill", "prune", "adapter", "accumulation", "fp8"))


def low_rank(rank=2):
    """W + A B, what an adapter will be (LoRA, Hu et al. 2022): only A and B train."""

    def learn(params):
        pairs = {}
        for name, w in flat(params).items():
            if name.startswith("blocks") and name.endswith("kernel"):
                L, inputs, outputs = w.shape
                pairs[f"{name}/a"] = 0.1 * jax.random.normal(jax.random.key(len(pairs)), (L, inputs, rank))
                pairs[f"{name}/b"] = jnp.zeros((L, rank, outputs))
        return nested(pairs)

    def apply(params, learned, state, step):
        pairs, leaves = flat(learned), flat(params)
        names = {name.rsplit("/", 1)[0] for name in pairs}
        return replaced(params, {n: leaves[n] + pairs[f"{n}/a"] @ pairs[f"{n}/b"] for n in names})

    return ParamTransform(lambda params: {}, apply, learn=learn, freezes=True)


def batch_of(i):
    """A chain of tokens, each a function of the one before."""
    rng = np.random.default_rng(i)
    tokens = np.zeros((B, T + 1), np.int32)
    tokens[:, 0] = rng.integers(0, V, B)
    for t in range(T):
        tokens[:, t + 1] = (tokens[:, t] * 3 + 1) % V
    return one_document(tokens[:, :-1], tokens[:, 1:], rng.random((B, T)) < 0.8)


@functools.cache
def program(names):
    changes = functools.reduce(lambda a, b: a | b, (TECHNIQUES[name] for name in names), {})
    cfg = check(override(BASE, changes))
    transforms = transforms_of(cfg)
    if "adapter" in names:
        transforms["adapter"] = low_rank()
    student = Transformer(cfg.model, step.precision.compute_dtype(cfg.train.precision))
    distills = "distill" in names
    techniques = Techniques(
        transforms,
        distill_objective(cfg, student, TEACHER) if distills else None,
        jax.eval_shape(TEACHER.init, jax.random.key(9)) if distills else None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiler_options", lambda platform: {})
        return step.build(cfg, make_mesh(MeshConfig(), jax.devices()[:1]), techniques)


@functools.cache
def run(names):
    """(state before, state after, metrics of all steps), on the host."""
    made = program(names)
    state = made.init(jax.random.key(0))
    first = jax.tree.map(np.array, state)
    teacher = (TEACHER.init(jax.random.key(9)),) if "distill" in names else ()
    rows = []
    for i in range(STEPS):
        state, metrics = made.train(state, batch_of(i), *teacher)
        rows.append({name: float(value) for name, value in metrics.items()})
    assert made.train._cache_size() == 1
    return first, jax.tree.map(np.array, state), rows


def kernels(tree):
    return {name: leaf for name, leaf in flat(tree).items() if name.startswith("blocks") and name.endswith("kernel")}


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_each_keeps_its_promise_beside_the_other(names):
    first, last, rows = run(names)
    assert all(np.isfinite(row["loss"]) for row in rows)
    start, end = (np.mean([row["loss"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert end < start - (0.02 if "adapter" in names else 0.1), (start, end)
    seen = kernels(program(names).evaluation_params(jax.tree.map(jnp.asarray, last)))
    before, after = kernels(first.params), kernels(last.params)
    if "adapter" in names:
        for name, leaf in flat(first.params).items():
            frozen = flat(last.params)[name]
            hidden = flat(last.extra.transforms["mask"]["masks"])[name] if "prune" in names and name in after else True
            np.testing.assert_array_equal(np.where(hidden, leaf, 0), frozen)
        assert not jax.tree.leaves(last.opt_state[0].mu)
        assert all(leaf.any() for leaf in flat(last.extra.learned["adapter"]).values())
    else:
        assert all((before[name] != after[name]).any() for name in before)
    if "prune" in names:
        for name, mask in flat(last.extra.transforms["mask"]["masks"]).items():
            assert (~mask).mean() == pytest.approx(0.5, abs=1e-3)
            assert not np.asarray(seen[name])[~mask].any()
    if "quantize" in names or "lsq" in names:
        for leaf in seen.values():
            group = 16 if "quantize" in names else leaf.shape[1]
            groups = np.asarray(leaf).reshape(leaf.shape[0], -1, group, leaf.shape[-1])
            distinct = [len(np.unique(groups[0, g, :, 0])) for g in range(groups.shape[1])]
            assert max(distinct) <= 16
            assert len(np.unique(np.asarray(leaf))) > 16
    if "lsq" in names:
        steps = flat(first.extra.learned["quantize"]), flat(last.extra.learned["quantize"])
        assert all((steps[0][name] != steps[1][name]).any() for name in steps[0])
    if "distill" in names:
        assert all(row["divergence"] > 0 for row in rows)
    if "float16" in names:
        assert rows[-1]["loss_scale"] > 1


def test_an_overflow_leaves_everything_as_it_was():
    """Masks, scores, scales, moments: a skipped step has not happened."""
    made = program(("prune", "float16"))
    state = made.init(jax.random.key(0))
    for i in range(4):
        state, _ = made.train(state, batch_of(i))
    before = jax.tree.map(np.array, state)
    state = jax.tree.map(jnp.asarray, before)
    state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**40)))
    state, metrics = made.train(state, batch_of(4))
    assert metrics["skipped"] == 1
    for name in ("params", "opt_state", "extra"):
        one, other = getattr(before, name), getattr(state, name)
        assert jax.tree.all(jax.tree.map(np.array_equal, one, other)), name
    assert state.step == before.step + 1
