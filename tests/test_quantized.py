"""Quantized matrices in a model: read in every mechanism, decoded as they are read at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slm
from slm.compress.schemes import Scheme
from slm.config import Experiment, ModelConfig
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError
from slm.evaluation.generate import generate_tokens
from slm.evaluation.sampling import make_sampling
from slm.models.language_model import LanguageModel
from slm.models.quantized import is_quantized
from slm.models.quantized_products import quantized_product, quantized_similarity
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


SCHEMES = {
    "int8": Scheme("int8"),
    "int8 g4 from zero": Scheme("int8", 4, False),
    "int8 from zero": Scheme("int8", None, False),
    "int4 g4": Scheme("int4", 4),
    "int4 from zero": Scheme("int4", None, False),
    "int2 g4": Scheme("int2", 4),
    "int3": Scheme("int3"),
    "nf4": Scheme("nf4"),
    "ternary": Scheme("ternary"),
    "ternary g4": Scheme("ternary", 4),
    "fp8": Scheme("fp8"),
}


@pytest.mark.parametrize("inputs", [-2, -1])
def test_every_output_has_its_own_steps(inputs):
    matrix = np.random.default_rng(0).normal(size=(3, 12, 8)) * np.array([1, 1e-3, 100])[:, None, None]
    matrix[0, :, 0] = matrix[0, 0] = 0
    found = Scheme("int8").pack(jnp.asarray(matrix, jnp.float32), inputs=inputs)
    assert found.values.dtype == jnp.int8
    step = np.abs(matrix).max(inputs, keepdims=True) / 127
    assert found.scale.shape == step.shape
    assert (np.abs(found.astype(jnp.float32) - matrix) <= 0.501 * step).all()
    assert np.abs(found.values).max() == 127


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_those_of_the_dequantized_matrix(name, rows):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(rows, 12)), jnp.float32)
    kernel = SCHEMES[name].pack(jnp.asarray(rng.normal(size=(12, 7)), jnp.float32))
    table = SCHEMES[name].pack(jnp.asarray(rng.normal(size=(9, 12)), jnp.float32), inputs=-1)
    found = jax.jit(quantized_product)(x, kernel)
    np.testing.assert_allclose(found, x @ kernel.astype(jnp.float32), atol=2e-5)
    np.testing.assert_allclose(quantized_similarity(x, table), x @ table.astype(jnp.float32).T, atol=2e-5)
    np.testing.assert_allclose(table[jnp.array([3, 0])], table.astype(jnp.float32)[jnp.array([3, 0])])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", [name for name in SCHEMES if SCHEMES[name].name not in ("nf4", "fp8")])
def test_products_of_integers_are_those_of_rounded_tokens(name, rows):
    """In float64: what is rounded is multiplied exactly."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(rows, 24)) * [[5], [0.1], [1]][:rows], jnp.float32)
    scheme = dataclasses.replace(SCHEMES[name], activations="int8")
    kernel = scheme.pack(jnp.asarray(rng.normal(size=(24, 6)), jnp.float32))
    step = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True) / 127
    want = np.round(np.asarray(x, np.float64) / step) * step @ np.asarray(kernel.astype(jnp.float32), np.float64)
    np.testing.assert_allclose(jax.jit(quantized_product)(x, kernel), want, atol=2e-5 * np.abs(want).max())
    lowered = jax.jit(quantized_product).lower(x, kernel).as_text()
    if rows > 1:
        assert "tensor<1x3x24xi8>" in lowered or "xi8>, tensor<" in lowered, "no product of integers"


def test_slices_scans_and_maps_of_stacked_matrices():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 6)), jnp.float32)
    for scheme in (Scheme("int4", 5, False), Scheme("int2"), Scheme("ternary")):
        stacked = scheme.pack(w)
        whole = stacked.astype(jnp.float32)
        _, scanned = jax.lax.scan(lambda c, m: (c, m.astype(jnp.float32)), 0, stacked)
        mapped = jax.vmap(lambda m: m.astype(jnp.float32))(stacked)
        second = jax.tree.map(lambda a: a[1], stacked)
        assert second.shape == (10, 6)
        for found in (scanned, mapped):
            np.testing.assert_array_equal(found, whole)
        np.testing.assert_array_equal(second.astype(jnp.float32), whole[1])
        paths = [
            jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path({"k": stacked})
        ]
        assert paths == ["k/values", "k/scale", "k/zero"][: len(paths)]


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_model_is_the_model_of_its_rounded_weights(name):
    model = made(**CASES[name])
    small = slm.quantize(model, "int8")
    matrices = [leaf for leaf in jax.tree.leaves(small.params, is_leaf=is_quantized) if is_quantized(leaf)]
    quantized = sum(np.prod(m.shape) for m in matrices) / sum(a.size for a in jax.tree.leaves(model.params))
    assert quantized > (0.6 if name == "latent" else 0.9)
    rounded = jax.tree.map(
        lambda a: a.astype(jnp.float32) if is_quantized(a) else a, small.params, is_leaf=is_quantized
    )
    tokens = np.arange(20)[None] * 7 % 64
    want = np.asarray(slm.logits(dataclasses.replace(model, params=rounded), tokens))
    found = np.asarray(slm.logits(small, tokens))
    np.testing.assert_allclose(found, want, atol=3e-5 * np.abs(want).max())
    error = np.sqrt(np.square(found - slm.logits(model, tokens)).mean() / np.square(want).mean())
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("name", ["tied", "untied, biases"])
def test_it_is_scored_as_its_logits_say(name):
    model = slm.quantize(made(**{"vocab_size": 320} | CASES[name]), "int8")
    text = "twelve quick words, and then some more of them"
    tokens = np.array([256, *text.encode()])[None]
    log_p = jax.nn.log_softmax(slm.logits(model, tokens[:, :-1]))
    nats = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], 2).sum()
    scores = slm.evaluate(model, text)
    assert scores["loss"] * scores["tokens"] == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_it_writes_what_its_forward_pass_says(count):
    """One row and several are multiplied differently."""
    model = slm.quantize(made(), "int8")
    prompts = [np.array([5, 9, 2], np.int32)] * count
    how = {"max_new_tokens": 6, "sampling": make_sampling(temperature=0)}
    rows = generate_tokens(model.transformer, model.params, prompts, **how)
    text = np.concatenate([prompts[0], rows[-1]])
    likeliest = np.asarray(slm.logits(model, text[None, :-1])).argmax(-1)[0, 2:]
    np.testing.assert_array_equal(rows[-1], likeliest)


def test_it_is_for_running_alone(tmp_path):
    model = slm.quantize(made(), "int8")
    for save in (slm.save_pretrained, slm.save_stablehlo, slm.save_onnx):
        with pytest.raises(ConfigError, match="for running only"):
            save(model, tmp_path / "folder")
    with pytest.raises(ConfigError, match="for running only"):
        slm.quantize(model, "int8")
    with pytest.raises(ConfigError, match=r"model\.head = masked_lm"):
        slm.quantize(made(head="masked_lm", causal=False), "int8")
