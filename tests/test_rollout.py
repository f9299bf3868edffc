"""Text that the student writes itself: what is kept, what is drawn, and that learning from it makes it better text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_teacher import (
    BASE,
    TEACHER,
    B,
    T,
    V,
    chain,
    chain_teacher,
    distilling,
    experiment,
    make_batch,
    sharp,
    teacher_params,
)

from slm.compress.distill import distill_objective
from slm.compress.rollout import is_on_policy, make_rollout
from slm.config import DistillConfig
from slm.errors import ConfigError
from slm.models.transformer import Transformer

P, END = 4, 3


@functools.cache
def student_params():
    return sharp(jax.jit(Transformer(BASE.model).init)(jax.random.key(1)), 3.0)


def make(vocab_size=V, ends=(END,), **changes):
    cfg = experiment(distill__prompt_tokens=P, **changes)
    return jax.jit(make_rollout(cfg, Transformer(cfg.model), ends, vocab_size))


def text_of(batch):
    return np.concatenate([batch["tokens"][:, :1], ~np.asarray(batch["targets"])], 1)


def test_prompts_stay_and_samples_follow():
    given = make_batch()
    got = jax.device_get(make()(student_params(), given, 0))
    text = text_of(got)
    np.testing.assert_array_equal(text[:, :P], given["tokens"][:, :P])
    np.testing.assert_array_equal(got["tokens"], text[:, :-1])
    np.testing.assert_array_equal(got["positions"], np.tile(np.arange(T), (B, 1)))
    assert (got["segment_ids"] == 1).all()
    for row in range(B):
        sampled = text[row, P:].tolist()
        counted = sampled.index(END) + 1 if END in sampled else len(sampled)
        expected = np.r_[np.zeros(P - 1), np.ones(counted), np.zeros(len(sampled) - counted)]
        np.testing.assert_array_equal(got["weights"][row], expected)
    assert {name: (x.shape, x.dtype) for name, x in got.items()} == {
        name: (x.shape, x.dtype) for name, x in given.items()
    }


def test_greedy_samples_are_the_likeliest_tokens_of_a_plain_forward_pass():
    model, given = Transformer(BASE.model), make_batch()
    cold = text_of(jax.device_get(make(ends=(), distill__sample_temperature=1e-6)(student_params(), given, 0)))
    hidden, _ = model.hidden(student_params(), cold[:, :-1])
    likeliest = np.asarray(model.logits(student_params(), hidden)).argmax(-1)
    np.testing.assert_array_equal(cold[:, P:], likeliest[:, P - 1 :])


def test_samples_follow_the_models_distribution():
    """The first sampled token of many equal rows, against the probabilities of a plain forward pass."""
    rows, model = 4096, Transformer(BASE.model)
    given = {name: np.repeat(x[:1], rows, 0) for name, x in make_batch().items()}
    drawn = text_of(jax.device_get(make()(student_params(), given, 0)))[:, P]
    hidden, _ = model.hidden(student_params(), given["tokens"][:1, :P])
    p = np.asarray(jax.nn.softmax(model.logits(student_params(), hidden)[0, -1]), np.float64)
    share = np.bincount(drawn, minlength=V) / rows
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / rows) + 1e-9).all()


def test_a_function_of_seed_step_and_row():
    given = make_batch()
    rollout = make()
    one, again, later = (jax.device_get(rollout(student_params(), given, step)) for step in (5, 5, 6))
    other = jax.device_get(make(seed=1)(student_params(), given, 5))
    np.testing.assert_array_equal(text_of(one), text_of(again))
    assert (text_of(one) != text_of(later)).any()
    assert (text_of(one) != text_of(other)).any()
    few = jax.device_get(rollout(student_params(), {name: x[:2] for name, x in given.items()}, 5))
    np.testing.assert_array_equal(text_of(one)[:2], text_of(few))
    same = {name: np.repeat(x[:1], B, 0) for name, x in given.items()}
    assert len(np.unique(text_of(jax.device_get(rollout(student_params(), same, 5))), axis=0)) > 1


def test_padding_of_the_vocabulary_is_never_drawn():
    drawn = text_of(jax.device_get(make(vocab_size=6, ends=())(student_params(), make_batch(), 0)))[:, P:]
    assert drawn.max() == 5


def test_shares_of_steps():
    chosen = [is_on_policy(DistillConfig(on_policy=0.3), 0, step) for step in range(2000)]
    assert abs(np.mean(chosen) - 0.3) < 0.05
    assert chosen != [is_on_policy(DistillConfig(on_policy=0.3), 1, step) for step in range(2000)]
    assert not any(is_on_policy(DistillConfig(on_policy=0.0), 0, step) for step in range(50))
    assert all(is_on_policy(DistillConfig(on_policy=1.0), 0, step) for step in range(50))


def test_the_cross_entropy_does_not_ask_for_the_students_own_words():
    cfg = experiment(distill__alpha=0.6)
    objective = distill_objective(cfg, Transformer(cfg.model), TEACHER)
    given = make_batch()
    own = given | {"targets": ~given["targets"]}
    value, sums = objective.apply(student_params(), {}, own, teacher_params(), 0)
    np.testing.assert_allclose(value, 0.6 * sums["divergence"], rtol=1e-5)
    _, plain = objective.apply(student_params(), {}, given, teacher_params(), 0)
    np.testing.assert_allclose(sums["nats"], plain["nats"], rtol=1e-6)


@pytest.mark.parametrize("mechanism", ["gated_delta", "window"])
def test_other_mechanisms_write_too(mechanism):
    got = make(model__attention=(mechanism,))
    cfg = experiment(model__attention=(mechanism,))
    params = Transformer(cfg.model).init(jax.random.key(0))
    assert text_of(jax.device_get(got(params, make_batch(), 0))).shape == (B, T + 1)


def test_encoders_write_no_text():
    cfg = experiment(model__causal=False, model__head="masked_lm", distill__on_policy=0.5)
    with pytest.raises(ConfigError, match=r"distill.on_policy = 0.5: model.head = masked_lm writes no text"):
        make_rollout(cfg, Transformer(cfg.model), (), V)


@functools.cache
def taught(loss, on_policy, steps=120):
    """The teacher's nats a token on what a student writes that was taught so."""
    cfg = experiment(
        distill__loss=loss, distill__on_policy=on_policy, distill__alpha=1.0, distill__prompt_tokens=P,
        train__steps=steps, train__batch_size=16,
    )  # fmt: skip
    teacher, params = chain_teacher()
    made = distilling(cfg, teacher)
    rollout = jax.jit(make_rollout(cfg, made.transformer, (), V))
    state = made.init(jax.random.key(2))
    for step in range(steps):
        batch = chain(step)
        if is_on_policy(cfg.distill, cfg.seed, step):
            batch = rollout(state.params, batch, step)
        state, _ = made.train(state, batch, params)
    nats = []
    for step in range(10_000, 10_008):
        text = text_of(jax.device_get(rollout(state.params, chain(step, 64), step)))
        hidden, _ = teacher.hidden(params, text[:, :-1])
        log_p = jax.nn.log_softmax(teacher.logits(params, hidden))
        nats.append(-jnp.take_along_axis(log_p, text[:, 1:, None], -1)[:, P - 1 :].mean())
    return float(np.mean(nats))


def test_on_policy_students_write_what_the_teacher_finds_likelier():
    """E K5: GKD (reverse KL, half of the steps on the student's own text) against plain KD at equal steps.

    Measured: plain 0.751; GKD 0.547, with jsd 0.658; reverse KL on given text alone 0.588. After half as many steps the
    student's own text is still so poor that learning from it loses: 1.957 against 1.769 with reverse KL.
    """
    assert taught("reverse_kl", 0.5) < taught("forward_kl", 0.0) - 0.1
