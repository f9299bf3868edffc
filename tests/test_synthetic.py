import numpy as np
import pytest

from slm.data.synthetic import TASKS, VOCABULARY, SyntheticRows, synthetic_tokenizer
from slm.errors import DataError

T = 24


def samples(task, seed=0, side="train", length=T, indices=range(8)):
    return SyntheticRows(f"synthetic:{task}", seed, length, side).read(np.array(indices))


def words(task, **settings):
    """Words of each row, and those that are answers."""
    batch = samples(task, **settings)
    for ids, segments, weights in zip(batch["targets"], batch["segment_ids"], batch["weights"]):
        row = [VOCABULARY[i] for i in ids[segments > 0]]
        yield row, [VOCABULARY[i] for i in ids[weights > 0]]


@pytest.mark.parametrize("task", TASKS)
def test_samples_depend_on_seed_side_and_index_alone(task):
    batch = samples(task)
    again = samples(task, indices=[5, 2])
    for name, array in batch.items():
        np.testing.assert_array_equal(array[[5, 2]], again[name])
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
    assert not np.array_equal(batch["targets"], samples(task, seed=1)["targets"])
    assert not np.array_equal(batch["targets"], samples(task, side="validation")["targets"])
    assert len({row.tobytes() for row in batch["targets"]}) == 8


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_shifted_by_one_and_padding_is_empty(task):
    batch = samples(task, length=T + 1)
    assert (batch["tokens"][:, 0] == VOCABULARY.index("<|endoftext|>")).all()
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(batch["tokens"][:, 1:][real[:, 1:]], batch["targets"][:, :-1][real[:, 1:]])
    assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
    assert (batch["weights"].sum(axis=1) >= 1).all()
    for array in batch.values():
        assert (array[~real] == 0).all()


def test_copy_and_reverse():
    for task, step in (("copy", 1), ("reverse", -1)):
        for row, answer in words(task):
            middle = row.index("|")
            assert answer == row[middle + 1 :] == row[:middle][::step]
            assert len(answer) == (T - 1) // 2


def test_induction_asks_what_followed_the_marker():
    for row, answer in words("induction"):
        assert row.count("?") == 2
        assert answer == [row[row.index("?") + 1]] == row[-1:]


def test_recall_asks_for_every_value_once():
    for row, answer in words("recall"):
        middle = row.index("|")
        told = dict(zip(row[:middle:2], row[1:middle:2]))
        asked = row[middle + 1 :: 2]
        assert sorted(asked) == sorted(told)
        assert answer == [told[key] for key in asked]
        assert len(told) == (T - 1) // 4


def test_addition_is_right():
    for row, answer in words("addition"):
        problems = "".join(row).removesuffix(";").split(";")
        for problem in problems:
            left, right = problem.split("=")
            assert sum(map(int, left.split("+"))) == int(right)
        assert "".join(answer) == "".join(problem.split("=")[1] + ";" for problem in problems)


def test_parity_is_right():
    for row, answer in words("parity"):
        assert len(answer) == 1
        assert row[:-2].count("1") % 2 == int(answer[0])


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_sequence_is_refused(task):
    with pytest.raises(DataError, match=r"needs data\.sequence_length of at least"):
        SyntheticRows(f"synthetic:{task}", 0, 2, "train")


def test_unknown_task_names_the_nearest():
    with pytest.raises(DataError, match=r"did you mean synthetic:induction\?"):
        samples("inducton")


def test_tokenizer_reads_the_symbols():
    tokenizer = synthetic_tokenizer()
    assert tokenizer.vocab_size == len(VOCABULARY)
    ids = tokenizer.encode("s3 s4 | s3")
    assert [VOCABULARY[i] for i in ids] == ["s3", "s4", "|", "s3"]
    assert tokenizer.decode(ids) == "s3 s4 | s3"
