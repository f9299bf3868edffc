import gzip
import json
import os

import pytest

from slm.config import DataConfig
from slm.data.sources import names_a_source, open_source
from slm.errors import DataError


def documents(spec, **settings):
    return list(open_source(str(spec), DataConfig(**settings)).documents())


def test_cpython_corpus_is_the_documentation_and_the_library_without_tests():
    source = open_source("cpython", DataConfig())
    texts = list(source.documents())
    assert len(texts) > 300
    assert sum('"for"' in text and "target_list" in text for text in texts) >= 1  # help("for")
    assert any("class JSONDecoder" in text for text in texts)
    assert not any("class TestDecimal" in text or "import unittest\nfrom test import support" in text for text in texts)
    assert texts == list(source.documents())
    assert source.fingerprint == open_source("cpython", DataConfig()).fingerprint


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "book.anything"
    path.write_bytes("\ufeffdéjà\r\nvu".encode())
    assert documents(path) == ["déjà\r\nvu"]


def test_folder_reads_text_files_in_order_and_leaves_the_rest(tmp_path):
    for name, text in {"b.txt": "B", "a/z.md": "Z", "a/code.py": "P", "image.png": "no", "empty.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "note.txt").write_text("hidden")
    assert documents(tmp_path) == ["P", "Z", "B"]


def test_jsonl_plain_and_gzipped(tmp_path):
    lines = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(["one", "zwö\nlf"])) + "\n\n"
    (tmp_path / "x.jsonl").write_text(lines)
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(lines)
    assert documents(tmp_path / "x.jsonl") == documents(tmp_path / "x.jsonl.gz") == ["one", "zwö\nlf"]


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"id": [1, 2, 3], "body": ["one", None, "drei"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert documents(tmp_path / "x.parquet", text_field="body") == ["one", "drei"]
    with pytest.raises(DataError, match="no field 'text'; it has id, body"):
        documents(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="column 'id' holds int64"):
        documents(tmp_path / "x.parquet", text_field="id")
    (tmp_path / "y.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        documents(tmp_path / "y.parquet")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "half', r"x\.jsonl:2: not JSON"),
        ("[1]", r"x\.jsonl:2: a JSON object was expected"),
        ('{"body": "b", "id": 1}', r"x\.jsonl:2: no field 'text'; it has body, id: set data\.text_field"),
        ('{"text": 5}', r"x\.jsonl:2: field 'text' holds int"),
        ('{"text": "\\ud800"}', r"x\.jsonl:2: .*surrogate"),
    ],
)
def test_bad_json_lines_name_file_and_line(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "x.jsonl")


def test_broken_gzip(tmp_path):
    whole = gzip.compress(b'{"text": "' + os.urandom(3000).hex().encode() + b'"}\n')
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole gzip file"):
        documents(tmp_path / "x.jsonl.gz")


def test_broken_utf8_names_file_and_offset(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"):
        documents(tmp_path)


def test_missing_source_names_the_nearest(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match=r"did you mean .*shakespeare\.txt"):
        documents(tmp_path / "shakespere.txt")
    with pytest.raises(DataError, match=r"did you mean .*shakespeare\.txt"):
        documents(tmp_path / "shakespeare.text" / "deeper")
    with pytest.raises(DataError, match=r"did you mean cpython\?"):
        documents("cpyhton")
    with pytest.raises(DataError, match=r"did you mean tfds:lm1b/train\?"):
        documents("tdfs:lm1b/train")
    with pytest.raises(DataError, match="empty name"):
        documents("")
    with pytest.raises(DataError, match="a source is cpython"):
        documents(tmp_path / "qqqqqqqqqqqq")


def test_empty_sources_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.txt", "empty.jsonl", "."):
        with pytest.raises(DataError, match="holds no text"):
            documents(tmp_path / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.parquet").write_text("")
    with pytest.raises(DataError, match=r"no text files .* it holds \.parquet"):
        documents(tmp_path / "folder")


@pytest.mark.parametrize("limit", [10**9, 0], ids=["hashed", "stat"])
def test_fingerprint_follows_the_content(tmp_path, monkeypatch, limit):
    monkeypatch.setattr("slm.data.files._HASHED_BYTES", limit)
    path = tmp_path / "a.txt"
    path.write_text("one")

    def fingerprint():
        return open_source(str(tmp_path), DataConfig()).fingerprint

    before = fingerprint()
    assert before == fingerprint()
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    changed = fingerprint()
    assert changed != before
    (tmp_path / "b.txt").write_text("")
    assert fingerprint() not in (before, changed)


def test_what_names_a_source(tmp_path):
    (tmp_path / "a b").write_text("x")
    sources = ["cpython", "tfds:x/train", "synthetic:copy", "no/such.txt", "missing.txt", str(tmp_path / "a b")]
    assert all(map(names_a_source, sources))
    texts = ["Once upon a time", "word", "To be, or not to be/that.", "line\nline", "x" * 5000, "", " "]
    assert not any(map(names_a_source, texts))
