"""A small model that has learned something from help texts that every Python carries, for tests of what comes after."""

import functools
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
from tiny_batch import one_document

from slm.config import DataConfig, Experiment, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from slm.models.language_model import LanguageModel
from slm.training import step
from slm.training.mesh import make_mesh

B, T, V, STEPS = 16, 64, 128, 500
BASE = Experiment(
    model=ModelConfig(vocab_size=V, layers=2, width=48, heads=4, kv_heads=2),
    data=DataConfig(sequence_length=T, packing="stream"),
    optim=OptimConfig(learning_rate=4e-3, warmup_steps=20),
    train=TrainConfig(steps=STEPS, batch_size=B),
)


def text_batches(rows, seed):
    text = "".join(topics[name] for name in sorted(topics))
    ids = np.array([c for c in text.encode() if c < V], np.int32)
    cut = len(ids) * 9 // 10
    part = ids[:cut] if rows == "train" else ids[cut:]
    rng = np.random.default_rng(seed)
    while True:
        at = rng.integers(0, len(part) - T - 1, B)[:, None] + np.arange(T + 1)
        windows = part[at]
        yield one_document(windows[:, :-1], windows[:, 1:])


def built(cfg, techniques=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiler_options", lambda platform: {})
        return step.build(cfg, make_mesh(MeshConfig(), jax.devices()[:1]), techniques)


def held_out(program, params):
    batches = text_batches("held out", 7)
    return np.mean([np.asarray(program.evaluate(params, next(batches))["nats"]).mean() for _ in range(8)])


@functools.cache
def teacher():
    """(model, its loss on held-out text)."""
    program = built(BASE)
    state, batches = program.init(jax.random.key(1)), text_batches("train", 0)
    for _ in range(STEPS):
        state, _ = program.train(state, next(batches))
    params = jax.tree.map(np.array, state.params)
    return LanguageModel(params, BASE, None), held_out(program, params)
