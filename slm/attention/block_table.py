"""Which blocks of keys a block of queries needs under a mask pattern, found without a (T, T) array.

Blocks (query block, key block) are sorted into classes whose members have the same mask: by counting visible
differences i - j, by comparing borders, or cell by cell, according to the pattern; one member of each class is looked
at. All of this is numpy, done once while tracing. N = blocks on a side, b = positions in a block.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from slm.attention.patterns import And, Explicit, Named, Not, Or, Pattern, causal, chunked, full, window

EMPTY, WHOLE = 0, 1
"""Kinds of blocks of which nothing is visible, or everything. Every kind is the number of a mask."""


class Work(NamedTuple):
    """Query blocks with about equally many key blocks each, in portions of P different ones, which a scan goes over."""

    rows: np.ndarray
    """(portions, P) numbers of query blocks; N fills up a portion."""
    leads: np.ndarray
    """(portions, P) bool: whether these are the first key blocks of the query block, whose others come apart."""
    keys: np.ndarray
    """(portions, P, n) numbers of key blocks."""
    kinds: np.ndarray
    """(portions, P, n) kinds of the blocks; EMPTY fills up."""


@dataclass(frozen=True, eq=False)
class BlockTable:
    """The visible blocks of a pattern at one length."""

    kinds: np.ndarray
    """(N, N) int32, [query block, key block]: EMPTY, WHOLE, or another number of a mask."""
    masks: np.ndarray
    """(kinds, b, b) bool."""

    @property
    def kept(self) -> int:
        """Blocks that are computed."""
        return int((self.kinds != EMPTY).sum())

    @property
    def pairs(self) -> int:
        """Visible pairs of positions."""
        blocks = np.bincount(self.kinds.ravel(), minlength=len(self.masks))
        return int(blocks @ self.masks.sum((1, 2), dtype=np.int64))

    def work(self, portion: int) -> list[Work]:
        """What there is to compute, in portions of about `portion` blocks; of one query block 4 to 16 at once, so that
        a portion stays small and few sizes are compiled."""
        most = min(max(2 * portion, 4), 16)
        rows = [np.flatnonzero(kinds) for kinds in self.kinds]
        parts = [
            _Part(number, row, keys)
            for row, needed in enumerate(rows)
            for number, keys in enumerate(np.array_split(needed, -(-len(needed) // most)) if len(needed) else [])
        ]
        parts.sort(key=lambda part: part.number)
        sizes = np.array([len(part.keys) for part in parts], int)
        return [self._filled(_portions([parts[at] for at in chosen], portion)) for chosen in _groups(sizes)]

    def _filled(self, portions: list[list["_Part"]]) -> Work:
        P = max(map(len, portions))
        n = max(len(part.keys) for parts in portions for part in parts)
        rows, leads = np.full((len(portions), P), len(self.kinds), np.int32), np.zeros((len(portions), P), bool)
        keys, kinds = np.zeros((2, len(portions), P, n), np.int32)
        for at, parts in enumerate(portions):
            for p, part in enumerate(parts):
                rows[at, p], leads[at, p] = part.row, part.number == 0
                keys[at, p, : len(part.keys)], kinds[at, p, : len(part.keys)] = (
                    part.keys,
                    self.kinds[part.row, part.keys],
                )
        return Work(rows, leads, keys, kinds)


class _Part(NamedTuple):
    """Key blocks of one query block."""

    number: int
    row: int
    keys: np.ndarray


def _portions(parts: list[_Part], portion: int) -> list[list[_Part]]:
    """Parts of different rows together, as many as make about `portion` blocks."""
    n = max(len(part.keys) for part in parts)
    P = -(-len(parts) // -(-len(parts) * n // max(n, portion)))
    portions = [[]]
    for part in parts:
        if len(portions[-1]) == P or any(part.row == other.row for other in portions[-1]):
            portions.append([])
        portions[-1].append(part)
    return portions


def _groups(counts: np.ndarray, waste: float = 0.1) -> list[np.ndarray]:
    """Indices in groups, each of which will be filled up to its largest count: as many groups as keep that below
    (1 + waste) times the sum of counts, but at most 8, and one for little work: each is compiled apart."""
    if not len(counts):
        return []
    sizes, where, rows = np.unique(-counts, return_inverse=True, return_counts=True)
    sizes, before = -sizes, np.concatenate([[0], np.cumsum(rows)])  # sizes descend
    cost = np.where(before[1:] > before[:-1, None], sizes[:, None] * (before[1:] - before[:-1, None]), np.inf)
    best, ways, most = cost[0], [], min(8, 1 + counts.sum() // 32)  # best[e]: least work for sizes 0 ... e
    while len(ways) + 1 < most and best[-1] > (1 + waste) * counts.sum():
        options = np.concatenate([[np.inf], best[:-1]])[:, None] + cost  # [first of the last group, e]
        ways.append(options.argmin(0))
        best = options.min(0)
    ends = [len(sizes)]
    for way in reversed(ways):
        ends.append(way[ends[-1] - 1])
    group = np.searchsorted(np.sort(ends), where, side="right")
    return [np.flatnonzero(group == g) for g in np.unique(group)]


@functools.lru_cache(maxsize=64)
def block_table(pattern: Pattern, T: int, b: int) -> BlockTable:
    """The table of `pattern` for T positions in blocks of b, of which the last may be cut short.

    Raises ValueError if the pattern is an array of another length.
    """
    if isinstance(pattern, Explicit) and pattern.length != T:
        raise ValueError(f"pattern is an array of {pattern.length} x {pattern.length} booleans for {T} positions")
    N, inside = -(-T // b), np.arange(b)
    numbers, first, inverse = np.unique(
        _and(_classes(pattern, N, b), _cut_short(T, N, b)), return_index=True, return_inverse=True
    )
    masks = {np.full((b, b), value).tobytes(): kind for kind, value in ((EMPTY, False), (WHOLE, True))}
    kinds = np.zeros(len(numbers), np.int32)
    for at, (number, where) in enumerate(zip(numbers, first, strict=True)):
        if number in (EMPTY, WHOLE):
            kinds[at] = number
            continue
        i, j = (b * block + inside for block in divmod(where, N))
        mask = pattern(i[:, None], j[None]) & (i[:, None] < T) & (j[None] < T)
        kinds[at] = masks.setdefault(mask.tobytes(), len(masks))
    return BlockTable(kinds[inverse].reshape(N, N), np.frombuffer(b"".join(masks), bool).reshape(-1, b, b))


def _classes(pattern: Pattern, N: int, b: int) -> np.ndarray:
    """(N, N) integers: EMPTY, WHOLE, or others, equal only for blocks with equal masks."""
    match pattern:
        case And(one, other):
            return _and(_classes(one, N, b), _classes(other, N, b))
        case Or(one, other):
            return _or(_classes(one, N, b), _classes(other, N, b))
        case Not(one):
            return _not(_classes(one, N, b))
        case Explicit():
            return _each(np.zeros((N, N), bool), np.zeros((N, N), bool))
        case Named("global_tokens", (n,)):
            near = np.arange(N) * b < n, (np.arange(N) + 1) * b <= n  # any of its positions is global; all are
            return _each(~near[0] & ~near[0][:, None], near[1] | near[1][:, None])
        case Named("fixed", (s, c)):
            return _or(_classes(chunked(s), N, b), _periodic(np.arange(s) >= s - c, N, b))
        case Named("chunked" | "local_blocks", (C, *_)) | Named("random_blocks", (_, C, _)):
            return _by_cells(pattern, C, N, b)
    return _by_difference(pattern, N, b)


def _and(one, other):
    code = _numbered(one, other)
    return np.where((one == EMPTY) | (other == EMPTY), EMPTY, np.where((one == WHOLE) & (other == WHOLE), WHOLE, code))


def _or(one, other):
    return _not(_and(_not(one), _not(other)))


def _not(one):
    return np.where(one == EMPTY, WHOLE, np.where(one == WHOLE, EMPTY, one))


def _numbered(one, other):
    """Numbers from 2 that are equal where both classes are."""
    _, inverse = np.unique(one.astype(np.int64) * (other.max() + 1) + other, return_inverse=True)
    return 2 + inverse.reshape(one.shape)


def _each(empty, whole):
    """Every block that is neither is a class of its own."""
    own = 2 + np.arange(empty.size).reshape(empty.shape)
    return np.where(empty, EMPTY, np.where(whole, WHOLE, own))


def _by_difference(pattern, N, b):
    """Of a pattern that depends on i - j alone: blocks with equal differences have equal masks."""
    apart = np.arange(-N * b, N * b + 1)
    seen = np.concatenate([[0], np.cumsum(pattern(apart, 0))])
    block = np.arange(1 - N, N)  # query block - key block; its positions are apart by b block - b + 1 ... + b - 1
    visible = seen[(block + N) * b + b] - seen[(block + N) * b - b + 1]
    kinds = np.where(visible == 0, EMPTY, np.where(visible == 2 * b - 1, WHOLE, 2 + block + N))
    return kinds[np.arange(N)[:, None] - np.arange(N) + N - 1]


def _periodic(seen, N, b):
    """Of a mask of keys alone, j -> seen[j mod len(seen)]."""
    starts = np.arange(N) * b
    count = seen[(starts[:, None] + np.arange(b)) % len(seen)].sum(1)
    kinds = np.where(count == 0, EMPTY, np.where(count == b, WHOLE, 2 + starts % len(seen)))
    return np.broadcast_to(kinds, (N, N))


def _by_cells(pattern, C, N, b):
    """Of a pattern that is constant in every cell of C x C positions."""
    starts, cells = np.arange(N) * b, np.arange(-(-N * b // C))
    low, high = starts // C, (starts + b - 1) // C + 1
    empty, whole = np.zeros((2, N, N), bool)
    for block in range(N):  # a strip at a time, for the sake of memory
        rows = np.arange(low[block], high[block])
        seen = np.concatenate([[0], np.cumsum(pattern(rows[:, None] * C, cells * C).sum(0))])
        count = seen[high] - seen[low]
        empty[block], whole[block] = count == 0, count == len(rows) * (high - low)
    return _each(empty, whole)


def _cut_short(T, N, b):
    """Of i < T and j < T: the last block of queries and of keys may be cut short."""
    cut = (np.arange(N) == N - 1) & (T % b > 0)
    return np.where(cut & cut[:, None], 4, np.where(cut, 3, np.where(cut[:, None], 2, WHOLE)))


def invariant(pattern: Pattern) -> bool:
    """Whether `pattern` depends on i - j alone, so that it is the same wherever a document begins."""
    match pattern:
        case And(one, other) | Or(one, other):
            return invariant(one) and invariant(other)
        case Not(one):
            return invariant(one)
    return isinstance(pattern, Named) and pattern.name in ("causal", "full", "window", "dilated", "strided")


def wherever(pattern: Pattern) -> tuple[Pattern, int]:
    """(seen, n): all pairs that `pattern` sees in a document, wherever in a row that begins, are among those that
    `seen`, which is invariant, sees in the row, and pairs of the past with the first n keys of the document. With
    n > 0, `seen` sees at least i = j.
    """
    seen, n = _wherever(pattern, False)
    return (seen | window(1) if n else seen), n


def _wherever(pattern: Pattern, past: bool) -> tuple[Pattern, int]:
    """`past`: only pairs with j <= i matter."""
    match pattern:
        case _ if invariant(pattern):
            return pattern, 0
        case And(one, other) | Or(one, other):
            past = past or (isinstance(pattern, And) and any(map(_looks_back, (one, other))))
            (one, n), (other, m) = _wherever(one, past), _wherever(other, past)
            return type(pattern)(one, other), max(n, m)
        case Named("global_tokens", (n,)) if past:
            return ~full, n
        case Named("chunked", (C,)):
            return window(C), 0
        case Named("local_blocks", (C, back)):
            return window(C * (back + 1)), 0
    return full, 0


def _looks_back(pattern: Pattern) -> bool:
    """Whether it certainly sees nothing of the future."""
    match pattern:
        case And(one, other):
            return _looks_back(one) or _looks_back(other)
        case Or(one, other):
            return _looks_back(one) and _looks_back(other)
    return pattern == causal
