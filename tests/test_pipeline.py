import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from slm.config import DataConfig
from slm.data.pipeline import check_vocabulary, open_data
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError, DataError

T = 8


def write_documents(folder, letter, count):
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"{letter}{i:03} " * 6)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def settings(root):
    return DataConfig(
        source=(write_documents(root / "x", "x", 40),),
        validation_fraction=0.3,
        sequence_length=T,
        cache=str(root / "cache"),
    )


@pytest.fixture(scope="module")
def data(settings):
    return open_data(settings, seed=0)


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_batch_is_a_function_of_seed_and_step(settings, data):
    batches = [data.train_batch(step, 4) for step in range(6)]
    again = open_data(settings, seed=0)
    assert all(same(again.train_batch(step, 4), batches[step]) for step in (5, 0, 3))
    assert not same(batches[0], batches[1])
    assert not same(open_data(settings, seed=1).train_batch(0, 4), batches[0])
    assert {name: (array.shape, array.dtype.name) for name, array in batches[0].items()} == {
        name: ((4, T), "float32" if name == "weights" else "int32")
        for name in ("tokens", "targets", "weights", "segment_ids", "positions")
    }


def test_an_epoch_reads_every_window_once_and_the_next_in_another_order(data):
    n = data.train_sequences
    epochs = [data.train_batch(epoch, n)["tokens"] for epoch in range(2)]
    everything = data.train[0].read(np.arange(n))["tokens"]
    for epoch in epochs:
        np.testing.assert_array_equal(np.unique(epoch, axis=0), np.unique(everything, axis=0))
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, everything))
    assert not np.array_equal(*epochs)


def test_neighbouring_seeds_do_not_share_epochs(settings, data):
    n = data.train_sequences
    other = open_data(settings, seed=1)
    assert not np.array_equal(data.train_batch(1, n)["tokens"], other.train_batch(0, n)["tokens"])


def test_processes_share_a_batch_out(data):
    whole = data.train_batch(3, 6)
    parts = [data.train_batch(3, 6, index, 3) for index in range(3)]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
    with pytest.raises(ConfigError, match="6 sequences cannot be shared out among 4 processes"):
        data.train_batch(0, 6, 0, 4)


def test_validation_documents_are_never_trained_on(data):
    def documents(corpus):
        return set(data.tokenizer.decode(corpus.tokens[corpus.tokens != 256]).split())

    train, validation = documents(data.train[0].corpus), documents(data.validation.rows[0].corpus)
    assert train
    assert validation
    assert not train & validation
    assert train | validation == {f"x{i:03}" for i in range(40)}


def test_explicit_validation_source_is_checked_for_overlap(settings, root):
    overlapping = root / "overlapping"
    overlapping.mkdir()
    (overlapping / "copy.txt").write_text("x007 " * 6)
    (overlapping / "new.txt").write_text("something else")
    with pytest.raises(DataError, match="1 of 2 validation documents are also in the training data"):
        open_data(dataclasses.replace(settings, validation=(str(overlapping),)), 0)
    (overlapping / "copy.txt").unlink()
    separate = open_data(dataclasses.replace(settings, validation=(str(overlapping),)), 0)
    assert separate.train[0].documents == 40
    assert sum(batch["bytes"].sum() for batch in separate.validation_batches(2)) == len("something else")


def test_nothing_held_out(settings):
    data = open_data(dataclasses.replace(settings, validation_fraction=0.0), 0)
    assert data.train[0].documents == 40
    assert data.validation is None
    with pytest.raises(DataError, match="nothing was held out"):
        data.validation_batches(2)


def test_mixture_keeps_its_shares_and_its_sides(settings, root):
    other = write_documents(root / "y", "y", 30)
    mixed = dataclasses.replace(settings, source=(*settings.source, other), weights=(3.0, 1.0), packing="stream")
    data = open_data(mixed, 0)
    tokens = np.concatenate([data.train_batch(step, 8)["tokens"] for step in range(25)])
    from_x, from_y = (tokens == ord("x")).any(axis=1).sum(), (tokens == ord("y")).any(axis=1).sum()
    assert from_x == 3 * from_y == 150
    assert data.validation.documents == sum(rows.documents for rows in data.validation.rows)
    assert [row["side"] for row in data.summary()] == ["train", "train", "validation", "validation"]


def test_summary_counts(data):
    train, validation = data.summary()
    assert train["documents"] + validation["documents"] == 40
    assert train["bytes"] == train["documents"] * 30
    assert train["tokens"] == train["documents"] * 31
    assert train["bytes_per_token"] == pytest.approx(30 / 31)


def test_tail_split_of_one_file(settings, root):
    text = "".join(chr(ord("a") + i % 26) for i in range(1003))
    (root / "one.txt").write_text(text)
    tail = dataclasses.replace(
        settings, source=(str(root / "one.txt"),), validation_split="tail", validation_fraction=0.1, tokenizer="chars"
    )
    data = open_data(tail, 0)
    assert data.tokenizer.decode(data.train[0].corpus.tokens) == text[: int(1003 * 0.9)]
    assert data.tokenizer.decode(data.validation.rows[0].corpus.tokens) == text[int(1003 * 0.9) :]
    with pytest.raises(DataError, match=r"no documents for (train|validation): .*validation_split = tail"):
        open_data(dataclasses.replace(tail, validation_split="document"), 0)


def test_tokenizers_are_made_from_training_documents_only(settings, root):
    (root / "accents.txt").write_text("ab" * 300 + "é" * 50)
    one = dataclasses.replace(settings, source=(str(root / "accents.txt"),), validation_split="tail")
    chars = open_data(dataclasses.replace(one, validation_fraction=0.3, tokenizer="chars"), 0)
    assert chars.tokenizer.vocab_size == len("ab") + 2
    assert "<unk>" in chars.tokenizer.decode(chars.validation.rows[0].corpus.tokens)
    everything = open_data(dataclasses.replace(one, validation_fraction=0.0, tokenizer="chars"), 0)
    assert everything.tokenizer.vocab_size == len("abé") + 2


def test_trained_tokenizer_is_cached(settings, monkeypatch):
    bpe = dataclasses.replace(settings, tokenizer="bpe:265")
    first = open_data(bpe, 0)
    assert first.tokenizer.vocab_size == 265
    monkeypatch.setattr("slm.data.pipeline.build_tokenizer", None)  # calling it again would fail
    assert open_data(bpe, 0).fingerprint == first.fingerprint


def test_a_given_tokenizer_is_used(settings):
    tokenizer = build_tokenizer("chars", lambda: iter(["x0123456789 "]))
    assert open_data(settings, 0, tokenizer).tokenizer is tokenizer


@pytest.mark.parametrize(
    "change", [{"sequence_length": 9}, {"packing": "stream"}, {"validation_fraction": 0.5}, {"tokenizer": "chars"}]
)
def test_fingerprint_follows_what_changes_batches(settings, data, change):
    assert open_data(dataclasses.replace(settings, **change), 0).fingerprint != data.fingerprint
    assert open_data(settings, 5).fingerprint == data.fingerprint


def test_data_smaller_than_a_sequence_or_a_batch(settings, data):
    with pytest.raises(DataError, match=r"do not fill one sequence of data\.sequence_length = 5000"):
        open_data(dataclasses.replace(settings, sequence_length=5000), 0)
    n = data.train_sequences
    with pytest.raises(DataError, match=rf"holds {n} sequences, fewer than one batch of {n + 1}"):
        data.train_batch(0, n + 1)


def test_synthetic_tasks(root):
    settings = DataConfig(source=("synthetic:copy", "synthetic:parity"), weights=(1.0, 1.0), sequence_length=T)
    data = open_data(settings, 3)
    batch = data.train_batch(2, 6)
    assert same(batch, open_data(settings, 3).train_batch(2, 6))
    assert "document" not in batch
    assert sorted(batch["weights"].sum(axis=1).tolist()) == [1, 1, 1, 3, 3, 3]
    assert len(list(data.validation_batches(8, sequences=16))) == 2
    assert data.summary()[0]["tokens"] is None
    with pytest.raises(ConfigError, match="do not mix with text"):
        open_data(dataclasses.replace(settings, source=("synthetic:copy", "cpython")), 0)
    with pytest.raises(ConfigError, match="vocabulary of their own"):
        open_data(settings, 0, build_tokenizer("bytes", None))


def test_vocabulary_must_fit():
    tokenizer = build_tokenizer("bytes", None)
    check_vocabulary(tokenizer, 257)
    check_vocabulary(tokenizer, 300)
    with pytest.raises(ConfigError, match=r"vocabulary that does not fit: the tokenizer has 257 ids.*256"):
        check_vocabulary(tokenizer, 256)


def test_importing_the_pipeline_is_light():
    heavy = {"grain", "tensorflow_datasets", "tokenizers", "pyarrow", "tensorflow"}
    code = f"import sys, slm.data.pipeline, slm.data.prefetch; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
