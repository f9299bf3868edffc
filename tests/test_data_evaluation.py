import numpy as np
import pytest

from slm.config import DataConfig
from slm.data.corpus import Corpus
from slm.data.evaluation import Evaluation, evaluation_windows, open_evaluation
from slm.data.synthetic import synthetic_tokenizer
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError, DataError

T = 8


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("bytes", None)


@pytest.fixture(scope="module")
def two_sources(tokenizer):
    data = DataConfig()
    corpora = [Corpus.from_texts(texts, tokenizer) for texts in (["a" * 30, "b" * 11], ["c" * 5, "d" * 40, "e"])]
    return Evaluation(tuple(evaluation_windows(corpus, data, tokenizer, T) for corpus in corpora))


def joined(batches):
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_every_token_of_every_source_once_in_static_shapes(two_sources, batch_size):
    batches = list(two_sources.batches(batch_size))
    assert {array.shape for batch in batches for array in batch.values()} == {(batch_size, T)}
    rows = joined(batches)
    scored = rows["weights"] > 0
    letters = "".join(map(chr, rows["targets"][scored]))
    assert letters == "a" * 30 + "b" * 11 + "c" * 5 + "d" * 40 + "e"
    assert rows["document"][scored].tolist() == [ord(letter) - ord("a") for letter in letters]
    assert two_sources.documents == 5
    assert rows["bytes"].sum() == 87
    assert rows["tokens"].dtype == rows["document"].dtype == np.int32


@pytest.mark.parametrize("batch_size", [2, 4, 6])
def test_processes_share_the_rows_of_each_batch(two_sources, batch_size):
    whole = list(two_sources.batches(batch_size))
    halves = [list(two_sources.batches(batch_size, 0, index, 2)) for index in range(2)]
    assert len(whole) == len(halves[0]) == len(halves[1])
    for batch, first, second in zip(whole, *halves):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([first[name], second[name]]))
    with pytest.raises(ConfigError, match="cannot be shared out among 4"):
        list(two_sources.batches(6, 0, 0, 4))


def test_some_sequences_are_spread_over_the_set(two_sources):
    everything = joined(two_sources.batches(two_sources.sequences))
    some = joined(two_sources.batches(3, sequences=4))
    expected = [i * two_sources.sequences // 4 for i in range(4)]
    np.testing.assert_array_equal(some["targets"][:4], everything["targets"][expected])
    assert some["weights"].shape == (6, T)
    assert some["weights"][4:].sum() == 0
    assert joined(two_sources.batches(3, sequences=10**6))["bytes"].sum() == 87


def test_text_texts_and_sources(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    data = DataConfig(cache=str(tmp_path / "cache"))

    def letters(what):
        rows = joined(open_evaluation(what, data, tokenizer, T).batches(2))
        return "".join(map(chr, rows["targets"][rows["weights"] > 0]))

    assert letters("some text, a sentence") == "some text, a sentence"
    assert letters(["one", "", "two"]) == "onetwo"
    assert letters(str(tmp_path / "a.txt")) == "hello"
    assert letters(Corpus.from_texts(["x y"], tokenizer)) == "x y"
    with pytest.raises(DataError, match=r"did you mean .*a\.txt"):
        letters(str(tmp_path / "b.txt"))
    for nothing in ("", []):
        with pytest.raises(DataError, match="empty"):
            letters(nothing)


def test_synthetic_tasks_need_their_own_tokenizer(tokenizer):
    with pytest.raises(ConfigError, match="vocabulary of its own"):
        open_evaluation("synthetic:copy", DataConfig(), tokenizer, T)
    evaluation = open_evaluation("synthetic:copy", DataConfig(), synthetic_tokenizer(), T)
    assert joined(evaluation.batches(4, sequences=8))["weights"].sum() == 8 * 3
