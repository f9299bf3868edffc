import errno
import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from slm.data import corpus
from slm.data.corpus import Corpus, open_corpus
from slm.data.splits import content_hash
from slm.data.tokenizers import Tokenizer, build_tokenizer
from slm.errors import DataError

TEXTS = ["one", "zwö und", "three three three"]


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return build_tokenizer("bytes", None)


def never():
    raise AssertionError("the cache was not used")


@pytest.mark.parametrize("batch", [1, 8, 10**6])
def test_documents_lie_one_after_another_each_behind_an_end_of_text(bytes_tokenizer, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(corpus, "_BATCH_CHARACTERS", batch)
    cached = open_corpus("x", ("key",), lambda: iter(TEXTS), bytes_tokenizer, tmp_path)
    expected = [token for text in TEXTS for token in (256, *text.encode())]
    for made in (cached, Corpus.from_texts(TEXTS, bytes_tokenizer)):
        assert made.tokens.tolist() == expected
        assert made.tokens.dtype == np.uint16
        assert made.documents == 3
        assert made.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]
        assert made.offsets.tolist() == [0, 4, 13, 31]
        assert made.hashes.tolist() == [content_hash(text) for text in TEXTS]


def test_second_opening_reads_the_cache_memory_mapped(bytes_tokenizer, tmp_path):
    first = open_corpus("x", ("key",), lambda: iter(TEXTS), bytes_tokenizer, tmp_path)
    second = open_corpus("x", ("key",), never, bytes_tokenizer, tmp_path)
    assert isinstance(second.tokens, np.memmap)
    assert second.tokens.tolist() == first.tokens.tolist()
    assert second.fingerprint == first.fingerprint


def test_another_key_or_tokenizer_is_another_corpus(bytes_tokenizer, tmp_path):
    chars = build_tokenizer("chars", lambda: iter(TEXTS))
    made = [
        open_corpus("x", key, lambda: iter(TEXTS), tokenizer, tmp_path)
        for key, tokenizer in ((("a",), bytes_tokenizer), (("b",), bytes_tokenizer), (("a",), chars))
    ]
    assert len({one.fingerprint for one in made}) == 3


def test_wide_vocabulary_is_stored_in_32_bits(tmp_path):
    backend = Backend(models.WordLevel({f"w{i}": i for i in range(70_000)} | {"?": 70_000}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = open_corpus("x", (), lambda: iter(["w69999 w3", "  ", "w1"]), Tokenizer(backend), tmp_path)
    assert made.tokens.dtype == np.uint32
    assert made.tokens.tolist() == [69_999, 3, 1]
    assert made.offsets.tolist() == [0, 2, 3]  # the text that left no token is no document


def test_full_disk_leaves_no_half_written_corpus(bytes_tokenizer, tmp_path, monkeypatch):
    def full(path, array):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = open_corpus("x", ("kept",), lambda: iter(TEXTS), bytes_tokenizer, tmp_path)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match="disk full"):
        open_corpus("x", ("new",), lambda: iter(TEXTS), bytes_tokenizer, tmp_path)
    folders = [path.name for path in (tmp_path / "corpora").iterdir() if path.is_dir()]
    assert folders == [kept.fingerprint]
    assert open_corpus("x", ("kept",), never, bytes_tokenizer, tmp_path).tokens.tolist() == kept.tokens.tolist()


def test_damaged_cache_is_named(bytes_tokenizer, tmp_path):
    made = open_corpus("x", (), lambda: iter(TEXTS), bytes_tokenizer, tmp_path)
    tokens = tmp_path / "corpora" / made.fingerprint / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"is damaged \(30 tokens instead of 31\): delete it"):
        open_corpus("x", (), never, bytes_tokenizer, tmp_path)
    meta = tokens.with_name("meta.json")
    meta.write_text(json.dumps({}))
    with pytest.raises(DataError, match="is damaged"):
        open_corpus("x", (), never, bytes_tokenizer, tmp_path)


def test_no_text_is_refused(bytes_tokenizer, tmp_path):
    with pytest.raises(DataError, match="is empty"):
        Corpus.from_texts([], bytes_tokenizer)
    with pytest.raises(DataError, match="holds no documents"):
        open_corpus("x", (), lambda: iter([]), bytes_tokenizer, tmp_path)
