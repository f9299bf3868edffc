"""Data to evaluate on: rows that are read once, in order, in batches of one static shape."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slm.config import DataConfig
from slm.data.cache import cache_folder
from slm.data.corpus import Corpus, open_corpus
from slm.data.packing import Batch, EvaluationWindows, Rows
from slm.data.sources import Source, names_a_source, open_source
from slm.data.synthetic import PasskeyRows, SyntheticRows, asks_text, parse_task
from slm.data.tokenizers import Tokenizer
from slm.errors import ConfigError


@dataclass(frozen=True)
class Evaluation:
    """Rows of one or several sources, one after another."""

    rows: tuple[Rows, ...]

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.rows)

    @property
    def sources(self) -> tuple[tuple[str, int, bool], ...]:
        """Of each source: name, how many numbers of `document` are its own, and whether its documents are questions."""
        return tuple((part.name, part.documents, part.answers) for part in self.rows)

    @property
    def sequences(self) -> int:
        return sum(map(len, self.rows))

    @property
    def documents(self) -> int:
        """`document` in a batch is below this number."""
        return sum(part.documents for part in self.rows)

    def batches(
        self, batch_size: int, sequences: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Batches (batch_size / process_count, T) that cover each row once, or `sequences` rows spread evenly.

        Rows that fill up the last batch have weight 0. All processes get the same number of batches.
        Raises ConfigError if batch_size is not divisible by process_count.
        """
        first, last = process_slice(batch_size, process_index, process_count)
        count = min(sequences or self.sequences, self.sequences)
        chosen = np.arange(count) * self.sequences // count
        for begin in range(0, count, batch_size):
            mine = chosen[begin : begin + batch_size][first:last]
            yield self._read(mine, last - first)

    def _read(self, indices: np.ndarray, size: int) -> Batch:
        """The rows `indices`, ascending, and empty ones up to `size`."""
        parts, row, document = [], 0, 0
        for part in self.rows:
            inside = indices[(indices >= row) & (indices < row + len(part))] - row
            if len(inside) or part is self.rows[0]:  # an empty read still knows names, widths and dtypes
                batch = part.read(inside)
                batch["document"] = batch["document"] + np.int32(document) * (batch["segment_ids"] > 0)
                parts.append(batch)
            row += len(part)
            document += part.documents
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        missing = size - len(indices)
        return {name: np.pad(array, ((0, missing), (0, 0))) for name, array in joined.items()}


def open_evaluation(
    what: str | Sequence[str] | Corpus, data: DataConfig, tokenizer: Tokenizer, sequence_length: int, seed: int = 0
) -> Evaluation:
    """What to evaluate on: a source spec, or text itself (one string, or several documents), or a corpus.

    A string is a source if it has a known scheme, exists as a path or looks like one (see names_a_source), else text.
    Raises DataError for a missing or empty source; ConfigError for a synthetic task under another tokenizer.
    """
    if isinstance(what, str) and what.startswith("synthetic:") and not asks_text(what):
        rows = SyntheticRows(what, seed, sequence_length, "validation")
        if tokenizer.fingerprint != rows.tokenizer.fingerprint:
            raise ConfigError(
                f"{what} has a vocabulary of its own, of {len(rows.task.words)} words: evaluate a model trained on such"
            )
        return Evaluation((rows,))
    spec = what if isinstance(what, str) else ""
    if isinstance(what, Corpus):
        corpus = what
    elif isinstance(what, str) and names_a_source(what):
        corpus = whole_corpus(open_source(what, data), data, tokenizer)
    else:
        corpus = Corpus.from_texts([what] if isinstance(what, str) else what, tokenizer)
    return Evaluation((evaluation_rows(spec, corpus, data, tokenizer, sequence_length, seed),))


def whole_corpus(source: Source, data: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """All documents of a source, tokenised once."""
    return open_corpus(source.name, (source.fingerprint, "all"), source.documents, tokenizer, cache_folder(data.cache))


def evaluation_rows(
    spec: str, corpus: Corpus, data: DataConfig, tokenizer: Tokenizer, length: int, seed: int
) -> EvaluationWindows | PasskeyRows:
    """The corpus of a source, or the task that the source asks in it."""
    if asks_text(spec):
        return PasskeyRows(spec, parse_task(spec), corpus, tokenizer, seed, length, "validation")
    return evaluation_windows(corpus, data, tokenizer, length)


def evaluation_windows(corpus: Corpus, data: DataConfig, tokenizer: Tokenizer, length: int) -> EvaluationWindows:
    return EvaluationWindows(corpus, length, data.packing, tokenizer.end_of_text, tokenizer.token_bytes)


def process_slice(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """First and last + 1 of the rows of a global batch that belong to one process.

    Raises ConfigError if they cannot be shared out evenly.
    """
    if batch_size % process_count:
        raise ConfigError(
            f"a batch of {batch_size} sequences cannot be shared out among {process_count} processes: "
            f"make train.batch_size a multiple of {process_count}"
        )
    share = batch_size // process_count
    return process_index * share, (process_index + 1) * share
