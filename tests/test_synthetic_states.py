"""Word problems of groups, against permutations multiplied by hand."""

import itertools

import numpy as np
import pytest

from slm.data.synthetic import SyntheticRows
from slm.data.synthetic.state_tracking import product_table


def rows(task, length, side="train"):
    return SyntheticRows(f"synthetic:{task}", 0, length, side).read(np.arange(32))


@pytest.mark.parametrize(("group", "things"), [("S5", 5), ("S3", 3)])
def test_symmetric_groups(group, things):
    elements = list(itertools.permutations(range(things)))
    batch = rows(f"word_problem:group={group},length=40", 40)
    for tokens, targets in zip(batch["tokens"], batch["targets"]):
        state = tuple(range(things))
        for token, target in zip(tokens, targets):
            state = tuple(state[elements[token][i]] for i in range(things))
            assert elements[target] == state
    assert (batch["weights"] == 1).all()
    assert batch["tokens"].max() == len(elements) - 1


@pytest.mark.parametrize(
    ("group", "order", "commutes"),
    [("S5", 120, False), ("A5", 60, False), ("Z60", 60, True), ("A4xZ5", 60, False), ("A3", 3, True), ("S1", 1, True)],
)
def test_tables_are_groups(group, order, commutes):
    table = product_table(group)
    assert table.shape == (order, order)
    np.testing.assert_array_equal(table[0], np.arange(order))
    np.testing.assert_array_equal(np.sort(table, axis=1), np.tile(np.arange(order), (order, 1)))
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 1000))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table == table.T).all() == commutes


@pytest.mark.parametrize(("task", "modulus"), [("running_parity", 2), ("modular_addition", 5)])
def test_running_sums(task, modulus):
    batch = rows(task, 40)
    lengths = batch["segment_ids"].sum(axis=1)
    assert 3 <= lengths.min() < lengths.max() <= 40
    for tokens, targets, weights, n in zip(batch["tokens"], batch["targets"], batch["weights"], lengths):
        np.testing.assert_array_equal(targets[:n], np.cumsum(tokens[:n]) % modulus)
        np.testing.assert_array_equal(weights, np.arange(40) < n)
    longer = rows(f"{task}:shortest_word=40,length=256", 256, "validation")["segment_ids"].sum(axis=1)
    assert 40 <= longer.min() < longer.max() <= 256
