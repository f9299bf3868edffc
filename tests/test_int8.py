"""8-bit weights: rounded to the nearest, read in every mechanism, decoded as they are read at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slm
from slm.config import Experiment, ModelConfig
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError
from slm.evaluation.generate import generate_tokens
from slm.evaluation.sampling import make_sampling
from slm.models.int8 import Int8Matrix, int8_product, int8_similarity, to_int8
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

CASES = {
    "tied": {},
    "untied, biases": {"tied": False, "bias": ("qkv", "out", "mlp", "norm"), "norm": "layernorm"},
    "delta": {"attention": ("gated_delta",)},
    "latent": {"attention": ("mla",)},
    "rwkv": {"attention": ("rwkv7",)},
    "mamba": {"attention": ("mamba2",)},
}


def made(**changes):
    cfg = ModelConfig(**{"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2} | changes)
    shapes, rng = jax.eval_shape(Transformer(cfg).init, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), shapes)
    return LanguageModel(params, Experiment(model=cfg), build_tokenizer("bytes", lambda: iter(())))


@pytest.mark.parametrize("inputs", [-2, -1])
def test_every_output_has_its_own_steps(inputs):
    matrix = np.random.default_rng(0).normal(size=(3, 12, 8)) * np.array([1, 1e-3, 100])[:, None, None]
    matrix[0, :, 0] = matrix[0, 0] = 0
    found = to_int8(jnp.asarray(matrix, jnp.float32), inputs)
    assert found.values.dtype == jnp.int8
    step = np.abs(matrix).max(inputs, keepdims=True) / 127
    assert found.scale.shape == step.shape
    assert (np.abs(found.astype(jnp.float32) - matrix) <= 0.5001 * step).all()
    assert np.abs(found.values).max() == 127


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_products_are_those_of_the_dequantized_matrix(rows):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(rows, 12)), jnp.float32)
    kernel = to_int8(jnp.asarray(rng.normal(size=(12, 7)), jnp.float32), -2)
    table = to_int8(jnp.asarray(rng.normal(size=(9, 12)), jnp.float32), -1)
    np.testing.assert_allclose(int8_product(x, kernel), x @ kernel.astype(jnp.float32), atol=1e-5)
    np.testing.assert_allclose(int8_similarity(x, table), x @ table.astype(jnp.float32).T, atol=1e-5)
    np.testing.assert_allclose(table[jnp.array([3, 0])], table.astype(jnp.float32)[jnp.array([3, 0])])


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_model_is_the_model_of_its_rounded_weights(name):
    model = made(**CASES[name])
    small = slm.int8_weights(model)
    matrices = [leaf for leaf in jax.tree.leaves(small.params, is_leaf=_is_matrix) if _is_matrix(leaf)]
    quantized = sum(m.values.size for m in matrices) / sum(a.size for a in jax.tree.leaves(model.params))
    assert quantized > (0.6 if name == "latent" else 0.9)
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32) if _is_matrix(a) else a, small.params, is_leaf=_is_matrix)
    tokens = np.arange(20)[None] * 7 % 64
    want = np.asarray(slm.logits(dataclasses.replace(model, params=rounded), tokens))
    found = np.asarray(slm.logits(small, tokens))
    np.testing.assert_allclose(found, want, atol=3e-5 * np.abs(want).max())
    error = np.sqrt(np.square(found - slm.logits(model, tokens)).mean() / np.square(want).mean())
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("name", ["tied", "untied, biases"])
def test_it_is_scored_as_its_logits_say(name):
    model = slm.int8_weights(made(**{"vocab_size": 320} | CASES[name]))
    text = "twelve quick words, and then some more of them"
    tokens = np.array([256, *text.encode()])[None]
    log_p = jax.nn.log_softmax(slm.logits(model, tokens[:, :-1]))
    nats = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], 2).sum()
    scores = slm.evaluate(model, text)
    assert scores["loss"] * scores["tokens"] == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_it_writes_what_its_forward_pass_says(count):
    """One row and several are multiplied differently."""
    model = slm.int8_weights(made())
    prompts = [np.array([5, 9, 2], np.int32)] * count
    how = {"max_new_tokens": 6, "sampling": make_sampling(temperature=0)}
    rows = generate_tokens(model.transformer, model.params, prompts, **how)
    text = np.concatenate([prompts[0], rows[-1]])
    likeliest = np.asarray(slm.logits(model, text[None, :-1])).argmax(-1)[0, 2:]
    np.testing.assert_array_equal(rows[-1], likeliest)


def test_it_is_for_running_alone(tmp_path):
    model = slm.int8_weights(made())
    for save in (slm.save_pretrained, slm.save_gguf, slm.save_stablehlo, slm.save_onnx):
        with pytest.raises(ConfigError, match="for running only"):
            save(model, tmp_path / "folder")
    with pytest.raises(ConfigError, match="for running only"):
        slm.int8_weights(model)
    with pytest.raises(ConfigError, match=r"model\.head = masked_lm"):
        slm.int8_weights(made(head="masked_lm", causal=False))


def _is_matrix(leaf):
    return isinstance(leaf, Int8Matrix)
