"""Tasks made of symbols, with right answers: what a sequence model can do, told apart from what it has memorised.

Each sample is a pure function of (seed, index). Only answers are scored (weight 1). One sample fills one row, after an
end-of-text token as before any document. A task is one function here and one line in TASKS.
"""

import difflib
import zlib
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

from slm.data.packing import Batch
from slm.data.tokenizers import END_OF_TEXT, UNKNOWN, Tokenizer
from slm.errors import DataError

SYMBOLS = tuple(f"s{number}" for number in range(64))
DIGITS = tuple("0123456789")
VOCABULARY = (END_OF_TEXT, UNKNOWN, "|", "?", "=", "+", ";", *DIGITS, *SYMBOLS)
"""All tasks share it, so that they mix and a model can move from one to another."""

_ID = {word: number for number, word in enumerate(VOCABULARY)}
_SYMBOL_IDS = np.array([_ID[word] for word in SYMBOLS])

Sample = tuple[list[int], list[bool]]
Task = Callable[[np.random.Generator, int], Sample]
"""(generator, longest length) -> ids and which of them are answers. It may exceed a length that is too short for it."""


def _ids(words: Iterable[str]) -> list[int]:
    return [_ID[word] for word in words]


def _asked(question: list[int], answer: list[int]) -> Sample:
    return question + answer, [False] * len(question) + [True] * len(answer)


def copy(rng: np.random.Generator, length: int) -> Sample:
    """`x1 ... xn | x1 ... xn`."""
    symbols = rng.choice(_SYMBOL_IDS, max(1, (length - 1) // 2)).tolist()
    return _asked(symbols + _ids("|"), symbols)


def reverse(rng: np.random.Generator, length: int) -> Sample:
    """`x1 ... xn | xn ... x1`."""
    symbols = rng.choice(_SYMBOL_IDS, max(1, (length - 1) // 2)).tolist()
    return _asked(symbols + _ids("|"), symbols[::-1])


def induction(rng: np.random.Generator, length: int) -> Sample:
    """`... ? a ... ?` asks for `a`: what followed the marker before (induction heads; Fu et al. 2023, H3)."""
    symbols = rng.choice(_SYMBOL_IDS, max(1, length - 3)).tolist()
    place = int(rng.integers(len(symbols)))
    return _asked([*symbols[:place], *_ids("?"), *symbols[place:], *_ids("?")], [symbols[place]])


def recall(rng: np.random.Generator, length: int) -> Sample:
    """`k1 v1 k2 v2 ... | k2 v2 k1 v1 ...`: every value is asked for (MQAR; Arora et al. 2023, Zoology)."""
    keys, values = _SYMBOL_IDS[:32], _SYMBOL_IDS[32:]
    pairs = int(np.clip((length - 1) // 4, 1, len(keys)))
    told = np.stack([rng.permutation(keys)[:pairs], rng.choice(values, pairs)], axis=1)
    asked = rng.permutation(told, axis=0)
    ids = [*told.ravel().tolist(), *_ids("|"), *asked.ravel().tolist()]
    return ids, [False] * (2 * pairs + 1) + [False, True] * pairs


def addition(rng: np.random.Generator, length: int) -> Sample:
    """`1 2 + 3 4 5 = 3 5 7 ;` with numbers below 1000, as many sums as fit; the answer ends with `;`."""
    ids: list[int] = []
    answers: list[bool] = []
    while True:
        a, b = rng.integers(1000, size=2).tolist()
        sum_ids, sum_answers = _asked(_ids(f"{a}+{b}="), _ids(f"{a + b};"))
        if ids and len(ids) + len(sum_ids) > length:
            return ids, answers
        ids += sum_ids
        answers += sum_answers


def parity(rng: np.random.Generator, length: int) -> Sample:
    """`0 1 1 ... = 0`: whether the number of ones is odd, which no fixed-depth attention can track in general."""
    bits = rng.integers(2, size=max(1, length - 2)).tolist()
    return _asked(_ids([*map(str, bits), "="]), _ids(str(sum(bits) % 2)))


TASKS: dict[str, Task] = {
    "copy": copy,
    "reverse": reverse,
    "induction": induction,
    "recall": recall,
    "addition": addition,
    "parity": parity,
}

VALIDATION_SAMPLES = 1024


class SyntheticRows:
    """Samples of one task as rows of length T; see slm.data.packing.Rows.

    Training and validation draw from random streams of their own. A task with few different samples (short sums) will
    nevertheless meet some of them on both sides.
    Raises DataError for an unknown task, naming the nearest, or if a sample does not fit into `length`.
    """

    def __init__(self, spec: str, seed: int, length: int, side: Literal["train", "validation"]):
        name = spec.removeprefix("synthetic:")
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean synthetic:{near[0]}?" if near else f"there are {', '.join(TASKS)}"
            raise DataError(f"no synthetic task '{name}': {hint}")
        self.name = spec
        self._task, self._length = TASKS[name], length
        stream = 2 * zlib.crc32(name.encode()) + (side == "validation")
        self._key = np.array([seed % 2**64, stream], np.uint64)
        # Training never runs out: the largest number that grain can shuffle.
        self.documents = VALIDATION_SAMPLES if side == "validation" else 2**31 - 1
        self._bytes = synthetic_tokenizer().token_bytes
        shortest = len(self._task(self._generator(0), 1)[0])
        if len(self._task(self._generator(0), length)[0]) > length:
            raise DataError(f"{spec} needs data.sequence_length of at least {shortest}, not {length}")

    def __len__(self) -> int:
        return self.documents

    def read(self, indices: np.ndarray) -> Batch:
        shape = (len(indices), self._length)
        names = ("tokens", "targets", "segment_ids", "positions", "bytes", "document")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["weights"] = np.zeros(shape, np.float32)
        for row, index in enumerate(indices):
            ids, answers = self._task(self._generator(int(index)), self._length)
            n = len(ids)
            batch["tokens"][row, :n] = [_ID[END_OF_TEXT], *ids[:-1]]
            batch["targets"][row, :n] = ids
            batch["weights"][row, :n] = answers
            batch["segment_ids"][row, :n] = 1
            batch["positions"][row, :n] = np.arange(n)
            batch["document"][row, :n] = index
        batch["bytes"] = self._bytes[batch["targets"]] * (batch["weights"] > 0)
        return batch

    def summary(self) -> dict[str, int | None]:
        return {"sequences": None, "documents": None, "tokens": None, "bytes": None}

    def _generator(self, index: int) -> np.random.Generator:
        # A counter-based generator: sample i starts in a block of its own, so it needs none of the samples before it.
        return np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, index, 0]))


def synthetic_tokenizer() -> Tokenizer:
    """Words of VOCABULARY, separated by white space."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)
