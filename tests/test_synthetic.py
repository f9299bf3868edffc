import numpy as np
import pytest

from slm.data.synthetic import TASKS, VOCABULARY, SyntheticRows, asks_text, parse_task, synthetic_tokenizer
from slm.data.synthetic.draws import Draws, philox
from slm.data.synthetic.symbols import SymbolTask
from slm.errors import DataError

T = 24
SYMBOLS = [name for name, task in TASKS.items() if issubclass(task, SymbolTask)]
OTHERS = [name for name, task in TASKS.items() if task.own_vocabulary and name not in SYMBOLS]


def samples(task, seed=0, side="train", length=T, indices=range(8)):
    return SyntheticRows(f"synthetic:{task}", seed, length, side).read(np.array(indices))


def published(name, **settings):
    """Samples with published settings, unpadded."""
    task = parse_task(f"synthetic:{name}")
    return samples(name, length=max(task.length, task.shortest), **settings)


def words(task, **settings):
    """Words of each row, and those that are answers."""
    batch = samples(task, **settings)
    for ids, segments, weights in zip(batch["targets"], batch["segment_ids"], batch["weights"]):
        row = [VOCABULARY[i] for i in ids[segments > 0]]
        yield row, [VOCABULARY[i] for i in ids[weights > 0]]


def test_philox_is_the_published_generator():
    """The known answers that come with Random123 (kat_vectors)."""
    largest = 2**32 - 1
    for counter, key, answer in [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((largest,) * 4, (largest,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]:
        got = philox(tuple(np.array([c], np.uint64) for c in counter), key)
        assert tuple(int(x[0]) for x in got) == answer


def test_draws_are_fair():
    draws = Draws(0, "test", "train", np.arange(20_000))
    hands = draws.choose(4, 2)
    assert (hands[:, 0] != hands[:, 1]).all()
    counts = np.bincount(hands @ [4, 1], minlength=16).reshape(4, 4)
    np.testing.assert_allclose(counts[~np.eye(4, dtype=bool)] / 20_000, 1 / 12, atol=0.01)
    hands = draws.arrange(4, 3, 2)
    assert (np.sort(hands)[..., 1:] != np.sort(hands)[..., :-1]).all()
    for part in (hands[:, 0], hands[:, 1]):
        counts = np.bincount(part @ [16, 4, 1], minlength=64)
        np.testing.assert_allclose(counts[counts > 0] / 20_000, 1 / 24, atol=0.01)
    # One after another, without replacement: P(i then j) = w_i / 6 * w_j / (6 - w_i).
    weights = np.array([1.0, 2.0, 3.0])
    pairs = np.bincount(draws.choose_weighted(weights, 2) @ [3, 1], minlength=9).reshape(3, 3) / 20_000
    for i, j in [(0, 1), (1, 2), (2, 0), (2, 1)]:
        assert pairs[i, j] == pytest.approx(weights[i] / 6 * weights[j] / (6 - weights[i]), abs=0.01)
    assert draws.integers(np.array([1, 10]), 2).max(axis=0).tolist() == [0, 9]


@pytest.mark.parametrize("task", SYMBOLS + OTHERS)
def test_samples_depend_on_seed_side_and_index_alone(task):
    batch = published(task) if task in OTHERS else samples(task)
    length = batch["tokens"].shape[1]
    again = samples(task, length=length, indices=[5, 2])
    for name, array in batch.items():
        np.testing.assert_array_equal(array[[5, 2]], again[name])
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
        assert samples(task, length=length, indices=[])[name].shape == (0, length)
    for other in ({"seed": 1}, {"side": "validation"}):
        assert not np.array_equal(batch["tokens"], samples(task, length=length, **other)["tokens"])
    assert len({row.tobytes() for row in batch["tokens"]}) == 8
    assert max(batch["tokens"].max(), batch["targets"].max()) < len(parse_task(f"synthetic:{task}").words)


@pytest.mark.parametrize("task", OTHERS)
def test_training_and_validation_share_no_sample(task):
    sides = [published(task, side=side, indices=range(256)) for side in ("train", "validation")]
    # Short words can be the same on both sides, where there are few.
    train, validation = (
        {row.tobytes() for row, real in zip(side["tokens"], side["segment_ids"]) if real.sum() > 25} for side in sides
    )
    assert min(len(train), len(validation)) > 80
    assert not train & validation


@pytest.mark.parametrize("task", SYMBOLS)
def test_rows_are_shifted_by_one_and_padding_is_empty(task):
    batch = samples(task, length=T + 1)
    assert (batch["tokens"][:, 0] == VOCABULARY.index("<|endoftext|>")).all()
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(batch["tokens"][:, 1:][real[:, 1:]], batch["targets"][:, :-1][real[:, 1:]])
    assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
    assert (batch["weights"].sum(axis=1) >= 1).all()
    for array in batch.values():
        assert (array[~real] == 0).all()


@pytest.mark.parametrize("task", OTHERS)
def test_padding_is_a_segment_of_its_own_and_not_scored(task):
    batch = published(task)
    length = batch["tokens"].shape[1]
    padded = samples(task, length=length + 5)
    for name, array in padded.items():
        np.testing.assert_array_equal(array[:, :length], batch[name])
        assert (array[:, length:] == 0).all()
    lengths = batch["segment_ids"].sum(axis=1)
    constant = len(set(lengths.tolist())) == 1
    assert constant == (getattr(parse_task(f"synthetic:{task}"), "shortest_word", None) is None)
    np.testing.assert_array_equal(batch["segment_ids"], np.arange(length) < lengths[:, None])
    np.testing.assert_array_equal(batch["positions"], np.arange(length) * batch["segment_ids"])
    assert (batch["weights"][batch["segment_ids"] == 0] == 0).all()


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


def test_a_length_of_its_own():
    assert (samples("copy:length=11")["segment_ids"].sum(axis=1) == 11).all()


def test_finite_training_sets_and_tests():
    endless, few = SyntheticRows("synthetic:copy", 0, T, "train"), "synthetic:copy:samples=5,tests=3"
    assert len(endless) == 2**31 - 1
    assert len(SyntheticRows("synthetic:copy", 0, T, "validation")) == 1024
    train = SyntheticRows(few, 0, T, "train")
    assert (len(train), len(SyntheticRows(few, 0, T, "validation"))) == (5, 3)
    np.testing.assert_array_equal(train.read(np.arange(5))["tokens"], endless.read(np.arange(5))["tokens"])
    assert train.summary()["sequences"] == 5
    assert endless.summary()["sequences"] is None


def test_settings_that_shape_samples_draw_others():
    """Sources of a mixture must not share their keys and places."""
    few, many = (samples(f"mqar:pairs={pairs}", length=64)["tokens"][:, 0] for pairs in (4, 8))
    assert not np.array_equal(few, many)


def test_samples_can_count_alike():
    spec = "modular_addition:shortest_word=2,length=24"
    targets, alike = samples(spec)["weights"], samples(f"{spec},weigh=samples")["weights"]
    np.testing.assert_allclose(alike.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(alike, targets / targets.sum(axis=1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("task", SYMBOLS + OTHERS)
def test_too_short_a_sequence_is_refused(task):
    with pytest.raises(DataError, match=r"needs data\.sequence_length of at least"):
        SyntheticRows(f"synthetic:{task}", 0, 2, "train")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("inducton", r"did you mean synthetic:induction\?"),
        ("xyz", "there are copy, reverse"),
        ("mqar:pair=4", r"no setting 'pair': did you mean pairs\?"),
        ("mqar:xyz=4", "it has length, samples, tests, weigh, vocab, pairs, power, filler"),
        ("mqar:pairs", "'pairs' is not SETTING=VALUE"),
        ("mqar:pairs=", "'pairs=' is not SETTING=VALUE"),
        ("mqar:pairs=4,,vocab=64", "'' is not SETTING=VALUE"),
        ("mqar:pairs=4,pairs=4", "pairs is set twice"),
        ("mqar:pairs=four", r"mqar:pairs=four: pairs = 'four': must be of type int"),
        ("mqar:pairs=4.5", "must be of type int, not float"),
        ("mqar:filler=randm", "did you mean random"),
        ("mqar:length=0", "length = 0: must be at least 1"),
        ("mqar:samples=-1", "samples = -1: must be at least 0"),
        ("mqar:pairs=0", "pairs = 0: must be at least 1"),
        ("mqar:pairs=17", "17 pairs need length of at least 68, not 64"),
        ("mqar:vocab=8", "4 pairs need vocab of at least 10, not 8"),
        ("mqar:power=0", "power = 0.0: must be above 0"),
        ("forgetting_mqar:updates=5", "updates = 5: must be between 0 and pairs = 4"),
        ("forgetting_mqar:pairs=16", "need length of at least 72"),
        ("compositional_mqar:pairs=8", "must be a square"),
        ("induction_heads:vocab=2", "vocab = 2"),
        ("selective_copying:copies=4000", "copies = 4000"),
        ("mad_recall:length=127", "must be even"),
        ("mad_recall:noise=0.5", "needs noise_vocab above 0"),
        ("mad_noisy_recall:noise=1", "below 1"),
        ("mad_noisy_recall:vocab=17", "must leave at least 2"),
        ("mad_fuzzy_recall:motif=40", "motif = 40"),
        ("mad_selective_copying:copies=128", "copies = 128"),
        ("word_problem:group=D4", "must be Z, S or A and a number"),
        ("word_problem:group=S7", "more than 1000 elements"),
        ("word_problem:group=S5xS5", "more than 1000 elements"),
        ("running_parity:shortest_word=41", "shortest_word = 41"),
        ("passkey:depth=2", "depth = 2.0: must be between 0 and 1"),
        ("passkey:digits=0", "digits = 0"),
        ("passkey:text=synthetic:copy", "no text"),
        ("copy:length=2", "length = 2: must be at least 3"),
    ],
)
def test_errors_name_the_setting_and_the_nearest(task, message):
    with pytest.raises(DataError, match=message):
        parse_task(f"synthetic:{task}")


def test_tokenizers_read_the_words_of_their_tasks():
    tokenizer = synthetic_tokenizer()
    assert tokenizer.vocab_size == len(VOCABULARY)
    ids = tokenizer.encode("s3 s4 | s3")
    assert [VOCABULARY[i] for i in ids] == ["s3", "s4", "|", "s3"]
    assert tokenizer.decode(ids) == "s3 s4 | s3"
    mqar = synthetic_tokenizer("synthetic:mqar")
    assert (mqar.vocab_size, mqar.end_of_text) == (8192, None)
    assert mqar.encode("17 8191").tolist() == [17, 8191]
    with pytest.raises(DataError, match="no token for some of the text"):
        mqar.encode("17 8192")


def test_only_the_passkey_is_asked_in_text():
    assert [name for name in TASKS if asks_text(f"synthetic:{name}")] == ["passkey"]
    assert not asks_text("cpython")
