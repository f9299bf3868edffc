"""Samples of tasks as rows for training and evaluation, and the tokenizer of their vocabulary."""

import functools

import numpy as np

from slm.data.packing import Batch
from slm.data.synthetic.draws import Draws, Side
from slm.data.synthetic.task import Samples, Task, stream
from slm.data.tokenizers import END_OF_TEXT, UNKNOWN, Tokenizer
from slm.errors import DataError

ENDLESS = 2**31 - 1
"""Samples of a training set without end: the largest number that grain can shuffle."""


class TaskRows:
    """One sample a row, padded to `length`; see slm.data.packing.Rows. Training and validation draw from streams of
    their own; a task with few different samples (short sums) will nevertheless meet some of them on both sides.

    Padding, at the end of a row, has segment 0 and weight 0. Raises DataError if a sample does not fit into `length`.
    """

    answers = True

    def __init__(self, spec: str, task: Task, token_bytes: np.ndarray, seed: int, length: int, side: Side):
        self.name = spec
        self.task = task
        self._seed, self._side, self._length, self._bytes = seed, side, length, token_bytes
        self._stream = stream(spec.split(":")[1], task)
        self._endless = side == "train" and not task.samples
        self.documents = task.tests if side == "validation" else task.samples or ENDLESS
        least = max(task.shortest, task.length or 0)
        if length < least:
            raise DataError(
                f"{spec} needs data.sequence_length of at least {least}, not {length}"
                + (" (or data.validation_length, to be longer in validation alone)" if side == "validation" else "")
            )

    def __len__(self) -> int:
        return self.documents

    def draw(self, draws: Draws, length: int) -> Samples:
        """The samples of `draws.indices`."""
        return self.task.draw(draws, length, self._side)

    def read(self, indices: np.ndarray) -> Batch:
        if not len(indices):  # names, widths and dtypes; tasks need not care
            return {name: array[:0] for name, array in self.read(np.zeros(1, np.int64)).items()}
        draws = Draws(self._seed, self._stream, self._side, indices)
        samples = self.draw(draws, self.task.length or self._length)
        n = samples.tokens.shape[1]
        lengths = np.full(draws.count, n) if samples.lengths is None else samples.lengths
        real = np.arange(n) < lengths[:, None]
        scored = samples.scored & real
        weights = scored.astype(np.float32)
        if self.task.weigh == "samples":
            weights /= np.maximum(scored.sum(axis=1, keepdims=True), 1).astype(np.float32)
        columns = {
            "tokens": samples.tokens * real,
            "targets": samples.targets * real,
            "weights": weights,
            "segment_ids": real,
            "positions": np.arange(n) * real,
            "bytes": self._bytes[samples.targets * scored] * scored,
            "document": draws.indices[:, None] * real,
        }
        batch = {}
        for name, values in columns.items():
            batch[name] = np.zeros((draws.count, self._length), np.float32 if name == "weights" else np.int32)
            batch[name][:, :n] = values
        return batch

    def summary(self) -> dict[str, int | None]:
        known = None if self._endless else self.documents
        return {"sequences": known, "documents": known, "tokens": None, "bytes": None}


@functools.cache
def word_tokenizer(words: tuple[str, ...]) -> Tokenizer:
    """Words separated by white space; ids are their numbers."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if END_OF_TEXT in vocabulary:
        backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)
