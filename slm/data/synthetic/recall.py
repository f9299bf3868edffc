"""Associative recall of Zoology (Arora et al. 2023, arXiv:2312.04927; github.com/HazyResearch/zoology, zoology/data).

Every sample tells key-value pairs first, and later asks for each key once. The answer is the target at the position of
the asked key and is never shown: what follows a query is filler. Nothing else is scored.

In these benchmarks each batch holds one setting and its loss is a mean. Here batches mix settings, so a source of a
mixture needs `weigh=samples` to have the same expected gradient.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slm.data.synthetic.draws import Draws, Side
from slm.data.synthetic.task import Samples, Task, numbers


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall (`multiquery_ar`).

    `k1 v1 k2 v2 ... | k2 . . . k1 . ...`: keys are distinct ids from [1, vocab / 2), values distinct ids from
    [vocab / 2, vocab). After the pairs (the bar is not written) queries stand at even distances 2g, where the g are
    drawn without replacement with probabilities proportional to (g + 1)^(power - 1).

    Published: vocab 8192; training on 100,000 samples of (length 64, pairs 4) and 20,000 each of (128, 8), (256, 16),
    (256, 32), (256, 64); tests of 1,000 each of (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128),
    (1024, 256). configs/mqar.py has them.
    """

    length: int = 64
    samples: int = 100_000
    tests: int = 1000
    vocab: int = 8192
    """Ids: half of them keys, half of them values."""
    pairs: int = 4
    """Key-value pairs, and queries."""
    power: float = 0.01
    """Of the law of the gaps (a); 1: queries stand anywhere alike."""
    filler: Literal["random", "apart", "blank"] = "random"
    """Tokens between the queries. random: any id, as published, so that some repeat a key of the sample by chance and
    yet are not scored (zoology issue 29); apart: any id but the sample's keys; blank: id 0, which is nothing else."""

    @property
    def words(self) -> tuple[str, ...]:
        return numbers(self.vocab)

    @property
    def told(self) -> int:
        """Tokens before the queries."""
        return 2 * self.pairs

    def check(self) -> str | None:
        if self.pairs < 1:
            return f"pairs = {self.pairs}: must be at least 1"
        if self.length < self.told + 2 * self.pairs:
            return f"{self.pairs} pairs need length of at least {self.told + 2 * self.pairs}, not {self.length}"
        if self.vocab < 2 * self.pairs + 2:
            return f"{self.pairs} pairs need vocab of at least {2 * self.pairs + 2}, not {self.vocab}"
        return self._check_power()

    def _check_power(self) -> str | None:
        return None if self.power > 0 else f"power = {self.power}: must be above 0"

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        keys, values = self._pairs(draws)
        context = np.stack([keys, values], axis=2).reshape(draws.count, -1)
        return self._ask(draws, context, keys[:, :, None], values)

    def _pairs(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, (B, pairs) each."""
        half = self.vocab // 2
        keys = 1 + draws.choose(half - 1, self.pairs)
        return keys, half + draws.choose(self.vocab - half, self.pairs)

    def _ask(self, draws: Draws, context: np.ndarray, keys: np.ndarray, values: np.ndarray) -> Samples:
        """Queries for keys (B, pairs, tokens of a key), one after another or with filler between, after the context."""
        step = keys.shape[2] + 1
        places = (self.length - context.shape[1]) // step
        gaps = draws.choose_weighted(np.arange(1.0, places + 1) ** (self.power - 1), self.pairs)
        tokens = np.zeros((draws.count, self.length), np.int64)
        tokens[:, : context.shape[1]] = context
        query = context.shape[1] + step * gaps
        for i in range(step - 1):
            np.put_along_axis(tokens, query + i, keys[:, :, i], axis=1)
        targets = np.zeros_like(tokens)
        np.put_along_axis(targets, query + step - 2, values, axis=1)
        if self.filler != "blank":
            # As published, id 0 marks what is to be filled: no key and no value is 0.
            tokens = np.where(tokens == 0, self._filler(draws, keys.reshape(draws.count, -1)), tokens)
        return Samples(tokens, targets, targets > 0)

    def _filler(self, draws: Draws, keys: np.ndarray) -> np.ndarray:
        if self.filler == "random":
            return draws.integers(self.vocab, self.length)
        # Number n among the ids that are no keys, by stepping over the keys in ascending order.
        keys = np.sort(keys, axis=1)
        fresh = np.concatenate([np.ones_like(keys[:, :1], bool), keys[:, 1:] != keys[:, :-1]], axis=1)
        filler = draws.integers(self.vocab - fresh.sum(axis=1, keepdims=True), self.length)
        for i in range(keys.shape[1]):
            filler += fresh[:, i : i + 1] & (filler >= keys[:, i : i + 1])
        return filler


@dataclass(frozen=True, kw_only=True)
class ForgettingMQAR(MQAR):
    """MQAR in which some keys get a new value after all pairs: the last value counts (`forgetting_mqar`).

    `k1 v1 k2 v2 k3 v3 k2 v4 | ...`. A new value differs from the key's old one. (The published code compares it with
    the old value of another key, so that one in vocab / 2 of its updates changes nothing.)

    Published: updates 4; training on 100,000 samples of (length 64, pairs 4) and 20,000 each of (128, 9), (256, 16),
    (256, 25), (256, 36); tests of 1,000 each of (64, 4), (64, 9), (128, 16), (256, 36), (512, 64), (1024, 144),
    (2048, 256).
    """

    updates: int = 4
    """Keys that get a new value."""

    @property
    def told(self) -> int:
        return 2 * (self.pairs + self.updates)

    def check(self) -> str | None:
        if not 0 <= self.updates <= self.pairs:
            return f"updates = {self.updates}: must be between 0 and pairs = {self.pairs}"
        return super().check()

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        keys, values = self._pairs(draws)
        half = self.vocab // 2
        updated = draws.choose(self.pairs, self.updates)
        old = np.take_along_axis(values, updated, axis=1)
        new = half + draws.integers(self.vocab - half - 1, self.updates)
        new += new >= old
        told = np.concatenate([keys, np.take_along_axis(keys, updated, axis=1)], axis=1)
        context = np.stack([told, np.concatenate([values, new], axis=1)], axis=2).reshape(draws.count, -1)
        last = values.copy()
        np.put_along_axis(last, updated, new, axis=1)
        return self._ask(draws, context, keys[:, :, None], last)


@dataclass(frozen=True, kw_only=True)
class CompositionalMQAR(MQAR):
    """MQAR with keys of two tokens, neither of which tells the value alone (`compositional_mqar`).

    `a x v1 b x v2 a y v3 b y v4 | b x . a x ...`: n first tokens and n second tokens make pairs = n^2 keys. First
    tokens come from [1, vocab / 3), second ones from the next third, values from the rest. A query's answer is the
    target at its second token.

    Published: training on 100,000 samples of (length 64, pairs 4) and 20,000 each of (128, 9), (256, 16), (256, 25),
    (256, 36); tests of 1,000 each of (64, 4), (64, 9), (128, 16), (256, 36), (512, 64), (1024, 144), (2048, 256).
    """

    @property
    def told(self) -> int:
        return 3 * self.pairs

    def check(self) -> str | None:
        side = math.isqrt(max(self.pairs, 0))
        if self.pairs < 1 or side**2 != self.pairs:
            return f"pairs = {self.pairs}: must be a square, such as 4, 9 or 16"
        if self.length < 6 * self.pairs:
            return f"{self.pairs} pairs need length of at least {6 * self.pairs}, not {self.length}"
        if self.vocab < 3 * max(self.pairs, side + 1):
            return f"{self.pairs} pairs need vocab of at least {3 * max(self.pairs, side + 1)}, not {self.vocab}"
        return self._check_power()

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        n, third = math.isqrt(self.pairs), self.vocab // 3
        first = 1 + draws.choose(third - 1, n)
        second = third + draws.choose(third, n)
        values = 2 * third + draws.choose(self.vocab - 2 * third, self.pairs)
        cell = draws.choose(self.pairs, self.pairs)
        keys = np.stack(
            [np.take_along_axis(first, cell // n, axis=1), np.take_along_axis(second, cell % n, axis=1)], axis=2
        )
        context = np.concatenate([keys, values[:, :, None]], axis=2).reshape(draws.count, -1)
        return self._ask(draws, context, keys, values)
