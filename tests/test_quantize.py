"""Quantized models: stored as small as they say, read in every mechanism, decoded as they are read at once."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slm
from slm.compress.schemes import Scheme, effective_bits
from slm.config import Experiment, ModelConfig
from slm.data.tokenizers import build_tokenizer
from slm.errors import CheckpointError, ConfigError
from slm.evaluation.generate import generate_tokens
from slm.evaluation.sampling import make_sampling
from slm.models.language_model import LanguageModel
from slm.models.quantized import dequantized, is_quantized, product, similarity
from slm.models.transformer import Transformer

CASES = {
    "tied": {},
    "untied, biases": {"tied": False, "bias": ("qkv", "out", "mlp", "norm"), "norm": "layernorm"},
    "delta": {"attention": ("gated_delta",)},
    "latent": {"attention": ("mla",)},
    "rwkv": {"attention": ("rwkv7",)},
    "mamba": {"attention": ("mamba2",)},
}
HOW = {
    "int8": {"scheme": "int8"},
    "int8 groups": {"scheme": "int8", "group_size": 16},
    "int4": {"scheme": "int4", "group_size": 16, "embedding": "int8"},
    "int4 float zero": {"scheme": "int4", "group_size": 16, "symmetric": False, "embedding": "float"},
    "int3": {"scheme": "int3", "embedding": "int8"},
    "int2": {"scheme": "int2", "group_size": 8, "embedding": "int8"},
    "nf4": {"scheme": "nf4", "embedding": "int8"},
    "ternary": {"scheme": "ternary", "embedding": "int8"},
    "fp8": {"scheme": "fp8"},
    "W8A8": {"scheme": "int8", "activations": "int8"},
}
BITS = {"int8": 8, "int4": 4, "int3": 4, "int2": 2, "nf4": 4, "ternary": 2, "fp8": 8}


def made(**changes):
    cfg = ModelConfig(**{"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2} | changes)
    shapes, rng = jax.eval_shape(Transformer(cfg).init, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), shapes)
    return LanguageModel(params, Experiment(model=cfg), build_tokenizer("bytes", lambda: iter(())))


def matrices(model):
    return [leaf for leaf in jax.tree.leaves(model.params, is_leaf=is_quantized) if is_quantized(leaf)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_products_are_those_of_the_dequantized_matrix(how, rows):
    rng, settings = np.random.default_rng(1), {k: v for k, v in HOW[how].items() if k != "embedding"}
    scheme = Scheme(settings.pop("scheme"), **settings)
    x = jnp.asarray(rng.normal(size=(rows, 32)), jnp.float32)
    kernel = scheme.pack(jnp.asarray(rng.normal(size=(32, 7)), jnp.float32))
    assert kernel.shape == (32, 7)
    found, want = product(x, kernel), x @ kernel.astype(jnp.float32)
    if how == "W8A8":
        # Rounded rows: within half a step of each of 32 inputs.
        step = np.abs(x).max(1, keepdims=True) / 127
        assert (np.abs(found - want) <= step / 2 * np.abs(kernel.astype(jnp.float32)).sum(0) + 1e-5).all()
        assert np.abs(found - want).max() > 1e-4
        return
    np.testing.assert_allclose(found, want, atol=1e-5)
    table = dataclasses.replace(scheme, axis=-1).pack(jnp.asarray(rng.normal(size=(9, 32)), jnp.float32))
    np.testing.assert_allclose(similarity(x, table), x @ table.astype(jnp.float32).T, atol=2e-5)
    rows = jnp.array([[3, 0], [8, 8]])
    np.testing.assert_allclose(table[rows], table.astype(jnp.float32)[rows], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["int8", "int4 float zero", "W8A8"])
def test_a_quantized_model_is_the_model_of_its_rounded_weights(name, how):
    model = made(**CASES[name])
    small = slm.quantize(model, **HOW[how])
    count = sum(np.prod(m.shape) for m in matrices(small)) / sum(a.size for a in jax.tree.leaves(model.params))
    assert count > (0.55 if name == "latent" or how == "int4 float zero" else 0.85)
    tokens = np.arange(20)[None] * 7 % 64
    want = np.asarray(slm.logits(slm.dequantize(small), tokens))
    found = np.asarray(slm.logits(small, tokens))
    size = np.abs(want).max()
    np.testing.assert_allclose(found, want, atol=(0.2 if how == "W8A8" else 3e-5) * size)
    error = np.sqrt(np.square(found - slm.logits(model, tokens)).mean() / np.square(want).mean())
    assert 1e-3 < error < (0.6 if how == "int4 float zero" else 0.2)


@pytest.mark.parametrize("how", HOW)
def test_stored_as_small_as_it_says_and_read_back_the_same(how, tmp_path):
    model = made(tied=False)
    small = slm.quantize(model, **HOW[how])
    layers = [m for m in matrices(small) if m.values.ndim == 3]
    for matrix in layers:
        bits, groups = BITS[matrix.format], matrix.scale.shape[-2]
        weights = np.prod(matrix.shape)
        scales = matrix.scale.size * (2 if groups > 1 else 4) * (1 if matrix.zero is None else 2)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(matrix)) == weights * bits / 8 + scales
    assert effective_bits(small.params) < 32 / 2.5
    slm.save(small, tmp_path / "small")
    slm.save(model, tmp_path / "whole")
    on_disk = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "whole")}
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
    assert held <= on_disk["small"] < held + 8000
    assert on_disk["small"] < on_disk["whole"] / 2
    again = slm.load(tmp_path / "small")
    assert jax.tree.structure(again.params) == jax.tree.structure(small.params)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), again.params, small.params)
    )
    assert again.config == small.config
    assert slm.generate(again, "ab", max_new_tokens=5) == slm.generate(small, "ab", max_new_tokens=5)


@pytest.mark.parametrize("name", ["tied", "untied, biases"])
def test_it_is_scored_as_its_logits_say(name):
    model = slm.quantize(made(**{"vocab_size": 320} | CASES[name]), "int8")
    text = "twelve quick words, and then some more of them"
    tokens = np.array([256, *text.encode()])[None]
    log_p = jax.nn.log_softmax(slm.logits(model, tokens[:, :-1]))
    nats = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], 2).sum()
    scores = slm.evaluate(model, text)
    assert scores["loss"] * scores["tokens"] == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("how", ["int8", "int4", "W8A8"])
@pytest.mark.parametrize("count", [1, 3])
def test_it_writes_what_its_forward_pass_says(count, how):
    """One row and several are multiplied differently."""
    model = slm.quantize(made(), **HOW[how])
    prompts = [np.arange(7 + i) % 64 for i in range(count)]
    sampling = make_sampling(temperature=0.0)
    rows = generate_tokens(model.transformer, model.params, prompts, max_new_tokens=12, sampling=sampling)
    text = np.concatenate([prompts[-1], rows[-1]])
    likeliest = np.asarray(slm.logits(model, text[None, :-1])).argmax(-1)[0, len(prompts[-1]) - 1 :]
    agree = (rows[-1] == likeliest).mean()
    assert (
        agree == 1 if how != "W8A8" else agree > 0.7
    )  # a row's largest decides its rounding; sums differ in the last bit


def test_what_training_sees_is_what_is_packed():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 6)), jnp.float32)
    for settings in HOW.values():
        settings = {k: v for k, v in settings.items() if k != "embedding"}
        scheme = Scheme(settings.pop("scheme"), **settings)
        eager = scheme.fake(w)
        np.testing.assert_allclose(jax.jit(scheme.pack)(w).astype(jnp.float32), eager, atol=3e-7)
        np.testing.assert_array_equal(scheme.pack(w).astype(jnp.float32), eager)


def test_it_is_for_running_alone(tmp_path):
    model = slm.quantize(made(), "int8")
    for save in (slm.save_pretrained, slm.save_stablehlo, slm.save_onnx):
        with pytest.raises(ConfigError, match="which is for running it"):
            save(model, tmp_path / "folder")
    with pytest.raises(ConfigError, match="which is for running it"):
        slm.quantize(model, "int8")
    with pytest.raises(ConfigError, match=r"model\.head = masked_lm"):
        slm.quantize(made(head="masked_lm", causal=False), "int8")
    slm.quantize(slm.dequantize(model), "int8")


@pytest.mark.parametrize(("settings", "message"), [
    ({"scheme": "int5"}, "scheme = 'int5': one of int8, int4"),
    ({"scheme": "int4"}, "say what becomes of the embedding"),
    ({"scheme": "int4", "group_size": 12, "embedding": "int8"}, "12 does not divide the 32 inputs of blocks/0/"),
    ({"scheme": "nf4", "symmetric": False, "embedding": "int8"}, "nf4 has no zero point"),
    ({"scheme": "int8", "skip": (".*/quer/kernel",)}, "skip = '.*/quer/kernel' matches no matrix"),
    ({"scheme": "int4", "activations": "int8", "embedding": "int8"}, "need scheme = int8"),
    ({"scheme": "int8", "method": "magic"}, "method = 'magic': one of rtn"),
    ({"scheme": "int8", "embedding": "fp8"}, "embedding = 'fp8': int8 or float"),
])  # fmt: skip
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        slm.quantize(made(), **settings)


def test_a_damaged_folder_is_one_error(tmp_path):
    small = slm.quantize(made(), "int4", group_size=16, embedding="int8")
    slm.save(small, tmp_path / "m")
    described = json.loads((tmp_path / "m" / "quantization.json").read_text())
    name = "blocks/0/mlp/up/kernel"
    for change, message in [
        ({"format": "int9"}, "does not fit the model"),
        ({"inputs": 31}, "does not fit the model"),
        ({"format": "int8"}, "has shape"),
    ]:
        (tmp_path / "m" / "quantization.json").write_text(json.dumps(described | {name: described[name] | change}))
        with pytest.raises(CheckpointError, match=message):
            slm.load(tmp_path / "m")
    (tmp_path / "m" / "quantization.json").write_text(json.dumps({"blocks/9/x": described[name]}))
    with pytest.raises(CheckpointError, match="blocks/9/x, which the model does not have"):
        slm.load(tmp_path / "m")
    (tmp_path / "m" / "quantization.json").unlink()
    with pytest.raises(CheckpointError, match="does not hold the tensors of its config"):
        slm.load(tmp_path / "m")
    with pytest.raises(ConfigError, match="holds something else"):
        slm.save(small, tmp_path)


def test_dequantized_parameters_are_floats():
    params = dequantized(slm.quantize(made(), "int4", embedding="int8").params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
