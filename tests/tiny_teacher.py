"""A student, a teacher of another shape, and a ragged batch, for tests of distillation."""

import functools

import jax
import numpy as np
from tiny_batch import one_document

from slm.compress.distill import distill_objective
from slm.config import DataConfig, Experiment, MeshConfig, ModelConfig, OptimConfig, TrainConfig, override
from slm.models.transformer import Transformer
from slm.training.mesh import make_mesh
from slm.training.step import Techniques, build

B, T, V = 4, 12, 31
BASE = Experiment(
    model=ModelConfig(vocab_size=V, layers=2, width=16, heads=2),
    data=DataConfig(sequence_length=T),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
    train=TrainConfig(steps=20, batch_size=B, loss_chunk=5),
)
TEACHER = Transformer(ModelConfig(vocab_size=V, layers=4, width=24, heads=4, kv_heads=2, logit_softcap=20.0))
ON = {"distill.teacher": "somewhere"}


def sharp(params, factor=8.0):
    """Parameters whose logits say something: fresh ones are nearly uniform."""
    return jax.tree.map(lambda x: x * factor if x.ndim > 1 else x, params)


@functools.cache
def teacher_params(seed=7):
    return sharp(jax.jit(TEACHER.init)(jax.random.key(seed)), 5.0)


def experiment(**changes) -> Experiment:
    """BASE with `section__field=value` changed, and with a teacher."""
    return override(BASE, ON | {name.replace("__", "."): value for name, value in changes.items()})


def make_batch(seed=0, rows=B):
    """Rows of two documents and padding, with uneven weights."""
    rng = np.random.default_rng(seed)
    at = np.arange(T)
    ends = [[(5, 12), (12, 12), (3, 7), (1, 2)][i % 4] for i in range(rows)]
    segment_ids = np.stack([np.where(at < a, 1, np.where(at < b, 2, 0)) for a, b in ends])
    positions = np.stack([np.where(at < a, at, np.where(at < b, at - a, 0)) for a, b in ends])
    weights = (segment_ids > 0) & (rng.random((rows, T)) < 0.8)
    return {
        "tokens": rng.integers(0, V, (rows, T), dtype=np.int32),
        "targets": rng.integers(0, V, (rows, T), dtype=np.int32),
        "weights": weights.astype(np.float32),
        "segment_ids": segment_ids.astype(np.int32),
        "positions": positions.astype(np.int32),
    }


def program(cfg, objective=None, teacher=None, extra_batch=None, devices=1):
    """The program of a run; `objective` None: plain."""
    techniques = Techniques(objective=objective, teacher=teacher, extra_batch=extra_batch or {})
    return build(cfg, make_mesh(MeshConfig(), jax.devices()[:devices]), techniques)


def distilling(cfg, teacher=TEACHER):
    """The program of `cfg` with an online teacher."""
    abstract = jax.eval_shape(teacher.init, jax.random.key(0))
    return program(cfg, distill_objective(cfg, Transformer(cfg.model), teacher), abstract)


def chain(seed, rows=16):
    """Rows of a Markov chain: mostly a fixed successor, else any token."""
    rng = np.random.default_rng((9, seed))
    text = rng.integers(0, V, (rows, T + 1))
    follows = np.random.default_rng(1).permutation(V)
    for t in range(T):
        text[:, t + 1] = np.where(rng.random(rows) < 0.9, follows[text[:, t]], text[:, t + 1])
    return one_document(text[:, :-1], text[:, 1:])


@functools.cache
def chain_teacher():
    """(a transformer, parameters that know the chain)."""
    cfg = override(BASE, {"model.width": 32, "train.steps": 300, "train.batch_size": 16})
    made = program(cfg)
    state = made.init(jax.random.key(0))
    for step in range(300):
        state, _ = made.train(state, chain(step))
    return made.transformer, state.params
