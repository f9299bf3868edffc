"""What is said of compression, on a model that has learned something: which methods lose less, and what comes back."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from tiny_learner import BASE, built, held_out, teacher, text_batches

import slm
from slm.compress.distill import distill_objective
from slm.config import override
from slm.models.transformer import Transformer
from slm.training.step import Techniques

RECOVERY = 60
"""Steps after shrinking, and from scratch: about an eighth of what the teacher had."""


def calibration(seed=0):
    batches = text_batches("train", seed)
    return np.concatenate([next(batches)["tokens"] for _ in range(4)])


plain = functools.cache(lambda: built(BASE))


@functools.cache
def told():
    """(held-out ids, log-probabilities of the float model)."""
    tokens = next(text_batches("held out", 11))["tokens"]
    return tokens, np.asarray(jax.nn.log_softmax(slm.logits(teacher()[0], tokens)), np.float64)


@functools.cache
def lost(scheme, group_size=None, method="rtn", seed=0):
    """(nats more on held-out text, mean divergence from the float model in nats) of a quantized model."""
    model, before = teacher()
    tokens = None if method == "rtn" else calibration(seed)
    small = slm.quantize(model, scheme, method=method, group_size=group_size, embedding=False, calibration=tokens)
    small = slm.dequantize(small)
    ids, want = told()
    found = np.asarray(jax.nn.log_softmax(slm.logits(small, ids)), np.float64)
    return held_out(plain(), small.params) - before, (np.exp(want) * (want - found)).sum(-1).mean()


def test_fewer_bits_lose_more():
    nats, divergences = zip(*(lost(scheme, 16) for scheme in ("int8", "int4", "int3", "int2")))
    assert abs(nats[0]) < 1e-3
    # Half as many levels are four times the error, and about as much more of what it does.
    assert all(b > 2 * a for a, b in itertools.pairwise(divergences)), divergences
    assert all(b > a for a, b in itertools.pairwise(nats)), nats
    assert divergences[1] < lost("int4")[1]


def test_gptq_loses_less_than_rounding():
    """In divergence, over three draws of calibration: 0.21 to 0.26 of it at int4, 0.31 to 0.35 at int3, 0.34 to 0.38 at
    int2."""
    for scheme, group_size in (("int4", None), ("int3", 16), ("int2", 16)):
        rounded, solved = lost(scheme, group_size), lost(scheme, group_size, "gptq")
        assert solved[1] < 0.7 * rounded[1], (scheme, rounded, solved)
        assert solved[0] < 0.7 * rounded[0], (scheme, rounded, solved)


def test_awq_loses_no_more_than_rounding():
    """A model without outliers gains little: 0.82 of what rounding loses for one teacher, 1.10 for another; with the
    worst scales that are tried instead of the best, 1.28."""
    ratios = [lost(scheme, 16, "awq")[1] / lost(scheme, 16)[1] for scheme in ("int4", "int3")]
    assert np.mean(ratios) < 1.2, ratios


def test_what_was_cut_out_and_taught_beats_a_fresh_start():
    """Measured (nats): the teacher 1.79, cut 2.44, cut and taught 1.87, fresh and taught 2.93, fresh and not 2.98."""
    model, before = teacher()
    small = slm.shrink(model, mlp_width=64, kv_heads=1, width=40, calibration=calibration())
    changes = {"model": small.config.model, "train.steps": RECOVERY, "optim.warmup_steps": 5}
    cfg = override(BASE, changes | {"distill.teacher": "here"})
    objective = distill_objective(cfg, Transformer(cfg.model), model.transformer)
    program = built(cfg, Techniques(objective=objective, teacher=jax.eval_shape(lambda: model.params)))

    def learned(state):
        batches = text_batches("train", 5)
        for _ in range(RECOVERY):
            state, _ = program.train(state, next(batches), model.params)
        return held_out(program, state.params)

    broken, fresh = held_out(program, small.params), learned(program.init(jax.random.key(3)))
    found = learned(program.start(jax.tree.map(jnp.array, small.params)))
    assert before < found < before + 0.15, (before, broken, found)
    assert (broken - found) / (broken - before) > 0.6, (before, broken, found)
    assert found < fresh - 0.5, (found, fresh)
