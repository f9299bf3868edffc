"""E X2: a trained model shrunk, taught, trained in 8 bits and written: a fifth of the bytes, almost the same loss."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_learner import built, held_out, teacher, text_batches

import slm
from slm.compress.distill import distill_objective
from slm.compress.techniques import shipped, transforms_of
from slm.config import DistillConfig, check, override
from slm.models.language_model import LanguageModel
from slm.training.mesh import make_mesh
from slm.training.step import Techniques, make_transformer

TAUGHT, ROUNDED = 80, 20


def trained(cfg, params, model, steps, seed):
    """State on the host after `steps` steps of distillation from `params`."""
    cfg = check(override(cfg, {"train.steps": steps, "optim.warmup_steps": 5,
                               "distill": DistillConfig(teacher="the whole", alpha=0.9)}))  # fmt: skip
    own = make_transformer(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    objective = distill_objective(cfg, own, model.transformer)
    abstract = jax.eval_shape(lambda: model.params)
    program = built(cfg, Techniques(transforms_of(cfg), objective, abstract))
    state, batches = program.start(jax.tree.map(jnp.array, params)), text_batches("train", seed)
    for _ in range(steps):
        state, _ = program.train(state, next(batches), model.params)
    return cfg, jax.tree.map(np.array, state)


def test_shrunk_taught_rounded_written(tmp_path):
    whole, before = teacher()
    tokens = next(text_batches("train", 9))["tokens"]
    mlp = whole.params["blocks"]["0"]["mlp"]["up"]["kernel"].shape[-1]
    small = slm.shrink(whole, mlp_width=mlp * 3 // 8, calibration=tokens)
    plain = built(small.config)
    lost = held_out(plain, small.params)
    cfg, state = trained(small.config, small.params, whole, TAUGHT, 3)
    back = held_out(plain, state.params)
    assert lost > 1.1 * before
    assert back < 1.05 * before
    grid = {"quantize.scheme": "int8", "quantize.embedding": True, "optim.learning_rate": 5e-4}
    cfg, state = trained(override(small.config, grid), state.params, whole, ROUNDED, 4)
    extra = {"learned": state.extra.learned, "transforms": state.extra.transforms}
    made = LanguageModel(shipped(cfg, state.params, extra, state.step)[1], small.config, None)
    slm.save(made, tmp_path / "model")
    after = held_out(plain, slm.load(tmp_path / "model").params)
    assert after < 1.05 * before, (before, lost, back, after)
    report = slm.compare(whole, made, rounds=0)
    assert report.second.bytes_in_memory < 0.2 * report.first.bytes_in_memory
    # Names and shapes are a tenth of so small a file.
    assert report.second.bytes_on_disk < 0.25 * report.first.bytes_on_disk
    assert report.second.flops_per_token < 0.8 * report.first.flops_per_token
