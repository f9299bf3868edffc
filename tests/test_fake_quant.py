"""Training with rounded weights: what is seen is what is shipped, and it recovers what rounding had cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_learner import BASE, built, held_out, text_batches

from slm.compress.fake_quant import _learned_steps, quantize_transform
from slm.compress.quantize import quantize
from slm.compress.schemes import Scheme
from slm.compress.techniques import shipped, transforms_of
from slm.config import check, override
from slm.errors import ConfigError
from slm.models.counts import abstract_parameters
from slm.models.language_model import LanguageModel
from slm.models.paths import flat
from slm.models.quantized import dequantized
from slm.training.step import Techniques
from slm.training.transforms import Moving, straight_through

STEPS, MORE = 300, 100
HOW = {
    "int2 groups": {"quantize.scheme": "int2", "quantize.group_size": 16},
    "lsq": {"quantize.scheme": "int2", "quantize.method": "lsq", "quantize.group_size": 16},
    "float zero": {"quantize.scheme": "int2", "quantize.symmetric": False, "quantize.group_size": 16},
    "ternary": {"quantize.scheme": "ternary", "quantize.embedding": True},
    "W8A8": {"quantize.scheme": "int8", "quantize.activations": "int8"},
}


@functools.cache
def trained():
    """(parameters after STEPS, their held-out loss, and after MORE steps without rounding)."""
    program = built(BASE)
    state, batches = program.init(jax.random.key(1)), text_batches("train", 0)
    for _ in range(STEPS):
        state, _ = program.train(state, next(batches))
    first = jax.tree.map(np.array, state.params)
    for _ in range(MORE):
        state, _ = program.train(state, next(batches))
    return first, held_out(program, state.params)


@functools.cache
def aware(how):
    """(config, program, state on the host after MORE steps with rounding)."""
    cfg = check(override(BASE, HOW[how] | {"train.steps": MORE, "optim.warmup_steps": 5}))
    program = built(cfg, Techniques(transforms_of(cfg)))
    state, batches = program.start(jax.tree.map(jnp.array, trained()[0])), text_batches("train", 1)
    for _ in range(MORE):
        state, metrics = program.train(state, next(batches))
    assert np.isfinite(metrics["loss"])
    assert program.train._cache_size() == 1
    return cfg, program, jax.tree.map(np.array, state)


@pytest.mark.parametrize("how", HOW)
def test_what_is_shipped_is_what_was_seen(how):
    cfg, program, state = aware(how)
    seen = program.evaluation_params(jax.tree.map(jnp.asarray, state))
    extra = {"learned": state.extra.learned, "transforms": state.extra.transforms}
    _, packed = shipped(cfg, state.params, extra, state.step)
    stored = flat(dequantized(packed))
    # RoundedInputs stand one deeper.
    shown = {
        name.removesuffix("/kernel") if name.endswith("kernel/kernel") else name: w for name, w in flat(seen).items()
    }
    assert shown.keys() == stored.keys()
    for name, leaf in stored.items():
        np.testing.assert_allclose(leaf, shown[name], atol=1e-7, err_msg=name)
    plain = built(BASE)
    fake, real = held_out(program, seen), held_out(plain, packed)
    assert abs(fake - real) < (2e-3 if how == "W8A8" else 1e-4)


@pytest.mark.parametrize("how", ["int2 groups", "lsq", "float zero"])
def test_most_of_what_rounding_costs_comes_back(how):
    cfg, _, state = aware(how)
    _, floats = trained()
    plain = built(BASE)
    grid = {name.split(".")[1]: value for name, value in HOW[how].items() if "method" not in name}
    model = LanguageModel(trained()[0], BASE, None)
    rounded = held_out(plain, quantize(model, embedding=False, **grid).params)
    extra = {"learned": state.extra.learned, "transforms": state.extra.transforms}
    found = held_out(plain, shipped(cfg, state.params, extra, state.step)[1])
    assert rounded > floats + 0.1
    assert (rounded - found) / (rounded - floats) > 0.8, (rounded, found, floats)


def test_rounding_begins_at_its_step():
    cfg = check(override(BASE, {"quantize.scheme": "int2", "quantize.begin_step": 5}))
    transform = quantize_transform(cfg, abstract_parameters(cfg.model))
    params = trained()[0]
    same, other = (flat(transform.apply(params, {}, {}, step)) for step in (4, 5))
    name = "blocks/0/mlp/up/kernel"
    np.testing.assert_array_equal(same[name], flat(params)[name])
    assert len(np.unique(other[name][0, :, 0])) <= 4


def test_inputs_are_rounded_from_the_same_step_on():
    cfg = check(override(BASE, HOW["W8A8"] | {"quantize.begin_step": 5}))
    transform, params = quantize_transform(cfg, abstract_parameters(cfg.model)), trained()[0]
    before, after = (built(BASE).evaluate(transform.apply(params, {}, {}, step), next(text_batches("train", 3)))
                     for step in (4, 5))  # fmt: skip
    plain = built(BASE).evaluate(params, next(text_batches("train", 3)))
    np.testing.assert_allclose(before["nats"], plain["nats"], atol=1e-6)
    always = quantize_transform(check(override(BASE, HOW["W8A8"])), abstract_parameters(cfg.model))
    wanted = built(BASE).evaluate(always.apply(params, {}, {}, 0), next(text_batches("train", 3)))
    np.testing.assert_allclose(after["nats"], wanted["nats"], atol=1e-6)
    assert np.abs(after["nats"] - before["nats"]).max() > 1e-4


def test_learned_scales_fit_the_weights_of_the_step_at_which_rounding_begins():
    cfg = check(override(BASE, HOW["lsq"] | {"quantize.begin_step": 5}))
    transform, params = quantize_transform(cfg, abstract_parameters(cfg.model)), trained()[0]
    state, learned = transform.init(params), transform.learn(params)
    assert not any(map(np.any, jax.tree.leaves(learned)))
    name = "blocks/0/mlp/up/kernel"
    first = flat(state["scale"])[name]
    for step, grown, wanted in ((4, 2, 2), (5, 4, 4), (6, 8, 4)):
        moved = jax.tree.map(lambda p, grown=grown: grown * p, params)
        state, _ = transform.update(state, Moving(jnp.int32(step), moved, {}, {}, 0))
        np.testing.assert_allclose(flat(state["scale"])[name], wanted * first, rtol=1e-6)


def test_gradients_pass_and_scales_learn():
    """LSQ's derivative of the scale: round(w/s) - w/s inside the range, the end of the range outside (equation 3)."""
    scheme, w, s = Scheme("int4"), jnp.array([[[0.3], [-2.2], [9.0], [-30.0]]]), jnp.full((1, 1, 1), 0.5)
    d_w, d_s = jax.grad(lambda w, s: _learned_steps(scheme, w, s).sum(), (0, 1))(w, s)
    np.testing.assert_array_equal(d_w[0, :, 0], [1, 1, 0, 0])
    codes = np.array([0.6, -4.4, 18.0, -60.0])
    inside = np.round(codes[:2]) - codes[:2]
    want = (inside.sum() + 7 - 8) / np.sqrt(4 * 7)
    np.testing.assert_allclose(d_s, want, rtol=1e-5)
    value, pull = jax.vjp(straight_through, w, w * 0)
    assert not value.any()
    np.testing.assert_array_equal(pull(w)[0], w)


@pytest.mark.parametrize(("changes", "message"), [
    ({"quantize.scheme": "nf4", "quantize.symmetric": False}, "nf4 has no zero point"),
    ({"quantize.scheme": "int4", "quantize.symmetric": False, "prune.sparsity": 0.5}, "moves pruned weights away"),
    ({"quantize.scheme": "nf4", "quantize.method": "lsq"}, "learns scales of symmetric integers"),
    ({"quantize.scheme": "int4", "quantize.activations": "int8"}, "needs quantize.scheme = int8"),
    ({"quantize.scheme": "int4", "quantize.begin_step": 500}, "must be a step of the run"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(override(BASE, changes))


def test_groups_must_divide():
    cfg = check(override(BASE, {"quantize.scheme": "int4", "quantize.group_size": 20}))
    with pytest.raises(ConfigError, match="group_size = 20 does not divide the 48 inputs of blocks/0/"):
        transforms_of(cfg)
