"""Quantized models as GGUF: the codes in the file are the model's own, read by the gguf package."""

import gguf
import jax
import numpy as np
import pytest
from tiny_gguf import TEXT, made

import slm
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError
from slm.models.quantized import dequantized

TOKENS = np.arange(40).reshape(2, 20) * 7 % 250
FORMS = {
    "Q4_0": {"scheme": "int4", "group_size": 32},
    "Q4_1": {"scheme": "int4", "group_size": 32, "symmetric": False},
    "Q8_0": {"scheme": "int8", "group_size": 32},
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("bpe:280", lambda: iter([TEXT]))


def quantized(name, tokenizer, architecture, **changes):
    return slm.quantize(made(architecture, tokenizer), **{"embedding": True} | FORMS[name] | changes)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *((name, "llama") for name in FORMS),
        ("Q4_1", "qwen2"),
        ("Q4_0", "gemma3"),
        ("Q8_0", "phi3"),
        ("Q4_1", "gpt2"),
        ("Q4_0", "gptneox"),
    ],
)
def test_the_file_holds_the_models_own_codes(name, architecture, tokenizer, tmp_path):
    """Exactly: what slm reads back (by the gguf package's dequantizer) are the weights of the quantized model. Weights
    that GPTQ has chosen do not fill their groups' ranges, so quantizing them again would change them."""
    how = {"method": "gptq", "calibration": TOKENS} if architecture == "llama" else {}
    model = quantized(name, tokenizer, architecture, **how)
    path = slm.save_gguf(model, tmp_path / "model.gguf", "F32")
    again = slm.from_pretrained(path)
    want = dequantized(model.params)
    for (where, found), one in zip(jax.tree.leaves_with_path(again.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(found, one, atol=1e-6 if one.ndim < 3 else 0, err_msg=str(where))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == name
    assert kinds["token_embd.weight"] == "Q8_0"


def test_larger_groups_and_floats_beside(tokenizer, tmp_path):
    model = slm.quantize(made("llama", tokenizer), "int4", group_size=32, embedding=False, skip=(".*/down/kernel",))
    path = slm.save_gguf(model, tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (kinds["blk.1.attn_q.weight"], kinds["blk.1.ffn_down.weight"]) == ("Q4_0", "F16")
    assert gguf.GGUFReader(path).fields["general.file_type"].contents() == 2
    wide = slm.quantize(made("llama", tokenizer), "int4", group_size=64, embedding=False, skip=(".*/down/kernel",))
    again = slm.from_pretrained(slm.save_gguf(wide, path, "F32"))
    found = again.params["blocks"]["0"]["mixer"]["query"]["kernel"]
    np.testing.assert_array_equal(found, dequantized(wide.params)["blocks"]["0"]["mixer"]["query"]["kernel"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int8"}, "in int8 with one scale an output: quantize with group_size = 32"),
        ({"scheme": "nf4", "group_size": 32}, "no form for .* in nf4 with groups of 32"),
        ({"scheme": "int4", "group_size": 16}, "int4 with groups of 16"),
        ({"scheme": "int8", "group_size": 32, "symmetric": False}, "in asymmetric int8"),
        ({"scheme": "ternary"}, "in ternary"),
    ],
)
def test_what_has_no_form_is_refused_before_anything_is_written(settings, message, tokenizer, tmp_path):
    model = slm.quantize(made("llama", tokenizer), **{"embedding": False} | settings)
    with pytest.raises(ConfigError, match=message):
        slm.save_gguf(model, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_one_tensor_has_one_type(tokenizer, tmp_path):
    """Phi-3 stores queries, keys and values together."""
    model = slm.quantize(made("phi3", tokenizer), "int4", group_size=32, embedding=False, skip=(".*/key/kernel",))
    with pytest.raises(ConfigError, match="as one tensor: quantize all of them alike"):
        slm.save_gguf(model, tmp_path / "model.gguf")


def test_codes_that_the_file_would_change_are_refused(tokenizer, tmp_path, monkeypatch):
    from slm.interop import gguf_save

    arch = gguf_save.ARCHS["llama"]
    twice = arch._replace(change=lambda name, data, cfg, back: data * 2)
    monkeypatch.setitem(gguf_save.ARCHS, "llama", twice)
    with pytest.raises(ConfigError, match="cannot hold model"):
        slm.save_gguf(quantized("Q4_0", tokenizer, "llama"), tmp_path / "model.gguf")
