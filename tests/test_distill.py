"""The distilling objective against its formula on full logits, and what must and must not move under it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_teacher import BASE, TEACHER, B, T, V, distilling, experiment, make_batch, program, sharp, teacher_params

from slm.compress.distill import distill_objective, resolved, settings
from slm.compress.divergences import DIVERGENCES
from slm.config import DistillConfig
from slm.errors import ConfigError
from slm.models.transformer import Transformer
from slm.training.objective import plain_objective


@functools.cache
def student_params():
    return sharp(jax.jit(Transformer(BASE.model).init)(jax.random.key(1)), 3.0)


def on_full_logits(cfg, params, batch, teacher, settings_):
    """The textbook loss, summed, with logits of all tokens at once."""
    alpha, temperature, beta = settings_
    where = {"segment_ids": batch["segment_ids"], "positions": batch["positions"]}

    def logits(model, params):
        return model.logits(params, model.hidden(params, batch["tokens"], **where)[0])

    z, theirs = logits(Transformer(cfg.model), params), logits(TEACHER, teacher)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(z), batch["targets"][..., None], -1)[..., 0]
    apart = DIVERGENCES[cfg.distill.loss](z / temperature, jax.nn.log_softmax(theirs / temperature), beta)
    z_loss = cfg.train.z_loss * jax.nn.logsumexp(z, -1) ** 2
    return ((alpha * temperature**2 * apart + (1 - alpha) * nats + z_loss) * batch["weights"]).sum()


# One that goes by the student's log-probabilities, one with a beta, one that ranks logits: each alone is in
# test_divergences.py.
@pytest.mark.parametrize("loss", ["forward_kl", "jsd", "logistic_ranking"])
def test_equals_the_full_form_with_gradients(loss):
    cfg = experiment(
        distill__loss=loss, distill__alpha=0.7, distill__temperature=2.0, distill__beta=0.3, distill__beta_end=0.6,
        distill__alpha_end=0.5, train__z_loss=0.01,
    )  # fmt: skip
    params, teacher, batch, step = student_params(), teacher_params(), make_batch(), jnp.int32(10)
    objective = distill_objective(cfg, Transformer(cfg.model), TEACHER)
    (value, sums), grads = jax.jit(jax.value_and_grad(objective.apply, has_aux=True))(params, {}, batch, teacher, step)
    done = 10 / 19
    at = 0.7 - 0.2 * done, 2.0, 0.3 + 0.3 * done
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda p: on_full_logits(cfg, p, batch, teacher, at)))(params)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)
    assert sums["divergence"] > 0.1


def test_the_teacher_gets_no_gradient():
    cfg = experiment(distill__alpha=1.0, distill__hidden=1.0, distill__relations=1.0)
    objective = distill_objective(cfg, Transformer(cfg.model), TEACHER)
    learned = objective.init(jax.random.key(0))
    grads, of_learned = jax.jit(
        jax.grad(lambda t, learned: objective.apply(student_params(), learned, make_batch(), t, 0)[0], argnums=(0, 1))
    )(teacher_params(), learned)
    assert all((x == 0).all() for x in jax.tree.leaves(grads))
    assert learned["hidden"]["kernel"].shape == (16, 24)
    assert np.abs(of_learned["hidden"]["kernel"]).max() > 0


def run(program, batches, *teacher):
    state, rows = program.init(jax.random.key(0)), []
    for batch in batches:
        state, metrics = program.train(state, batch, *teacher)
        rows.append(metrics)
    return state, rows


def test_without_a_share_the_teacher_changes_no_bit():
    batches = [make_batch(seed) for seed in range(4)]
    plain, _ = run(program(BASE), batches)
    cfg = experiment(distill__alpha=0.0)
    distilled, rows = run(distilling(cfg), batches, teacher_params())
    assert rows[0]["divergence"] > 0.1
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(distilled.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sums_do_not_depend_on_padding_or_micro_batches():
    features = {"distill__hidden": 0.3, "distill__relations": 0.5}
    # Rows are dealt out to micro-batches in turn: without any weight in some, and very uneven ones.
    batch = make_batch() | {"weights": make_batch()["weights"] * np.array([1, 0, 1, 0.5])[:, None].astype(np.float32)}
    whole = run(distilling(experiment(**features)), [batch], teacher_params())
    split = run(distilling(experiment(**features, train__accumulation=4)), [batch], teacher_params())
    for name in ("loss", "divergence", "grad_norm", "hidden", "relations"):
        np.testing.assert_allclose(whole[1][0][name], split[1][0][name], rtol=2e-5)
    for a, b in zip(jax.tree.leaves(whole[0].params), jax.tree.leaves(split[0].params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    cfg = experiment(**features)
    objective = distill_objective(cfg, Transformer(cfg.model), TEACHER)
    learned = objective.init(jax.random.key(0))
    value, _ = jax.jit(objective.apply)(student_params(), learned, batch, teacher_params(), 3)
    longer = {name: np.pad(array, ((0, 0), (0, 9))) for name, array in batch.items()}
    longer["tokens"][:, T:] = 5
    padded, _ = jax.jit(objective.apply)(student_params(), learned, longer, teacher_params(), 3)
    np.testing.assert_allclose(value, padded, rtol=1e-5)


def test_gradients_keep_their_size_over_temperatures():
    def size(temperature):
        cfg = experiment(distill__alpha=1.0, distill__temperature=temperature)
        objective = distill_objective(cfg, Transformer(cfg.model), TEACHER)
        grads = jax.jit(jax.grad(lambda p: objective.apply(p, {}, make_batch(), teacher_params(), 0)[0]))(
            student_params()
        )
        return float(jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads))))

    assert 0.5 < size(4.0) / size(1.0) < 2


@pytest.mark.parametrize("cap", [None, 15.0])
def test_half_precision_is_near(cap):
    cfg = experiment(model__logit_softcap=cap)
    values = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        models = [Transformer(m, dtype) for m in (cfg.model, TEACHER.cfg)]
        objective = distill_objective(cfg, *models)
        values[dtype], grads = jax.jit(
            jax.value_and_grad(lambda p, o=objective: o.apply(p, {}, make_batch(), teacher_params(), 0)[0])
        )(student_params())
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(*values.values(), rtol=0.03)


def test_logits_of_neither_model_are_ever_held():
    B, T, V = 4, 256, 4096
    cfg = experiment(
        model__vocab_size=V, model__layers=1, model__width=16, data__sequence_length=T, train__loss_chunk=16,
        distill__loss="jsd",
    )  # fmt: skip
    batch = {name: jax.ShapeDtypeStruct((B, T), x.dtype) for name, x in make_batch().items()}

    def temporaries(chunk):
        one = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, loss_chunk=chunk))
        model = Transformer(one.model)
        objective = distill_objective(one, model, model)
        params = jax.eval_shape(model.init, jax.random.key(0))
        grad = jax.jit(jax.grad(lambda p, batch, t: objective.apply(p, {}, batch, t, 0)[0]))
        return grad.lower(params, batch, params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < B * T * V * 4 < temporaries(T)


def test_schedules():
    distill = DistillConfig(alpha=1.0, alpha_end=0.0, temperature=4.0, temperature_end=1.0, schedule="cosine")
    first, middle, last = (settings(distill, step, 101) for step in (0, 50, 100))
    np.testing.assert_allclose(first, (1, 4, 0.5), rtol=1e-6)
    np.testing.assert_allclose(middle, (0.5, 2.5, 0.5), rtol=1e-5)
    np.testing.assert_allclose(last, (0, 1, 0.5), atol=1e-6)
    np.testing.assert_allclose(settings(distill, 25, 101)[0], (1 + np.cos(np.pi / 4)) / 2, rtol=1e-5)
    linear = dataclasses.replace(distill, schedule="linear")
    np.testing.assert_allclose(settings(linear, 25, 101)[:2], (0.75, 3.25), rtol=1e-5)


def test_a_larger_vocabulary_is_cut_where_it_is_padded():
    """Rows of padding in the teacher's embedding change nothing; the student's are in its cross-entropy alone."""
    cfg = experiment(distill__alpha=1.0)
    teacher = teacher_params()
    wide = Transformer(dataclasses.replace(TEACHER.cfg, vocab_size=V + 5))
    table = jnp.concatenate([teacher["embed"]["embedding"], jnp.ones((5, 24)) * 3])
    padded = teacher | {"embed": {"embedding": table}}
    values = [
        distill_objective(cfg, Transformer(cfg.model), model).apply(student_params(), {}, make_batch(), params, 0)[0]
        for model, params in ((TEACHER, teacher), (wide, padded))
    ]
    np.testing.assert_allclose(*values, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "beta", "end", "becomes"),
    [
        ("jsd", 0.0, None, "forward_kl"),
        ("jsd", 1.0, None, "reverse_kl"),
        ("jsd", 0.5, 0.1, "jsd"),
        ("skew_kl", 0.0, None, "forward_kl"),
        ("skew_kl", 0.0, 0.1, "skew_kl"),
        ("tvd", 1.0, None, "tvd"),
    ],
)
def test_ends_of_beta(loss, beta, end, becomes):
    assert resolved(DistillConfig(loss=loss, beta=beta, beta_end=end)).loss == becomes


@pytest.mark.parametrize(
    ("loss", "beta", "end"), [("jsd", 0.0, 0.5), ("jsd", 0.5, 1.0), ("skew_reverse_kl", 1.0, None)]
)
def test_betas_that_say_nothing_are_refused(loss, beta, end):
    with pytest.raises(ConfigError, match=r"distill.beta = .* vanishes at"):
        resolved(DistillConfig(loss=loss, beta=beta, beta_end=end))


def test_infinite_losses_of_cached_teachers_are_refused():
    cfg = experiment(distill__loss="reverse_kl", distill__missing="zero")
    with pytest.raises(ConfigError, match=r"reverse_kl is infinite .* distill.missing = uniform"):
        distill_objective(cfg, Transformer(cfg.model), None, V)


def test_masked_tokens_are_learned_from_a_masked_teacher():
    """An encoder's targets are those of the hidden tokens alone."""
    cfg = experiment(model__causal=False, model__head="masked_lm", distill__alpha=0.5)
    teacher = Transformer(dataclasses.replace(TEACHER.cfg, causal=False, head="masked_lm"))
    objective = distill_objective(cfg, Transformer(cfg.model), teacher)
    batch, params = make_batch(), teacher.init(jax.random.key(3))
    value, sums = objective.apply(Transformer(cfg.model).init(jax.random.key(1)), {}, batch, params, 0)
    plain, plain_sums = plain_objective(Transformer(cfg.model), cfg).apply(
        Transformer(cfg.model).init(jax.random.key(1)), {}, batch, None, 0
    )
    np.testing.assert_allclose(sums["nats"], plain_sums["nats"], rtol=1e-5)
    np.testing.assert_allclose(value, 0.5 * plain + 0.5 * sums["divergence"], rtol=1e-5)


def test_two_devices_say_what_one_says():
    cfg, batch = experiment(distill__hidden=0.1), make_batch()
    assert B % 2 == 0
    objective = distill_objective(cfg, Transformer(cfg.model), TEACHER)
    abstract = jax.eval_shape(TEACHER.init, jax.random.key(0))
    states = [run(program(cfg, objective, abstract, devices=n), [batch], teacher_params()) for n in (1, 2)]
    np.testing.assert_allclose(states[0][1][0]["divergence"], states[1][1][0]["divergence"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(states[0][0].params), jax.tree.leaves(states[1][0].params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
