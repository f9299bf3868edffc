"""Gates that training shuts (L0): they find what is useless, stop at exactly the shape asked for, and what is cut out
was not said any more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_batch import one_document

from slm.compress.gates import gate_transform, gated, hard_concrete, planned, standing
from slm.compress.shrink import shipped_config
from slm.compress.techniques import shipped, transforms_of
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
from slm.errors import ConfigError
from slm.models.paths import flat
from slm.models.transformer import Transformer
from slm.training import step
from slm.training.mesh import make_mesh
from slm.training.step import Techniques
from slm.training.transforms import ParamTransform

B, T, V, END = 16, 16, 23, 200
BASE = Experiment(
    model=ModelConfig(vocab_size=V, layers=3, width=32, heads=8, kv_heads=4, mlp_width=24),
    data=DataConfig(sequence_length=T),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=3, schedule="constant"),
    train=TrainConfig(steps=300, batch_size=B, loss_chunk=16),
)
USEFUL = {
    "layers": np.array([1, 0, 1]),
    "width": np.arange(32) % 4 != 1,
    "mlp/blocks/0": np.tile(np.arange(24) % 3 == 2, (3, 1)),
    "heads/blocks/0": np.array([[0, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 1]]),
}
SIZES = {"layers": 2, "width": 24, "mlp_width": 8, "kv_heads": 2}
GATED = override(
    BASE,
    # Gates alone learn; the model stands almost still.
    {"optim.learning_rate": 1e-5, "train.steps": END + 10, "shrink.criterion": "l0", "shrink.end_step": END,
     "shrink.gate_learning_rate": 0.2,
     **{f"shrink.{name}": size for name, size in SIZES.items()}},
)  # fmt: skip


def batch_of(i):
    """What comes next is one of two functions of a token, and the token before says which."""
    tokens = np.random.default_rng(i).integers(0, V, (B, T), dtype=np.int32)
    odd = np.roll(tokens, 1, 1) % 2
    odd[:, 0] = 0
    return one_document(tokens, (tokens * (3 + 4 * odd) + 1) % V)


def built(cfg, transforms):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiler_options", lambda platform: {})
        return step.build(check(cfg), make_mesh(MeshConfig(), jax.devices()[:1]), Techniques(transforms))


@functools.cache
def planted():
    """A trained model, much of which says nothing."""
    useful = {name: jnp.asarray(one, jnp.float32) for name, one in USEFUL.items()}
    hide = ParamTransform(lambda params: {}, lambda params, *_: gated(BASE.model, params, useful))
    program = built(BASE, {"gate": hide})
    state = program.init(jax.random.key(1))
    for i in range(BASE.train.steps):
        state, metrics = program.train(state, batch_of(i))
    assert metrics["loss"] < 0.6 * np.log(V), metrics["loss"]
    return jax.tree.map(np.array, program.evaluation_params(state))


@functools.cache
def program():
    return built(GATED, transforms_of(check(GATED)))


@functools.cache
def run():
    """(program, states after some of the steps, metrics of all)."""
    made = program()
    state, states, rows = made.start(jax.tree.map(jnp.array, planted())), {}, []
    for i in range(GATED.train.steps):
        if i in (0, END // 2, END):
            states[i] = jax.tree.map(np.array, state)
        state, metrics = made.train(state, batch_of(1000 + i))
        rows.append({name: float(value) for name, value in metrics.items()})
    assert made.train._cache_size() == 1
    return made, states | {GATED.train.steps: jax.tree.map(np.array, state)}, rows


def logits(cfg, params):
    model = Transformer(cfg)
    return np.asarray(model.logits(params, model.hidden(params, batch_of(0)["tokens"])[0]))


def cut(state):
    """(config, parameters) of what a run ships."""
    parts = {"learned": state.extra.learned, "transforms": state.extra.transforms}
    return shipped(GATED, jax.tree.map(jnp.asarray, state.params), parts, state.step)


def test_useless_parts_are_found_and_as_many_stay_open_as_asked_for():
    made, states, rows = run()
    learned = states[END].extra.learned["gate"]
    shares = {"layers": 2 / 3, "width": 3 / 4, "mlp": 1 / 3, "heads": 1 / 2}
    for name, one in flat(learned["log_alpha"]).items():
        keep = planned(GATED.model, shipped_config(GATED).model, GATED.shrink)[name].keep
        found, wanted = np.asarray(standing(one, keep)) > 0, USEFUL[name] > 0
        if found.ndim == 2:
            found, wanted = found[USEFUL["layers"] > 0], wanted[USEFUL["layers"] > 0]  # anything may stay of the other
        assert (found == wanted).mean() > 0.95, name
        assert rows[0][f"open_{name.split('/')[0]}"] > 0.99
        assert rows[END - 1][f"open_{name.split('/')[0]}"] == pytest.approx(shares[name.split("/")[0]], abs=0.04)
    # Multipliers went up while there was too much, and down again.
    assert all((one > 0).all() for one in flat(states[END // 2].extra.learned["gate"]["quadratic"]).values())
    # What stays says what the whole did.
    whole = made.evaluate(jax.tree.map(jnp.asarray, planted()), batch_of(0))["nats"].mean()
    small = made.evaluate(made.evaluation_params(jax.tree.map(jnp.asarray, states[END])), batch_of(0))["nats"].mean()
    assert small < whole + 0.15, (small, whole)


def test_what_is_shipped_is_of_the_shape_asked_for_and_says_the_same():
    made, states, _ = run()
    for at in (0, END // 2, END, GATED.train.steps):
        cfg, params = cut(states[at])
        m = cfg.model
        assert (m.layers, m.width, m.mlp_width, m.kv_heads, m.heads, m.head_dim) == (2, 24, 8, 2, 4, 4)
        assert not cfg.shrink.on
        shapes = jax.eval_shape(Transformer(m).init, jax.random.key(0))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    for at in (END, GATED.train.steps):
        seen = made.evaluation_params(jax.tree.map(jnp.asarray, states[at]))
        cfg, params = cut(states[at])
        want, small = logits(GATED.model, seen), logits(cfg.model, params)
        np.testing.assert_allclose(small, want, atol=1e-5 * np.abs(want).max())


def test_training_begins_with_the_model_and_ends_with_gates_that_stand_still():
    made, states, _ = run()
    begun = made.evaluation_params(jax.tree.map(jnp.asarray, states[0]))
    assert jax.tree.all(jax.tree.map(np.array_equal, begun, planted()))
    before, after = (states[at].extra.learned["gate"] for at in (END, GATED.train.steps))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    # The noise is a function of the step: what is restored goes on as it would have.
    state = made.train(jax.tree.map(jnp.asarray, states[END // 2]), batch_of(1000 + END // 2))[0]
    again = made.train(jax.tree.map(jnp.asarray, states[END // 2]), batch_of(1000 + END // 2))[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, state, again))
    learned = state.extra.learned["gate"]["log_alpha"]
    assert (flat(learned)["width"] != flat(states[END // 2].extra.learned["gate"]["log_alpha"])["width"]).all()


def test_layers_may_have_sizes_of_their_own():
    cfg = check(override(GATED, {"shrink.layers": None, "shrink.mlp_width": (3, 24, 8), "shrink.kv_heads": (4, 1, 2)}))
    transform = gate_transform(cfg)
    learned = transform.learn(planted())
    rng = np.random.default_rng(0)
    learned["log_alpha"] = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), learned["log_alpha"]
    )
    small, params = shipped(cfg, planted(), {"learned": {"gate": learned}, "transforms": {}}, END)
    assert small.model.layer_mlp_widths == (3, 24, 8)
    assert small.model.layer_kv_heads == (4, 1, 2)
    want = logits(cfg.model, transform.apply(planted(), learned, {}, END))
    np.testing.assert_allclose(logits(small.model, params), want, atol=1e-5 * np.abs(want).max())


def test_gates_follow_their_distribution():
    uniform = (np.arange(20_000) + 0.5) / 20_000
    for log_alpha in (-2.0, 0.3, 3.0):
        gates = np.asarray(hard_concrete(jnp.float32(log_alpha), jnp.asarray(uniform)))
        # Louizos et al. 2018, equation 12.
        assert (gates > 0).mean() == pytest.approx(1 / (1 + np.exp(-log_alpha + 2 / 3 * np.log(0.1 / 1.1))), abs=1e-3)
        assert 0 <= gates.min() <= gates.max() <= 1
    assert hard_concrete(0.0) == pytest.approx(0.5)
    assert hard_concrete(-3.0) == 0
    kept = np.asarray(standing(jnp.array([[4.0, -9.0, 0.0, -4.0], [1.0, 1.0, 1.0, 1.0]]), np.array([3, 1])))
    np.testing.assert_allclose(kept, [[1, 0, 0.5, 0.1], [1.2 / (1 + np.exp(-1)) - 0.1, 0, 0, 0]], rtol=1e-6)


def test_a_penalty_moves_what_it_is_of_and_nothing_else():
    """Not even by way of the clipped norm."""
    cfg = override(BASE, {"model.layers": 1, "optim.clip_norm": 0.01, "optim.learning_rate": 1e-2})

    def trained(**parts):
        def scaled(params, learned, state, step):
            return jax.tree.map(lambda a: a * learned["scale"], params)

        one = ParamTransform(lambda params: {}, scaled, learn=lambda params: {"scale": jnp.float32(1)}, **parts)
        program = built(cfg, {"adapter": one})
        return program.train(program.init(jax.random.key(0)), batch_of(0))

    without, _ = trained()
    much, metrics = trained(penalty=lambda learned, step: (1e4 * learned["scale"] ** 2, {"square": learned["scale"]}))
    assert jax.tree.all(jax.tree.map(np.array_equal, without.params, much.params))
    assert metrics["square"] == 1
    scale = [float(state.extra.learned["adapter"]["scale"]) for state in (without, much)]
    assert scale[1] < 1 - 1e-3
    assert scale[0] != scale[1]


def test_beside_half_precision_and_micro_batches():
    cfg = override(GATED, {"train.precision": "float16", "train.accumulation": 2, "optim.ema_decay": 0.9})
    made = built(cfg, transforms_of(check(cfg)))
    state = made.start(jax.tree.map(jnp.array, planted()))
    for i in range(4):
        state, metrics = made.train(state, batch_of(1000 + i))
    assert np.isfinite(metrics["loss"])
    assert all((one != 4).all() for one in flat(state.extra.learned["gate"]["log_alpha"]).values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"shrink.mlp_width": 25}, r"shrink\.mlp_width = 25: layer 0 has 24"),
    ({"shrink.kv_heads": 5}, r"shrink\.kv_heads = 5: layer 0 has 4"),
    ({"shrink.layers": 4}, r"shrink\.layers = 4: the model has 3"),
    ({"shrink.end_step": 999}, r"shrink\.end_step = 999: must be a step of the run, from 1 to train\.steps"),
    ({"shrink.warmup_steps": END + 1}, r"shrink\.warmup_steps = 201: .* not more than shrink\.end_step = 200"),
    ({"shrink.gate_learning_rate": 0.0}, "must be above 0"),
    ({"shrink.mlp_width": (8, 8)}, "give one number"),
    ({"shrink.layers": None, "shrink.keep_layers": (0, 1)}, r"shrink\.keep_layers = \(0, 1\): .* set shrink\.layers"),
    ({"prune.sparsity": 0.5}, "l0 with prune: .* let a second run"),
    ({"quantize.scheme": "int8"}, "l0 with quantize: .* let a second run"),
    ({"optim.name": "schedule_free_adamw"}, r"use optim\.name = adamw"),
    ({"model.residual": "sandwich"}, r"model\.residual = sandwich norms what layers say"),
    ({"model.attention": ("gla",), "model.kv_heads": None, "shrink.kv_heads": None, "shrink.width": None},
     r"shrink\.layers: it is not known what goes together in layers of gla"),
    ({"model.norm": "layernorm"}, "needs RMSNorm"),
    ({"shrink.criterion": "activation", "model.init_from": "there"}, r"shrink\.end_step = 200 belongs to .* l0"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        gate_transform(check(override(GATED, changes)))
