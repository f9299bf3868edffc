"""GGUF: what is written reads back, quantized within a block's error; damaged files end in one clear error."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import slm
from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError, SlmError
from slm.interop.gguf_tokenizer import SPLITTERS, read_tokenizer
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

gguf = pytest.importorskip("gguf")
TEXT = "the cat sat on the mat, the dog sat on the cat, 2048 mats and hats. " * 20
LLAMA = ModelConfig(
    vocab_size=288, layers=2, width=64, heads=4, kv_heads=2, mlp_width=96, mixer=MixerConfig(qk_norm="none"), tied=False
)
MODELS = {
    "llama": LLAMA,
    "llama 3": dataclasses.replace(
        LLAMA,
        tied=True,
        rope=RopeConfig(theta=500.0, scaling="llama3", factor=4.0, original_length=16, slow=1.0, fast=4.0),
    ),
    "qwen2": dataclasses.replace(LLAMA, bias=("qkv",)),
    "qwen3": dataclasses.replace(LLAMA, mixer=MixerConfig(), head_dim=32, tied=True),
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("bpe:280", lambda: iter([TEXT]))


def made(name, tokenizer):
    cfg = MODELS[name]
    params = Transformer(cfg).init(jax.random.key(0))
    # Norms and biases begin as ones and zeros, which would hide a mistake.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    return LanguageModel(params, slm.Experiment(model=cfg), tokenizer)


TOKENS = np.arange(24)[None] * 7 % 280


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_reads_back(name, tokenizer, tmp_path):
    model = made(name, tokenizer)
    again = slm.from_pretrained(slm.save_gguf(model, tmp_path / "model.gguf", "F32"))
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    np.testing.assert_allclose(slm.logits(again, TOKENS), slm.logits(model, TOKENS), atol=1e-4)
    for text in ("the cat sat", "a hat\n\n 1234 é", ""):
        np.testing.assert_array_equal(again.tokenizer.encode(text), tokenizer.encode(text))
    # And on to a Hugging Face folder, with everything that belongs to it.
    folder = slm.save_pretrained(again, tmp_path / "folder")
    np.testing.assert_allclose(slm.logits(slm.from_pretrained(folder), TOKENS), slm.logits(model, TOKENS), atol=1e-4)


def test_queries_and_keys_stand_in_the_order_of_llama_cpp(tokenizer, tmp_path):
    model = made("llama", tokenizer)
    reader = gguf.GGUFReader(slm.save_gguf(model, tmp_path / "model.gguf", "F32"))
    stored = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight").data
    rows = np.asarray(model.params["blocks"]["0"]["mixer"]["query"]["kernel"][0]).T
    # Its rotation turns dimension 2 i with 2 i + 1, ours i with i + 8.
    np.testing.assert_array_equal(stored[:4], rows[[0, 8, 1, 9]])


@pytest.mark.parametrize(
    ("kind", "error"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2), ("Q5_1", 7e-2), ("Q5_0", 8e-2), ("Q4_1", 0.14),
                        ("Q4_0", 0.17)]
)  # fmt: skip
def test_quantized_files_keep_what_their_blocks_can(kind, error, tokenizer, tmp_path):
    model = made("llama", tokenizer)
    again = slm.from_pretrained(slm.save_gguf(model, tmp_path / "model.gguf", kind))
    was, now = (np.asarray(m.params["blocks"]["0"]["mlp"]["up"]["kernel"]) for m in (model, again))
    assert 0 < np.abs(now - was).max() <= error * np.abs(was).max()
    norms = (m.params["blocks"]["0"]["mlp_norm"]["scale"] for m in (model, again))
    np.testing.assert_array_equal(*norms)


def test_settings_and_chat_template_travel(tokenizer, tmp_path):
    model = made("llama", tokenizer)
    origin_folder = slm.save_pretrained(model, tmp_path / "folder")
    (origin_folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    model = slm.from_pretrained(origin_folder)
    again = slm.from_pretrained(slm.save_gguf(model, tmp_path / "model.gguf"))
    assert again.origin.text("chat_template.jinja") == "{{ messages[0].content }}"
    assert json.loads(again.origin.text("generation_config.json"))["eos_token_id"] == tokenizer.end_of_text
    assert again.config.model.rope == model.config.model.rope


@pytest.mark.parametrize("rule", SPLITTERS)
def test_each_splitting_rule_makes_a_tokenizer(rule):
    from tokenizers import Tokenizer

    from slm.data.token_bytes import byte_alphabet

    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule, "tokenizer.ggml.tokens": byte_alphabet()}
    backend = Tokenizer.from_str(json.dumps(read_tokenizer(fields)))
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("ab 1234!")]
    expected = {
        "gpt-2": ["ab", "Ġ1234", "!"], "smollm": ["ab", "Ġ", "1", "2", "3", "4", "!"],
        "llama-bpe": ["ab", "Ġ", "123", "4", "!"], "qwen2": ["ab", "Ġ", "1", "2", "3", "4", "!"],
    }  # fmt: skip
    assert pieces == expected[rule]


def test_what_has_no_form_in_gguf_is_refused(tokenizer, tmp_path):
    model = made("llama", tokenizer)
    with pytest.raises(ConfigError, match="one of F32"):
        slm.save_gguf(model, tmp_path / "x.gguf", "Q4_K")
    with pytest.raises(ConfigError, match="no tokenizer"):
        slm.save_gguf(dataclasses.replace(model, tokenizer=None), tmp_path / "x.gguf")
    gpt2 = ModelConfig(vocab_size=300, width=32, layers=1, norm="layernorm", mlp="gelu", position="learned",
                       max_length=8, bias=("qkv", "out", "mlp", "norm"), mixer=MixerConfig(qk_norm="none"))  # fmt: skip
    other = LanguageModel(Transformer(gpt2).init(jax.random.key(0)), slm.Experiment(model=gpt2), tokenizer)
    with pytest.raises(ConfigError, match="family gpt2 are not written as GGUF"):
        slm.save_gguf(other, tmp_path / "x.gguf")
    chars = build_tokenizer("chars", lambda: iter([TEXT]))
    with pytest.raises(ConfigError, match="this tokenizer"):
        slm.save_gguf(dataclasses.replace(model, tokenizer=chars), tmp_path / "x.gguf")


DAMAGE = {
    "empty": lambda b: b"",
    "not GGUF": lambda b: b"GGML" + b[4:],
    "cut in the header": lambda b: b[:100],
    "cut in the tensors": lambda b: b[: len(b) - 20_000],
    "absurd counts": lambda b: b[:8] + (2**40).to_bytes(8, "little") * 2 + b[24:],
    "more tensors than there are": lambda b: b[:8] + (1000).to_bytes(8, "little") + b[16:],
    "a key of absurd length": lambda b: b[:24] + (2**50).to_bytes(8, "little") + b[32:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_file_ends_in_one_clear_error(damage, tokenizer, tmp_path):
    path = slm.save_gguf(made("llama", tokenizer), tmp_path / "model.gguf")
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(SlmError, match="damaged or no GGUF file"):
        slm.from_pretrained(path)


@pytest.mark.parametrize(("key", "value"), [("block_count", 2**31), ("attention.head_count", 0)])
def test_absurd_metadata_ends_in_one_clear_error_at_once(key, value, tokenizer, tmp_path):
    path = slm.save_gguf(made("llama", tokenizer), tmp_path / "model.gguf")
    reader = gguf.GGUFReader(path, "r+")
    reader.fields[f"llama.{key}"].parts[-1][0] = value
    del reader
    with pytest.raises(SlmError, match=r"block_count = 2147483648|cannot be used"):
        slm.from_pretrained(path)


def test_a_file_that_is_not_there():
    with pytest.raises(SlmError, match="no file"):
        slm.from_pretrained("nowhere.gguf")
