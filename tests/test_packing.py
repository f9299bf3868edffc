import dataclasses

import numpy as np
import pytest

from slm.data.corpus import Corpus
from slm.data.packing import EvaluationWindows, TrainingWindows
from slm.data.tokenizers import build_tokenizer
from slm.errors import DataError

END = 256
TEXTS = ["ab", "c", "défghijklmnop", "q", "r", "stuvw"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("bytes", None)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return Corpus.from_texts(TEXTS, tokenizer)


@pytest.fixture(scope="module")
def unseparated(corpus):
    """The same documents without end-of-text tokens."""
    lengths = np.diff(corpus.offsets) - 1
    tokens = corpus.tokens[corpus.tokens != END]
    return dataclasses.replace(corpus, tokens=tokens, offsets=np.concatenate([[0], np.cumsum(lengths)]))


def layout(corpus):
    """Document and place in it of every token, counted one by one."""
    return [(d, place) for d, n in enumerate(np.diff(corpus.offsets)) for place in range(n)]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 12, 29])
def test_training_windows_against_counting_by_hand(corpus, length):
    windows = TrainingWindows(corpus, length, "documents", END)
    assert len(windows) == (len(corpus.tokens) - 1) // length
    batch = windows.read(np.arange(len(windows))[::-1])
    places = layout(corpus)
    for row, window in enumerate(reversed(range(len(windows)))):
        start = window * length
        inside = range(start, start + length)
        assert batch["tokens"][row].tolist() == corpus.tokens[start : start + length].tolist()
        assert batch["targets"][row].tolist() == corpus.tokens[start + 1 : start + length + 1].tolist()
        assert batch["segment_ids"][row].tolist() == [places[i][0] - places[start][0] + 1 for i in inside]
        begin = [i - places[i][1] for i in inside]
        assert batch["positions"][row].tolist() == [i - max(b, start) for i, b in zip(inside, begin)]
    assert (batch["weights"] == 1).all()  # the end of text is learned: every target counts
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "targets": "int32", "weights": "float32", "segment_ids": "int32", "positions": "int32"
    }  # fmt: skip


def test_stream_is_one_segment(corpus):
    batch = TrainingWindows(corpus, 6, "stream", END).read(np.array([1, 0]))
    assert batch["positions"].tolist() == [list(range(6))] * 2
    assert (batch["segment_ids"] == 1).all()
    assert (batch["weights"] == 1).all()
    assert batch["tokens"][1].tolist() == [END, *b"ab", END, *b"c", END]


def test_without_an_end_of_text_no_document_is_asked_for_the_next(unseparated):
    batch = TrainingWindows(unseparated, 4, "documents", None).read(np.array([0]))
    assert batch["targets"][0].tolist() == list("bcdé".encode())[:4]
    assert batch["weights"][0].tolist() == [1, 0, 0, 1]
    assert (TrainingWindows(unseparated, 4, "stream", None).read(np.array([0]))["weights"] == 1).all()


def test_too_little_text_names_the_numbers_and_the_fix(corpus):
    n = len(corpus.tokens)
    assert len(TrainingWindows(corpus, n - 1, "documents", END)) == 1
    with pytest.raises(DataError, match=rf"{n} training tokens do not fill .*sequence_length = {n}"):
        TrainingWindows(corpus, n, "documents", END)


@pytest.mark.parametrize("packing", ["documents", "stream"])
@pytest.mark.parametrize("length", [1, 3, 7, 29, 30, 40])
def test_evaluation_asks_for_every_token_once(corpus, tokenizer, length, packing):
    windows = EvaluationWindows(corpus, length, packing, END, tokenizer.token_bytes)
    batch = windows.read(np.arange(len(windows)))
    scored = batch["weights"] > 0
    places = layout(corpus)
    expected = [i for i in range(1, len(corpus.tokens)) if places[i][1] > 0]  # all but the ends of text
    assert batch["targets"][scored].tolist() == corpus.tokens[expected].tolist()
    assert batch["document"][scored].tolist() == [places[i][0] for i in expected]
    assert batch["bytes"].sum() == corpus.document_bytes.sum() == sum(len(text.encode()) for text in TEXTS)
    real = np.arange(batch["tokens"].size).reshape(batch["tokens"].shape) < len(corpus.tokens) - 1
    assert (batch["segment_ids"][~real] == 0).all()
    assert (batch["segment_ids"][real] > 0).all()
    assert batch["tokens"][real].tolist() == corpus.tokens[:-1].tolist()
    for array in batch.values():
        assert (array[~real] == 0).all()
    for name in ("bytes", "document", "targets", "positions"):
        assert batch[name].dtype == np.int32


def test_evaluation_lays_out_inputs_as_training_does(corpus, tokenizer):
    for packing in ("documents", "stream"):
        train = TrainingWindows(corpus, 5, packing, END)
        evaluation = EvaluationWindows(corpus, 5, packing, END, tokenizer.token_bytes)
        both = np.arange(len(train))
        for name in ("tokens", "targets", "segment_ids", "positions"):
            np.testing.assert_array_equal(train.read(both)[name], evaluation.read(both)[name])


def test_evaluation_without_an_end_of_text(unseparated, tokenizer):
    def scored(packing):
        windows = EvaluationWindows(unseparated, 6, packing, None, tokenizer.token_bytes)
        return int(windows.read(np.arange(len(windows)))["weights"].sum())

    n = len(unseparated.tokens)
    assert scored("documents") == n - len(TEXTS)  # nothing precedes the first token of a document
    assert scored("stream") == n - 1


def test_one_token_cannot_be_evaluated(tokenizer, unseparated):
    single = dataclasses.replace(unseparated, tokens=unseparated.tokens[:1], offsets=np.array([0, 1]))
    with pytest.raises(DataError, match="too little to evaluate"):
        EvaluationWindows(single, 4, "documents", None, tokenizer.token_bytes)
