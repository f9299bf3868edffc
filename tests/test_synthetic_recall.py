"""MQAR and its variants, induction heads and selective copying, solved from their tokens alone."""

import numpy as np
import pytest

from slm.config import load_config
from slm.data.synthetic import SyntheticRows, parse_task

MQAR_TRAINING = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
VARIANT_TRAINING = [(64, 4), (128, 9), (256, 16), (256, 25), (256, 36)]


def rows(task, side="train", count=32):
    settings = parse_task(f"synthetic:{task}")
    batch = SyntheticRows(f"synthetic:{task}", 0, settings.length, side).read(np.arange(count))
    return settings, [
        (tokens.tolist(), {int(t): int(targets[t]) for t in np.nonzero(weights)[0]})
        for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"])
    ]


@pytest.mark.parametrize(("length", "pairs"), MQAR_TRAINING)
@pytest.mark.parametrize("filler", ["random", "apart", "blank"])
def test_mqar(length, pairs, filler):
    task, made = rows(f"mqar:length={length},pairs={pairs},filler={filler}")
    assert task.vocab == 8192
    collisions = 0
    for tokens, answers in made:
        told = tokens[: 2 * pairs]
        keys, values = told[::2], told[1::2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < 4096 for key in keys)
        assert all(4096 <= value < 8192 for value in values)
        # Each key is asked once, at an even distance, and the value is never shown where it is asked.
        value_of = dict(zip(keys, values))
        assert sorted(tokens[t] for t in answers) == sorted(keys)
        for t, answer in answers.items():
            assert t >= 2 * pairs
            assert t % 2 == 0
            assert answer == value_of[tokens[t]]
        rest = [token for t, token in enumerate(tokens) if t >= 2 * pairs and t not in answers]
        collisions += sum(token in value_of for token in rest)
        if filler == "blank":
            assert set(rest) == {0}
        else:
            assert max(rest) > 4096 > min(rest)
    if filler != "random":
        assert collisions == 0
    elif pairs == 64:
        assert collisions > 0


def test_every_id_but_the_keys_is_filler():
    _, made = rows("mqar:vocab=12,pairs=2,length=16,filler=apart", count=400)
    seen = {}
    for tokens, answers in made:
        keys = tuple(sorted(tokens[:4:2]))
        seen.setdefault(keys, set()).update(token for t, token in enumerate(tokens) if t >= 4 and t not in answers)
    assert len(seen) == 10  # pairs of the keys 1 ... 5
    for keys, filler in seen.items():
        assert filler == set(range(12)) - set(keys)


def test_gaps_follow_the_power_law():
    """Of the first query drawn, by inclusion probabilities: with one pair there is one place, with P = g^(a - 1)."""
    _, made = rows("mqar:pairs=1,length=18", count=4000)
    places = np.bincount([(next(iter(answers)) - 2) // 2 for _, answers in made], minlength=8)
    law = np.arange(1.0, 9) ** (0.01 - 1)
    np.testing.assert_allclose(places / 4000, law / law.sum(), atol=0.025)
    _, made = rows("mqar:pairs=1,length=18,power=1", count=4000)
    places = np.bincount([(next(iter(answers)) - 2) // 2 for _, answers in made], minlength=8)
    np.testing.assert_allclose(places / 4000, 1 / 8, atol=0.025)


@pytest.mark.parametrize(("length", "pairs"), VARIANT_TRAINING)
def test_forgetting_mqar(length, pairs):
    task, made = rows(f"forgetting_mqar:length={length},pairs={pairs}")
    assert task.updates == 4
    changed = 0
    for tokens, answers in made:
        told = tokens[: 2 * (pairs + 4)]
        value_of, first = {}, {}
        for key, value in zip(told[::2], told[1::2]):
            value_of[key] = value
            first.setdefault(key, value)
        assert len(first) == pairs
        assert len(set(told[2 * pairs :: 2])) == 4
        assert {tokens[t]: answer for t, answer in answers.items()} == value_of
        assert len(answers) == pairs
        changed += sum(first[key] != value_of[key] for key in first)
    assert changed == 4 * len(made)


def test_an_update_always_changes_the_value():
    _, made = rows("forgetting_mqar:vocab=12,pairs=2,updates=2,length=16", count=200)
    for tokens, _ in made:
        told = tokens[:8]
        assert {tuple(told[i : i + 2]) for i in (0, 2)}.isdisjoint({tuple(told[i : i + 2]) for i in (4, 6)})


@pytest.mark.parametrize(("length", "pairs"), VARIANT_TRAINING)
def test_compositional_mqar(length, pairs):
    _, made = rows(f"compositional_mqar:length={length},pairs={pairs}")
    for tokens, answers in made:
        told = [tuple(tokens[i : i + 3]) for i in range(0, 3 * pairs, 3)]
        value_of = {(a, b): value for a, b, value in told}
        assert len(value_of) == pairs == len(set(value_of.values()))
        firsts, seconds = ({key[i] for key in value_of} for i in (0, 1))
        assert len(firsts) * len(seconds) == pairs  # a full grid: neither token tells the value
        assert {(tokens[t - 1], tokens[t]): answer for t, answer in answers.items()} == value_of
        assert len(answers) == pairs
        third = 8192 // 3
        assert max(firsts) < third <= min(seconds)
        assert max(seconds) < 2 * third <= min(value_of.values())


@pytest.mark.parametrize("name", ["mqar", "mqar_reduced"])
def test_configs_have_the_mixture_of_lengths(name):
    cfg = load_config(f"configs/{name}.py")
    tasks = [parse_task(spec) for spec in cfg.data.source]
    assert max(task.length for task in tasks) == cfg.data.sequence_length
    tests = [parse_task(spec) for spec in cfg.data.validation]
    assert max(task.length for task in tests) == (cfg.data.validation_length or cfg.data.sequence_length)
    # A sample of each setting counts alike, and settings come as often as they have samples.
    assert {task.weigh for task in tasks + tests} == {"samples"}
    np.testing.assert_allclose(cfg.data.weights, [task.samples / tasks[-1].samples for task in tasks])


def test_the_published_config_has_the_published_numbers():
    cfg = load_config("configs/mqar.py")
    tasks = [parse_task(spec) for spec in cfg.data.source]
    assert [(task.length, task.pairs) for task in tasks] == MQAR_TRAINING
    assert [task.samples for task in tasks] == [100_000] + [20_000] * 4
    tests = [parse_task(spec) for spec in cfg.data.validation]
    lengths = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    assert [(task.length, task.pairs) for task in tests] == lengths
    assert {task.tests for task in tests} == {1000}
    assert {task.vocab for task in tasks + tests} == {8192}
    assert cfg.train.steps * cfg.train.batch_size == 32 * 180_000


def test_induction_heads():
    task, made = rows("induction_heads")
    assert (task.length, task.vocab) == (256, 16)
    for tokens, answers in made:
        first, last = (t for t, token in enumerate(tokens) if token == 15)
        assert answers == {255: tokens[first + 1]}
        assert last == 255
    # H3 learns from every next token, of which the last is the answer.
    for side, scored in (("train", 31), ("validation", 1)):
        _, made = rows("induction_heads:vocab=20,length=31,loss=all", side)
        for tokens, answers in made:
            assert len(answers) == scored
            assert answers[30] == tokens[tokens.index(19) + 1]
            assert all(answers[t] == tokens[t + 1] for t in answers if t < 30)


def test_selective_copying():
    task, made = rows("selective_copying", count=4)
    assert (task.length, task.vocab, task.copies) == (4096, 16, 16)
    for tokens, answers in made:
        data = [token for token in tokens[:-16] if token]
        assert tokens[-16:] == [15] * 16
        assert len(data) == 16
        assert max(data) < 15
        assert answers == dict(enumerate(data, 4080))
