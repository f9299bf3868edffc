"""Tasks in one shared vocabulary of symbols, asked as text is: after an end-of-text token, each token the next's input.

They mix with each other, and a model can move from one to another. Each is drawn one sample at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from slm.data.synthetic.draws import Draws, Side
from slm.data.synthetic.task import Samples, Task
from slm.data.tokenizers import END_OF_TEXT, UNKNOWN

SYMBOLS = tuple(f"s{number}" for number in range(64))
DIGITS = tuple("0123456789")
VOCABULARY = (END_OF_TEXT, UNKNOWN, "|", "?", "=", "+", ";", *DIGITS, *SYMBOLS)

_ID = {word: number for number, word in enumerate(VOCABULARY)}
_SYMBOL_IDS = np.array([_ID[word] for word in SYMBOLS])

Sample = tuple[list[int], list[bool]]
"""Ids, and which of them are answers."""


def _ids(words: Iterable[str]) -> list[int]:
    return [_ID[word] for word in words]


def _asked(question: list[int], answer: list[int]) -> Sample:
    return question + answer, [False] * len(question) + [True] * len(answer)


@dataclass(frozen=True, kw_only=True)
class SymbolTask(Task):
    """A task of this file; `length` is the longest sample."""

    @property
    def words(self) -> tuple[str, ...]:
        return VOCABULARY

    @property
    def shortest(self) -> int:
        return len(self.sample(np.random.default_rng(0), 1)[0])

    def check(self) -> str | None:
        if self.length is not None and self.length < self.shortest:
            return f"length = {self.length}: must be at least {self.shortest}"
        return None

    def sample(self, rng: np.random.Generator, length: int) -> Sample:
        """One sample; it may exceed a length that is too short for it."""
        raise NotImplementedError

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        tokens, targets = np.zeros((2, draws.count, length), np.int64)
        scored = np.zeros((draws.count, length), bool)
        lengths = np.zeros(draws.count, np.int64)
        for row, rng in enumerate(draws.generators()):
            ids, answers = self.sample(rng, length)
            n = lengths[row] = len(ids)
            tokens[row, :n] = [_ID[END_OF_TEXT], *ids[:-1]]
            targets[row, :n] = ids
            scored[row, :n] = answers
        return Samples(tokens, targets, scored, lengths)


class Copy(SymbolTask):
    """`x1 ... xn | x1 ... xn`."""

    def sample(self, rng: np.random.Generator, length: int) -> Sample:
        symbols = rng.choice(_SYMBOL_IDS, max(1, (length - 1) // 2)).tolist()
        return _asked(symbols + _ids("|"), symbols)


class Reverse(SymbolTask):
    """`x1 ... xn | xn ... x1`."""

    def sample(self, rng: np.random.Generator, length: int) -> Sample:
        symbols = rng.choice(_SYMBOL_IDS, max(1, (length - 1) // 2)).tolist()
        return _asked(symbols + _ids("|"), symbols[::-1])


class Induction(SymbolTask):
    """`... ? a ... ?` asks for `a`: what followed the marker before (`induction_heads` has the published settings)."""

    def sample(self, rng: np.random.Generator, length: int) -> Sample:
        symbols = rng.choice(_SYMBOL_IDS, max(1, length - 3)).tolist()
        place = int(rng.integers(len(symbols)))
        return _asked([*symbols[:place], *_ids("?"), *symbols[place:], *_ids("?")], [symbols[place]])


class Recall(SymbolTask):
    """`k1 v1 k2 v2 ... | k2 v2 k1 v1 ...`: every value is asked for (`mqar` has the published settings)."""

    def sample(self, rng: np.random.Generator, length: int) -> Sample:
        keys, values = _SYMBOL_IDS[:32], _SYMBOL_IDS[32:]
        pairs = int(np.clip((length - 1) // 4, 1, len(keys)))
        told = np.stack([rng.permutation(keys)[:pairs], rng.choice(values, pairs)], axis=1)
        asked = rng.permutation(told, axis=0)
        ids = [*told.ravel().tolist(), *_ids("|"), *asked.ravel().tolist()]
        return ids, [False] * (2 * pairs + 1) + [False, True] * pairs


class Addition(SymbolTask):
    """`1 2 + 3 4 5 = 3 5 7 ;` with numbers below 1000, as many sums as fit; the answer ends with `;`."""

    @property
    def shortest(self) -> int:
        return len("999+999=1998;")

    def sample(self, rng: np.random.Generator, length: int) -> Sample:
        ids: list[int] = []
        answers: list[bool] = []
        while True:
            a, b = rng.integers(1000, size=2).tolist()
            sum_ids, sum_answers = _asked(_ids(f"{a}+{b}="), _ids(f"{a + b};"))
            if ids and len(ids) + len(sum_ids) > length:
                return ids, answers
            ids += sum_ids
            answers += sum_answers


class Parity(SymbolTask):
    """`0 1 1 ... = 0`: whether the number of ones is odd, which no fixed-depth attention can track in general."""

    def sample(self, rng: np.random.Generator, length: int) -> Sample:
        bits = rng.integers(2, size=max(1, length - 2)).tolist()
        return _asked(_ids([*map(str, bits), "="]), _ids(str(sum(bits) % 2)))
