"""Mask functions against their definitions, and the block table against the whole mask."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention.block_table import EMPTY, block_table, wherever
from slm.attention.patterns import (
    Explicit,
    causal,
    chunked,
    dilated,
    fixed,
    full,
    global_tokens,
    local_blocks,
    parse,
    random_blocks,
    reach,
    strided,
    window,
)

T = 50

DEFINITIONS = {
    "causal": lambda i, j: j <= i,
    "full": lambda i, j: True,
    "window(7)": lambda i, j: -7 < i - j < 7,
    "dilated(4, 3)": lambda i, j: i - j in (-9, -6, -3, 0, 3, 6, 9),
    # Child et al. 2019, section 4.3: A1 = the last s, A2 = {j: (i - j) mod s = 0}
    "causal & strided(6)": lambda i, j: i - 6 <= j <= i or (j <= i and (i - j) % 6 == 0),
    # A1 = {j: floor(j / s) = floor(i / s)}, A2 = {j: j mod s in {s - c, ..., s - 1}}
    "causal & fixed(8, 2)": lambda i, j: j <= i and (i // 8 == j // 8 or j % 8 in (6, 7)),
    "global_tokens(3)": lambda i, j: i in (0, 1, 2) or j in (0, 1, 2),
    "local_blocks(8, 2)": lambda i, j: -2 <= i // 8 - j // 8 <= 2,
    "chunked(9)": lambda i, j: i // 9 == j // 9,
    "causal & (window(5) | global_tokens(2))": lambda i, j: j <= i and (i - j < 5 or j < 2),
    "~window(5) & ~(chunked(9) | causal)": lambda i, j: abs(i - j) >= 5 and i // 9 != j // 9 and j > i,
}
TABLES = [
    *DEFINITIONS, "~full", "fixed(40, 33)", "local_blocks(5, 1)", "global_tokens(20) & window(30)", "dilated(3, 5)",
    "causal & (random_blocks(2, 8, 1) | window(3))", "random_blocks(2, 12, 1) | ~window(50)", "random_blocks(1, 40)",
]  # fmt: skip


def whole(pattern, T=T):
    at = np.arange(T)
    return pattern(at[:, None], at)


@pytest.mark.parametrize("text", DEFINITIONS)
def test_masks_are_what_the_papers_define(text):
    expected = [[DEFINITIONS[text](i, j) for j in range(T)] for i in range(T)]
    np.testing.assert_array_equal(whole(parse(text)), expected)
    assert bool(parse(text)(11, 4)) is expected[11][4]


def test_traced_positions_give_the_same_masks():
    patterns = [parse(text) for text in TABLES[-5:]]
    traced = jax.jit(lambda at: [pattern(at[:, None], at) for pattern in patterns])(jnp.arange(T))
    for pattern, mask in zip(patterns, traced, strict=True):
        np.testing.assert_array_equal(mask, whole(pattern), err_msg=repr(pattern))

    i = np.arange(T)[:, None]
    mixed = jax.jit(lambda at: [pattern(i, at) for pattern in patterns])(jnp.arange(T))
    for pattern, mask in zip(patterns, mixed, strict=True):
        np.testing.assert_array_equal(mask, whole(pattern), err_msg=repr(pattern))


@pytest.mark.parametrize("text", TABLES)
def test_text_is_read_back(text):
    pattern = parse(text)
    assert parse(repr(pattern)) == pattern
    assert hash(parse(repr(pattern))) == hash(pattern)


def test_patterns_compare_by_value_and_their_text_keeps_the_grouping():
    assert window(3) & causal == window(3) & causal != causal & window(3)
    assert len({window(3), window(3), window(4), chunked(3), ~window(3)}) == 4
    assert repr(causal & (window(8) | global_tokens(4))) == "causal & (window(8) | global_tokens(4))"
    grouped = [causal & (full & window(3)), causal & full & window(3), ~(causal | full), ~causal | full]
    assert len({repr(pattern) for pattern in grouped}) == 4
    assert all(parse(repr(pattern)) == pattern for pattern in grouped)
    assert parse("random_blocks(3, 64)") == parse("random_blocks(3, 64, seed=0)") == random_blocks(3, 64)
    # One compilation serves equal patterns.
    f = jax.jit(lambda x, pattern: x, static_argnums=1)
    f(0, window(3)), f(0, window(3))
    assert f._cache_size() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windw(3)", "no mask is called 'windw': did you mean window"),
        ("causal & xyz", "'xyz': one of causal, full, window"),
        ("window", r"window needs numbers"),
        ("window(3, 4)", r"window\(3, 4\) should be window\(W\)"),
        ("window(2.5)", "whole numbers"),
        ("window(window(3))", "whole numbers"),
        ("window(0)", "W = 0 must be an integer of at least 1"),
        ("fixed(4, 5)", "c must be at most s"),
        ("causal()", "takes no numbers"),
        ("window(3) + causal", "neither a mask nor one of"),
        ("__import__('os').system('true')", "neither a mask nor one of"),
        ("3", "neither a mask"),
        ("window(3", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_random_blocks_are_n_different_past_ones():
    n, block = 3, 4
    pattern = random_blocks(n, block, 7)
    mask = whole(pattern, 800)
    np.testing.assert_array_equal(mask, mask.T)
    cells = whole(causal & pattern, 800).reshape(200, block, 200, block).swapaxes(1, 2)
    assert (cells.all((2, 3)) == cells.any((2, 3))).all()
    cells = cells.any((2, 3))
    np.testing.assert_array_equal(cells.sum(1), np.minimum(np.arange(200), n))
    assert not cells.diagonal().any()
    # Longer sequences see the same, other seeds something else.
    np.testing.assert_array_equal(whole(pattern, 80), mask[:80, :80])
    assert (whole(random_blocks(n, block, 8), 800) != mask).mean() > 0.02


def test_random_blocks_are_drawn_uniformly():
    """Unlike block 0 three times (transformers' BigBird in evaluation)."""
    a = np.arange(2000)[:, None]
    cells = (causal & random_blocks(4, 1, 0))(a, a.T)[40:]
    where = np.concatenate([np.flatnonzero(row) / (40 + number) for number, row in enumerate(cells)])
    counts = np.histogram(where, 10, (0, 1))[0]
    expected = len(where) / 10
    assert np.abs(counts - expected).max() < 4.5 * expected**0.5


@pytest.mark.parametrize("text", TABLES)
@pytest.mark.parametrize(("length", "b"), [(100, 16), (96, 16), (5, 16)])
def test_block_table_spells_the_mask(text, length, b):
    pattern = parse(text)
    table, N = block_table(pattern, length, b), -(-length // b)
    mask = np.zeros((N * b, N * b), bool)
    mask[:length, :length] = whole(pattern, length)
    np.testing.assert_array_equal(table.masks[table.kinds].swapaxes(1, 2).reshape(N * b, N * b), mask)
    assert table.pairs == mask.sum()
    np.testing.assert_array_equal(table.kinds != EMPTY, mask.reshape(N, b, N, b).any((1, 3)))
    # What is computed is each visible block once, and no query block twice at once.
    done, leads = np.zeros((N + 1, N), int), np.zeros(N + 1, int)
    for work in table.work(1 if length > 96 else 6):
        for rows, keys, kinds in zip(work.rows, work.keys, work.kinds, strict=True):
            assert len({*rows} - {N}) == (rows < N).sum()
            for row, *pairs in zip(rows, keys, kinds, strict=True):
                np.add.at(done[row], *pairs)
        np.add.at(leads, work.rows, work.leads)
    np.testing.assert_array_equal(done[:N], table.kinds)
    assert not done[N].any()
    np.testing.assert_array_equal(leads[:N], (table.kinds != EMPTY).any(1))


def test_arrays_are_patterns():
    mask = np.random.default_rng(0).random((T, T)) < 0.03
    pattern = Explicit.of(mask)
    assert pattern == Explicit.of(jnp.asarray(mask)) != Explicit.of(mask.T)
    np.testing.assert_array_equal(whole(pattern), mask)
    table = block_table(pattern & causal, T, 8)
    assert table.pairs == np.tril(mask).sum()
    with pytest.raises(ValueError, match="boolean"):
        Explicit.of(mask.astype(float))
    with pytest.raises(ValueError, match="boolean"):
        Explicit.of(mask[:3])
    with pytest.raises(ValueError, match="before tracing"):
        jax.jit(lambda mask: Explicit.of(mask) and 0)(mask)
    with pytest.raises(ValueError, match="50 x 50"):
        block_table(pattern, T + 1, 8)


def test_long_tables_need_little_memory():
    length, b = 16384, 64
    patterns = {
        causal & window(128): 3 * 256 - 3,
        causal & (window(128) | global_tokens(4)): 4 * 256 - 6,
        causal & chunked(256): 64 * 10,
        causal & (local_blocks(64, 1) | random_blocks(3, 64)): None,
        causal & strided(128): None,
    }
    for pattern, kept in patterns.items():
        tracemalloc.start()
        table = block_table(pattern, length, b)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < length**2 / 16, pattern
        assert kept in (table.kept, None), pattern
    assert block_table(causal & strided(128), length, b).pairs == sum(
        min(i, 127) + 1 + max(0, (i - 128) // 128 + 1) for i in range(length)
    )


def test_groups_waste_little():
    for text in ["causal", "causal & (window(128) | global_tokens(4))", "window(300) | global_tokens(9)"]:
        table = block_table(parse(text), 4096, 64)
        works = table.work(8)
        assert table.kept <= sum(work.keys.size for work in works) < 1.13 * table.kept
        assert len(works) <= 4
    assert len(block_table(causal, 150, 64).work(32)) == 1


BOUNDED = {
    "window(7)": (0, 7), "causal & dilated(3, 4)": (0, 9), "local_blocks(8, 1)": (0, 16), "chunked(5) & causal": (0, 5),
    "window(7) | global_tokens(3)": (3, 7), "global_tokens(3)": (3, 0), "window(7) & (window(3) | causal)": (0, 7),
    "window(9) & (window(2) | global_tokens(2))": (2, 2), "window(7) | strided(3)": None, "~window(3)": None,
    "causal": None, "random_blocks(1, 4)": None, "window(4) | fixed(4, 1)": None,
}  # fmt: skip


@pytest.mark.parametrize("text", BOUNDED)
def test_reach_bounds_what_decoding_keeps(text):
    pattern, bound = parse(text), BOUNDED[text]
    assert reach(pattern) == bound
    if bound is not None:
        at = np.arange(T)
        seen = whole(causal & pattern)
        assert not (seen & (at >= bound[0]) & (at[:, None] - at >= bound[1])).any()


@pytest.mark.parametrize("text", TABLES)
@pytest.mark.parametrize("past", [True, False])
def test_blocks_for_documents_cover_them_wherever_they_begin(text, past):
    pattern = causal & parse(text) if past else parse(text)
    seen, n = wherever(pattern)
    everywhere, first = whole(seen), whole(causal) & (np.arange(T) < n)
    for begin in range(T):
        inside, rest = slice(begin, T), slice(0, T - begin)
        assert not (whole(pattern, T - begin) & ~everywhere[inside, inside] & ~first[rest, rest]).any()
    assert n == 0 or everywhere.diagonal().all()


def test_global_tokens_of_documents_do_not_need_all_blocks():
    seen, n = wherever(causal & (window(8) | global_tokens(4)))
    assert n == 4
    assert whole(seen).sum() == whole(causal & window(8)).sum()
    seen, n = wherever(window(8) | global_tokens(4))  # global rows see the future
    assert (n, whole(seen).all()) == (0, True)
    assert wherever(causal & (chunked(8) | local_blocks(4, 1)))[0] == causal & (window(8) | window(8))


def test_numbers_are_checked():
    for make in [window, strided, chunked, global_tokens, functools.partial(dilated, 3)]:
        for wrong in (0, -1, 2.0, True, "3"):
            with pytest.raises(ValueError, match="must be an integer"):
                make(wrong)
    assert local_blocks(np.int64(4), 0) == local_blocks(4, 0)
    with pytest.raises(ValueError, match="at most s"):
        fixed(3, 4)
