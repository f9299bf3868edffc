"""GGUF: what is written reads back, quantized within a block's error; damaged files end in one clear error."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from tiny_gguf import MODELS, TEXT, made, pieces

import slm
from slm.config import RopeConfig
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError, SlmError
from slm.interop.families import FAMILIES
from slm.interop.gguf_file import GGUFTensors
from slm.interop.gguf_tokenizer import SPLITTERS, read_tokenizer, write_tokenizer
from slm.models.language_model import Origin
from slm.models.transformer import Transformer

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("bpe:280", lambda: iter([TEXT]))


TOKENS = np.arange(24)[None] * 7 % 280


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_reads_back(name, tokenizer, tmp_path):
    model = made(name, tokenizer)
    again = slm.from_pretrained(slm.save_gguf(model, tmp_path / "model.gguf", "F32"))
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["general.architecture"].contents() == name.split()[0]
    # Gemma's norms are stored plus one, Mamba's decays without their logarithm, which costs their last bits.
    near = functools.partial(np.testing.assert_allclose, atol=3e-7)
    jax.tree.map(
        near if name.startswith(("gemma", "mamba")) else np.testing.assert_array_equal, model.params, again.params
    )
    np.testing.assert_allclose(slm.logits(again, TOKENS), slm.logits(model, TOKENS), atol=1e-4)
    for text in ("the cat sat", "a hat\n\n 1234 é", ""):
        np.testing.assert_array_equal(again.tokenizer.encode(text), tokenizer.encode(text))
    # And on to a Hugging Face folder, with everything that belongs to it.
    folder = slm.save_pretrained(again, tmp_path / "folder")
    jax.tree.map(np.testing.assert_array_equal, slm.from_pretrained(folder).params, again.params)


def test_a_model_of_bytes_travels(tmp_path):
    tokenizer = build_tokenizer("bytes", lambda: iter(()))
    again = slm.from_pretrained(slm.save_gguf(made("llama", tokenizer), tmp_path / "model.gguf"))
    np.testing.assert_array_equal(again.tokenizer.encode("it's 12 é\n\n x"), tokenizer.encode("it's 12 é\n\n x"))


def test_queries_and_keys_stand_in_the_order_of_llama_cpp(tokenizer, tmp_path):
    model = made("llama", tokenizer)
    reader = gguf.GGUFReader(slm.save_gguf(model, tmp_path / "model.gguf", "F32"))
    stored = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight").data
    rows = np.asarray(model.params["blocks"]["0"]["mixer"]["query"]["kernel"][0]).T
    # Its rotation turns dimension 2 i with 2 i + 1, ours i with i + 8.
    np.testing.assert_array_equal(stored[:4], rows[[0, 8, 1, 9]])


def stored(name, tokenizer, tmp_path):
    """(parameters of the first layer, tensors of the file, metadata without the architecture's name)."""
    model = made(name, tokenizer)
    reader = gguf.GGUFReader(slm.save_gguf(model, tmp_path / "model.gguf", "F32"))
    layer = jax.tree.map(lambda x: np.asarray(x[0]), model.params["blocks"]["0"])
    values = {key.removeprefix(name.split()[0] + "."): field.contents() for key, field in reader.fields.items()}
    return layer, {t.name: np.asarray(t.data) for t in reader.tensors}, values


# What llama.cpp was seen to take these files for (tests/oracle/check_gguf.py): reading back misses errors made twice.
def test_tensors_stand_as_llama_cpp_stores_them(tokenizer, tmp_path):
    layer, tensors, _ = stored("gemma", tokenizer, tmp_path)
    np.testing.assert_array_equal(tensors["blk.0.attn_norm.weight"], layer["attention_norm"]["scale"] + 1)
    for name, fused in (("gpt2", "attn_qkv"), ("gptneox", "attn_qkv"), ("phi3", "attn_qkv")):
        layer, tensors, _ = stored(name, tokenizer, tmp_path)
        parts = [layer["mixer"][part]["kernel"].T for part in ("query", "key", "value")]
        np.testing.assert_array_equal(tensors[f"blk.0.{fused}.weight"], np.concatenate(parts))
        if name == "gpt2":
            np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight"], layer["mlp"]["up"]["kernel"].T)
        if name == "phi3":
            both = np.concatenate([layer["mlp"][part]["kernel"].T for part in ("gate", "up")])
            np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight"], both)
    layer, tensors, _ = stored("mamba2", tokenizer, tmp_path)
    np.testing.assert_allclose(tensors["blk.0.ssm_a"][:, 0], -np.exp(layer["mixer"]["decay"]), rtol=1e-6)
    assert tensors["blk.0.ssm_conv1d.weight"].shape == (8 * 16 + 2 * 2 * 32, 4)
    assert tensors["blk.0.ssm_norm.weight"].shape == (2, 64)


@pytest.mark.parametrize(("name", "expected"), [
    ("gemma2", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "attention.sliding_window": 5,
                "attention.key_length": 24}),
    ("gemma3", {"attention.sliding_window": 5, "rope.freq_base": 1000.0, "rope.freq_base_swa": 50.0,
                "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
    ("gemma3 in an order of its own", {"attention.sliding_window_pattern": [False, True] * 2}),
    ("granite", {"embedding_scale": 6.0, "residual_scale": 0.22, "logit_scale": 1.7, "attention.scale": 0.2}),
    ("phi2", {"rope.dimension_count": 8, "attention.layer_norm_epsilon": 1e-5}),
    ("phi3 long", {"rope.scaling.attn_factor": 1.1, "rope.scaling.original_context_length": 16}),
    ("gptneox", {"rope.dimension_count": 4, "use_parallel_residual": True}),
    ("mamba2", {"ssm.inner_size": 128, "ssm.state_size": 32, "ssm.time_step_rank": 8, "ssm.group_count": 2,
                "ssm.conv_kernel": 4}),
])  # fmt: skip
def test_settings_have_llama_cpps_keys(name, expected, tokenizer, tmp_path):
    _, _, values = stored(name, tokenizer, tmp_path)
    assert {key: pytest.approx(values[key]) for key in expected} == expected


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


def k_quants(kind: str, raw: bytes) -> list[float]:
    """256 numbers of one block, by the layouts that ggml's headers describe."""
    half = [float(x) for x in np.frombuffer(raw, np.float16)] if len(raw) % 2 == 0 else []
    if kind == "Q6_K":  # 128 low nibbles x2, 64 x 4 high pairs, 16 int8 scales, one float16
        low, high, scales, d = raw[:128], raw[128:192], np.frombuffer(raw[192:208], np.int8), half[104]
        out = []
        for i in range(256):
            part, at = divmod(i, 128)
            quarter, lane = divmod(at, 32)
            nibble = low[64 * part + 32 * (quarter % 2) + lane] >> 4 * (quarter // 2) & 15
            pair = high[32 * part + lane] >> 2 * quarter & 3
            out.append(d * int(scales[i // 16]) * ((nibble | pair << 4) - 32))
        return out
    d, smallest, packed = half[0], half[1], raw[4:16]  # 8 scales and 8 minima of six bits in 12 bytes
    scales = [packed[i] & 63 for i in range(4)] + [packed[i + 8] & 15 | packed[i] >> 6 << 4 for i in range(4)]
    minima = [packed[i + 4] & 63 for i in range(4)] + [packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4 for i in range(4)]
    fifth, low = (raw[16:48], raw[48:]) if kind == "Q5_K" else (bytes(32), raw[16:])
    out = []
    for i in range(256):
        group, lane = divmod(i, 32)
        nibble = low[32 * (group // 2) + lane] >> 4 * (group % 2) & 15
        out.append(d * scales[group] * (nibble | (fifth[lane] >> group & 1) << 4) - smallest * minima[group])
    return out


@pytest.mark.parametrize(("kind", "size"), [("Q4_K", 144), ("Q5_K", 176), ("Q6_K", 210)])
def test_k_quants_read_as_their_layouts_say(kind, size, tmp_path):
    draw = np.random.default_rng(0)
    raw = draw.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    for block in range(2):  # the float16 of a block are kept small and finite
        for at in [208] if kind == "Q6_K" else [0, 2]:
            scale = draw.standard_normal(3).astype(np.float16)[:, None].view(np.uint8)
            raw[:, block * size + at : block * size + at + 2] = scale
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    tensors = GGUFTensors({"x": tensor}, lambda name, data: data)
    assert tensors.shape("x") == (3, 512)
    expected = [[x for block in (row[:size], row[size:]) for x in k_quants(kind, block.tobytes())] for row in raw]
    np.testing.assert_allclose(tensors.read("x"), expected, rtol=1e-5, atol=1e-5)


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


def spelled(pieces: dict[str, float], text: str) -> list[str]:
    """SentencePiece's rule by its definition: join the neighbours of highest joint score, the leftmost of equals."""
    symbols = list(text)
    while True:
        pairs = [(-pieces[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in pieces]
        if not pairs:
            return symbols
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_with_scores_make_a_tokenizer_and_back(prefix):
    from tokenizers import Tokenizer as Backend

    from slm.data.tokenizers import Tokenizer

    fields = pieces(prefix)
    tokenizer = Tokenizer(Backend.from_str(json.dumps(read_tokenizer(fields))))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = {t: s for t, k, s in zip(tokens, types, fields["tokenizer.ggml.scores"]) if k == 1}
    for text in ("the cat sat on  the mats, cats, hats", "2048 that", "thecatsatonthemat"):
        expected = spelled(scores, "\u2581" * prefix + text.replace(" ", "\u2581"))
        assert [tokens[i] for i in tokenizer.encode(text)] == expected
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokens[i] for i in tokenizer.encode("é")] == ["\u2581"] * prefix + ["<0xC3>", "<0xA9>"]
    assert [tokens[i] for i in tokenizer.encode("<|user|></s>", markers=True)][-2:] == ["<|user|>", "</s>"]
    assert tokenizer.backend.encode("a").ids[0] == 1  # <s>
    written = write_tokenizer(tokenizer, len(tokens))
    assert (written["tokens"], written["types"], written["space_prefix"]) == (tokens, types, prefix)
    again = read_tokenizer(fields | {"tokenizer.ggml.scores": written["scores"]})
    assert again["model"]["merges"] == json.loads(tokenizer.backend.to_str())["model"]["merges"]


def test_merges_that_no_scores_give_are_refused():
    from tokenizers import Tokenizer as Backend

    from slm.data.tokenizers import Tokenizer

    parts = read_tokenizer(pieces())
    parts["model"]["merges"] = parts["model"]["merges"][1:]
    with pytest.raises(ConfigError, match="not those of SentencePiece"):
        write_tokenizer(Tokenizer(Backend.from_str(json.dumps(parts))), 400)


def test_a_damaged_tokenizer_of_pieces_ends_in_one_clear_error():
    fields = pieces()
    with pytest.raises(SlmError, match="lists of tokens, types and scores differ"):
        read_tokenizer(fields | {"tokenizer.ggml.scores": [0.0]})
    fields["tokenizer.ggml.tokens"][-1] = "a" * 100_000
    with pytest.raises(SlmError, match="a token has 100000 characters"):
        read_tokenizer(fields)


def test_what_has_no_form_in_gguf_is_refused(tokenizer, tmp_path):
    model = made("llama", tokenizer)
    with pytest.raises(ConfigError, match=r"one of F32.*only read K-quants, llama.cpp's llama-quantize makes them"):
        slm.save_gguf(model, tmp_path / "x.gguf", "Q4_K")
    with pytest.raises(ConfigError, match="no tokenizer"):
        slm.save_gguf(dataclasses.replace(model, tokenizer=None), tmp_path / "x.gguf")
    chars = build_tokenizer("chars", lambda: iter([TEXT]))
    with pytest.raises(ConfigError, match="this tokenizer"):
        slm.save_gguf(dataclasses.replace(model, tokenizer=chars), tmp_path / "x.gguf")


def test_a_setting_that_the_file_would_lose_is_refused_and_named(tokenizer, tmp_path):
    def refused(name, **changes):
        model = made(name, tokenizer)
        cfg = dataclasses.replace(model.config.model, **changes)
        params = Transformer(cfg).init(jax.random.key(0))
        model = dataclasses.replace(model, config=slm.Experiment(model=cfg), params=params)
        with pytest.raises(ConfigError) as error:
            slm.save_gguf(model, tmp_path / "x.gguf")
        assert not (tmp_path / "x.gguf").exists()
        return str(error.value)

    # llama.cpp turns all but every fourth layer, and scales Gemma's scores by the size of a head.
    message = refused("smollm3", attention=("softmax", "nope_softmax"))
    assert message == "GGUF's smollm3 cannot express this model's model.mixer.rope_fraction"
    mixer = dataclasses.replace(MODELS["gemma2"].mixer, scale=0.5)
    assert "model.mixer.scale" in refused("gemma2", mixer=mixer)
    mixer = dataclasses.replace(MODELS["gemma2"].mixer, softcap=0.0)
    assert "model.mixer.softcap" in refused("gemma2", mixer=mixer)
    assert "model.rope.fast" in refused("llama", rope=RopeConfig(scaling="yarn", factor=4.0, original_length=16,
                                                               fast=20.0, magnitude=1.1386294))  # fmt: skip
    assert "models of family mistral" in refused(
        "llama", attention=("window",), mixer=dataclasses.replace(MODELS["llama"].mixer, window=4)
    )


def test_a_family_without_an_architecture_goes_by_one_that_says_the_same(tokenizer, tmp_path):
    model = made("llama", tokenizer)
    hf = FAMILIES["mistral"].write(model.config.model)
    model = dataclasses.replace(model, origin=Origin("mistral", hf, "float32", {}))
    path = slm.save_gguf(model, tmp_path / "model.gguf", "F32")
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == "llama"
    jax.tree.map(np.testing.assert_array_equal, slm.from_pretrained(path).params, model.params)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "phi3 long", "gptneox", "granite"])
def test_every_key_is_one_of_llama_cpp(name, tokenizer, tmp_path):
    sections = [gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.SSM, gguf.Keys.General,
                gguf.Keys.Tokenizer]  # fmt: skip
    arch = name.split()[0]
    known = {key.replace("{arch}", arch) for part in sections for key in vars(part).values() if isinstance(key, str)}
    reader = gguf.GGUFReader(slm.save_gguf(made(name, tokenizer), tmp_path / "model.gguf", "F32"))
    assert {key for key in reader.fields if not key.startswith("GGUF.")} <= known


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
