"""Mixers replaced in a trained model: what fits is taken over, and little training brings back what was lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_learner import BASE, STEPS, B, built, held_out, teacher, text_batches

import slm
from slm.compress.convert import convert, converted_config, transfer_objective
from slm.compress.distill import distill_objective
from slm.config import ConvertConfig, DistillConfig, Experiment, ModelConfig, override
from slm.errors import ConfigError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.paths import flat
from slm.models.transformer import Transformer
from slm.training.objective import plain_objective
from slm.training.step import Techniques

SMALL = ModelConfig(vocab_size=50, layers=5, width=32, heads=4, kv_heads=2)


def made(cfg=SMALL, seed=0):
    return LanguageModel(Transformer(cfg).init(jax.random.key(seed)), Experiment(model=cfg), None)


def layer(model, number):
    return flat(layerwise.layer_params(model.params, layerwise.places(model.transformer)[number]))


def test_the_same_mechanism_changes_nothing():
    model = made()
    same = convert(model, ("softmax",))
    assert jax.tree.all(jax.tree.map(np.array_equal, same.params, model.params))


def test_quantized_weights_are_refused():
    model = slm.quantize(made(), "int8")
    with pytest.raises(ConfigError, match="quantized already"):
        convert(model, ("gla",))


@pytest.mark.parametrize("attention", [("gla", "softmax"), ("hedgehog", "hedgehog", "window"), ("gated_delta",)])
def test_what_fits_is_taken_over(attention):
    model = made()
    other = convert(model, attention, seed=3)
    assert other.config.model.attention == attention
    tokens = np.arange(24).reshape(2, 12)
    assert np.isfinite(slm.logits(other, tokens)).all()
    for number in range(5):
        before, after = layer(model, number), layer(other, number)
        assert all(np.array_equal(after[name], leaf) for name, leaf in before.items() if not name.startswith("mixer"))
        if attention[number % len(attention)] in ("softmax", "window"):
            assert before.keys() == after.keys()
            assert all(np.array_equal(after[name], leaf) for name, leaf in before.items())
    for name in ("embed/embedding", "final_norm/scale"):
        np.testing.assert_array_equal(flat(model.params)[name], flat(other.params)[name])


def test_keys_that_heads_share_are_repeated_for_each():
    """Then linear attention of each head reads the keys that its softmax read."""
    model = made()
    before, after = layer(model, 0), layer(convert(model, ("linear",)), 0)
    x = np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    shared, own = x @ before["mixer/key/kernel"], x @ after["mixer/key/kernel"]
    assert shared.shape == (7, 2 * 8)
    np.testing.assert_allclose(own.reshape(7, 4, 8), np.repeat(shared.reshape(7, 2, 8), 2, 1), rtol=1e-5)
    np.testing.assert_array_equal(before["mixer/query/kernel"], after["mixer/query/kernel"])


def test_less_than_a_twentieth_of_the_training_brings_back_most_of_what_was_lost():
    """Every second layer linear; a ninth of the little training is attention transfer, the rest distillation."""
    model, before = teacher()
    assert before < 2.1  # it has learnt something
    size, attention = B // 4, ("gated_delta", "softmax")
    steps = STEPS // 21 * 4  # of batches of a quarter
    moving = steps // 9
    student = convert(model, attention)
    cfg = override(
        BASE,
        {
            "model": student.config.model, "train.steps": steps, "train.batch_size": size, "optim.warmup_steps": 5,
            "convert": ConvertConfig(attention, transfer_steps=moving),
            "distill": DistillConfig(teacher="the whole", alpha=0.9),
        },
    )  # fmt: skip
    own = Transformer(cfg.model)
    taught = distill_objective(cfg, own, model.transformer)
    objective = transfer_objective(cfg, own, model.transformer, taught)
    program = built(cfg, Techniques(objective=objective, teacher=jax.eval_shape(lambda: model.params)))
    scored = built(override(BASE, {"model": student.config.model}))
    state, batches = program.start(jax.tree.map(jnp.array, student.params)), text_batches("train", 5)
    broken = held_out(scored, state.params)
    errors, moved = [], None
    for i in range(steps):
        state, metrics = program.train(state, {k: leaf[:size] for k, leaf in next(batches).items()}, model.params)
        errors.append(float(metrics["transfer"]))
        if i == moving - 1:
            moved = jax.tree.map(np.array, state.params)
    recovered = held_out(scored, state.params)
    assert broken > before + 0.5
    assert (broken - recovered) / (broken - before) > 0.85, (before, broken, recovered)
    # First the mixer alone: nothing else has a gradient (weight decay aside), and its error falls.
    assert errors[moving - 1] < 0.7 * errors[0]
    assert not any(errors[moving:])
    assert held_out(scored, moved) < broken
    for name, leaf in flat(moved).items():
        if "embed" in name:
            np.testing.assert_array_equal(leaf, flat(student.params)[name])


@pytest.mark.parametrize(("changes", "message"), [
    ({"convert.attention": ("gla",)}, "set model.init_from"),
    ({"convert.transfer_steps": 5}, "needs convert.attention"),
    ({"model.init_from": "m", "convert.attention": ("gla",), "convert.transfer_steps": 5}, "needs distill.teacher"),
    ({"model.init_from": "m", "convert.attention": ("gla",), "distill.teacher": "m", "convert.transfer_steps": 9999},
     "must not be more than train.steps = 500"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        slm.config.check(override(BASE, changes))


def test_what_a_model_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="no mechanism 'hedgehg': did you mean hedgehog"):
        converted_config(SMALL, ("hedgehg",))
    with pytest.raises(ConfigError, match=r"model\.mixer\.window = 4: no layer"):
        converted_config(SMALL, ("softmax",), {"window": 4})
    one, other = Transformer(SMALL), Transformer(ModelConfig(vocab_size=50, layers=4, width=32, heads=4))
    with pytest.raises(ConfigError, match=r"the teacher has model\.layers = 4, the model 5"):
        transfer_objective(BASE, one, other, plain_objective(one, BASE))
