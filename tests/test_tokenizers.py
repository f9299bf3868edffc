import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from slm.data import tokenizers
from slm.data.tokenizers import Tokenizer, build_tokenizer, spread_sample
from slm.errors import ConfigError, DataError

TEXT = "The cat sat on the mat. The dog sat on the log.\n\n  def f(x):\n\treturn x\r\n" * 4 + "déjà vu, 漢字 🎉 ½\x00"
STRANGE = ["", " ", "\n", "a <|endoftext|> b", "e\u0301 \ufeff\u200d", "".join(map(chr, range(0x300))), "\U0010ffff"]


def build(spec, *texts):
    return build_tokenizer(spec, lambda: iter(texts or (TEXT,)))


@pytest.fixture(scope="module")
def built():
    return {spec: build(spec) for spec in ("bytes", "chars", "bpe:290")}


@pytest.mark.parametrize("text", [TEXT, *STRANGE])
@pytest.mark.parametrize("spec", ["bytes", "bpe:290"])
def test_byte_level_round_trips_any_text_and_counts_bytes_exactly(built, spec, text):
    ids = built[spec].encode(text)
    assert ids.dtype == np.int32
    assert built[spec].decode(ids) == text
    assert built[spec].token_bytes[ids].sum() == len(text.encode())
    assert built[spec].end_of_text not in ids  # text cannot end a document
    assert ids.tolist() == built[spec].backend.encode(text, add_special_tokens=False).ids


def test_bytes_ids_are_byte_values(built):
    assert built["bytes"].encode("é").tolist() == [0xC3, 0xA9]
    assert built["bytes"].end_of_text == 256
    assert built["bytes"].vocab_size == 257
    assert built["bytes"].token_bytes.tolist() == [1] * 256 + [0]


def test_chars(built):
    tokenizer = built["chars"]
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) == len(TEXT)
    assert tokenizer.token_bytes[ids].sum() == len(TEXT.encode())
    assert tokenizer.vocab_size == len(set(TEXT)) + 2
    unknown = tokenizer.encode("cÿc")
    assert tokenizer.decode(unknown) == "c<unk>c"
    assert tokenizer.token_bytes[unknown].tolist() == [1, 0, 1]
    assert unknown.tolist() == tokenizer.backend.encode("cÿc").ids


def test_bpe_has_its_size_compresses_and_is_deterministic(built):
    assert built["bpe:290"].vocab_size == 290
    assert len(built["bpe:290"].encode(TEXT)) < len(TEXT.encode()) * 0.6
    assert build("bpe:290").fingerprint == built["bpe:290"].fingerprint
    assert build("bpe:289").fingerprint != built["bpe:290"].fingerprint


def test_batch_is_each_text_encoded(built):
    texts = ["The cat", "", "on the mat"]
    for tokenizer in built.values():
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(t).tolist() for t in texts]


def test_long_texts_are_cut_only_where_it_changes_nothing(built):
    rng = np.random.default_rng(0)
    long = "".join(rng.choice(["the", " ", "\n", "\n\n", " \n", "\n x", "cat\n", "1."], 120_000))
    tokenizer = built["bpe:290"]
    assert len(list(tokenizer._pieces(long))) >= 2
    assert tokenizer.encode(long).tolist() == tokenizer.backend.encode(long, add_special_tokens=False).ids


def test_markers_become_ids_only_when_asked_for(built):
    for tokenizer in built.values():
        text = "The cat<|endoftext|>"
        assert tokenizer.encode(text, markers=True)[-1] == tokenizer.end_of_text
        assert tokenizer.end_of_text not in tokenizer.encode(text)
        assert tokenizer.decode([*tokenizer.encode("The cat"), tokenizer.end_of_text]) == "The cat"


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:290"])
def test_save_and_load(built, spec, tmp_path):
    tokenizer = built[spec]
    assert tokenizer.save(tmp_path) == tmp_path / "tokenizer.json"
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXT + "<|endoftext|>").tolist() == tokenizer.encode(TEXT + "<|endoftext|>").tolist()
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert build_tokenizer(str(tmp_path), None).fingerprint == tokenizer.fingerprint


def test_lone_surrogates_are_refused(built):
    for tokenizer in built.values():
        with pytest.raises(DataError, match="surrogate at character 2"):
            tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("spec", ["bpe:256", "bpe:", "bpe:1e4", "byte", "bpe", "nowhere.json"])
def test_bad_specs(spec):
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        build(spec)


def test_vocabulary_larger_than_the_text_supports_is_refused():
    with pytest.raises(DataError, match="yields only"):
        build("bpe:5000")


def test_damaged_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(DataError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "elsewhere")


def test_metaspace_with_byte_fallback_counts_bytes():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "▁a": 4, "b": 5, "ü": 6, "a": 7}
    vocabulary |= {f"<0x{byte:02X}>": 8 + byte for byte in range(256)}
    backend = Backend(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.enable_truncation(2)
    tokenizer = Tokenizer(backend)
    assert tokenizer.end_of_text_token == "</s>"
    ids = tokenizer.encode("ab ü漢 </s>")
    assert tokenizer.end_of_text not in ids
    # The first byte is the space that the normalizer puts before every text.
    assert tokenizer.token_bytes[ids].sum() == len(" ab ü漢 </s>".encode())
    assert tokenizer.token_bytes[:3].tolist() == [0, 0, 0]


def test_wordpiece_counts_words_and_the_space_before_them():
    backend = Backend(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "play": 2, "##ing": 3, "we": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_bytes[tokenizer.encode("we playing")].tolist() == [3, 5, 3]
    assert tokenizer.token_bytes[:2].tolist() == [0, 0]
    assert tokenizer.end_of_text == 1


def test_tokenizer_without_any_separator():
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    assert Tokenizer(backend).end_of_text is None
    assert Tokenizer(backend).end_of_text_token is None


def test_added_words_count_their_own_bytes(built, tmp_path):
    path = built["bpe:290"].save(tmp_path)
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 290, "content": "Grüße", "special": False})
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("Grüße").tolist() == [290]
    assert tokenizer.token_bytes[290] == len("Grüße".encode())


def test_sample_is_bounded_and_spread_over_all_documents(monkeypatch):
    monkeypatch.setattr(tokenizers, "_PIECE_CHARACTERS", 10)
    texts = ["a" * 1000, "b" * 30, "c" * 500, "d" * 1000]
    sample = "".join(spread_sample(lambda: iter(texts), 253))
    assert 223 <= len(sample) <= 253
    for letter, text in zip("abcd", texts):
        assert sample.count(letter) == pytest.approx(len(text) / 10, abs=10)
    assert "".join(spread_sample(lambda: iter(texts), 10_000)) == "".join(texts)
