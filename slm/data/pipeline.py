"""From `data` settings to batches: the one door through which training gets its data."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.config import DataConfig
from slm.data.cache import build_once, cache_folder, digest
from slm.data.corpus import Corpus, open_corpus
from slm.data.evaluation import Evaluation, evaluation_rows, process_slice, whole_corpus
from slm.data.packing import Batch, Rows, TrainingWindows
from slm.data.sources import Source, open_source
from slm.data.splits import Side, check_disjoint, take_side
from slm.data.synthetic import PasskeyRows, SyntheticRows, asks_text, parse_task
from slm.data.tokenizers import Tokenizer, build_tokenizer, depends_on_documents
from slm.errors import ConfigError, DataError

FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions")


@dataclass(frozen=True)
class Data:
    """Training and validation data of one experiment."""

    tokenizer: Tokenizer
    fingerprint: str
    """Changes when any batch may change, for whatever reason but the seed."""
    train: tuple[Rows, ...]
    """One for each source."""
    validation: Evaluation | None
    """None if nothing was held out (validation_fraction = 0)."""
    weights: tuple[float, ...]
    seed: int

    @property
    def train_sequences(self) -> int:
        """Sequences in one pass over the training data."""
        return sum(map(len, self.train))

    def train_batch(self, step: int, batch_size: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's share of batch `step`: arrays (batch_size / process_count, T), a function of (seed, step).

        Raises DataError if the data holds fewer sequences than a batch; ConfigError if the batch cannot be shared out.
        """
        if self.train_sequences < batch_size:
            raise DataError(
                f"the training data holds {self.train_sequences} sequences, fewer than one batch of {batch_size}: "
                "lower train.batch_size or data.sequence_length, or give more text"
            )
        source, index = self.drawn(step, batch_size, process_index, process_count)
        batch: Batch = {}
        for number in np.unique(source):
            mine = source == number
            part = self.train[number].read(index[mine])
            for name in FIELDS:
                whole = batch.setdefault(name, np.empty((len(source), *part[name].shape[1:]), part[name].dtype))
                whole[mine] = part[name]
        return batch

    def drawn(
        self, step: int, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, row in it) of each sequence of this process's share of batch `step`, int64."""
        first, last = process_slice(batch_size, process_index, process_count)
        drawn = [self._order[step * batch_size + row] for row in range(first, last)]
        source, index = np.array(drawn, np.int64).reshape(-1, 2).T
        return source, index

    @functools.cached_property
    def _order(self) -> Any:
        """Random access to (source, row) by global sequence number; each source is reshuffled every epoch."""
        import grain

        # grain takes 32-bit seeds; with one for all, sources of equal length would share their order.
        seeds = np.random.SeedSequence(self.seed % 2**64).generate_state(len(self.train)).tolist()
        orders = [
            grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat().map(functools.partial(_pair, number))
            for number, (rows, seed) in enumerate(zip(self.train, seeds))
        ]
        return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, self.weights)

    def validation_batches(
        self, batch_size: int, sequences: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Every validation sequence once, or `sequences` of them spread evenly; see Evaluation.batches.

        Raises DataError if nothing was held out.
        """
        if self.validation is None:
            raise DataError("nothing was held out: set data.validation, or data.validation_fraction above 0")
        return self.validation.batches(batch_size, sequences, process_index, process_count)

    def summary(self) -> list[dict[str, Any]]:
        """A row for each source and side: source, side, documents, tokens, bytes, bytes_per_token, sequences.

        Counts of a synthetic task, which never ends, are None.
        """
        sides = [("train", self.train), ("validation", self.validation.rows if self.validation else ())]
        table = []
        for side, parts in sides:
            for rows in parts:
                counts = rows.summary()
                ratio = counts["bytes"] / counts["tokens"] if counts["tokens"] else None
                table.append({"source": rows.name, "side": side, **counts, "bytes_per_token": ratio})
        return table


def _pair(number: int, row: int) -> tuple[int, int]:
    return number, row


def open_data(data: DataConfig, seed: int, tokenizer: Tokenizer | None = None) -> Data:
    """Opens everything that `data` names: tokenises what is not in the cache yet, and holds out validation text.

    tokenizer: used instead of data.tokenizer, as for a model that has one. Synthetic tasks bring their own.
    Raises DataError for a source that is missing, empty, unreadable or too small, if a split leaves one side empty, if
    training and validation share documents, or if the disk is full; ConfigError for settings that do not go together.
    """
    synthetic = [spec.startswith("synthetic:") and not asks_text(spec) for spec in data.source + data.validation]
    if any(synthetic):
        if not all(synthetic):
            raise ConfigError("data.source: synthetic tasks have a vocabulary of their own and do not mix with text")
        return _open_synthetic(data, seed, tokenizer)

    sources = [open_source(spec, data) for spec in data.source]
    held_out = [open_source(spec, data) for spec in data.validation]
    splitting = not held_out and data.validation_fraction > 0
    tokenizer = tokenizer or _open_tokenizer(sources, splitting, data)
    if splitting:
        train = [_open_side(source, "train", data, tokenizer) for source in sources]
        validation = [_open_side(source, "validation", data, tokenizer) for source in sources]
    else:
        train = [whole_corpus(source, data, tokenizer) for source in sources]
        validation = [whole_corpus(source, data, tokenizer) for source in held_out]
    held_out_specs = data.source if splitting else data.validation
    # Around a question, text may be known: the answer is not in the training data.
    unseen = [corpus.hashes for spec, corpus in zip(held_out_specs, validation) if not asks_text(spec)]
    if unseen:
        check_disjoint([corpus.hashes for corpus in train], unseen)

    length = data.sequence_length
    tasks = [spec for spec in data.source + data.validation if asks_text(spec)]
    return Data(
        tokenizer=tokenizer,
        fingerprint=digest(
            [corpus.fingerprint for corpus in train + validation],
            _weights(data),
            length,
            data.packing,
            len(train),
            *_optional(tasks, data.validation_length),
        ),
        train=tuple(_training_rows(spec, corpus, data, tokenizer, seed) for spec, corpus in zip(data.source, train)),
        validation=Evaluation(
            tuple(
                evaluation_rows(spec, corpus, data, tokenizer, data.validation_length or length, seed)
                for spec, corpus in zip(held_out_specs, validation)
            )
        )
        if validation
        else None,
        weights=_weights(data),
        seed=seed,
    )


def _training_rows(spec: str, corpus: Corpus, data: DataConfig, tokenizer: Tokenizer, seed: int) -> Rows:
    if asks_text(spec):
        return PasskeyRows(spec, parse_task(spec), corpus, tokenizer, seed, data.sequence_length, "train")
    return TrainingWindows(corpus, data.sequence_length, data.packing, tokenizer.end_of_text)


def _optional(*values: Any) -> list[Any]:
    """Those that are set: a fingerprint does not change with settings that were added later and are not used."""
    return [value for value in values if value]


def _open_synthetic(data: DataConfig, seed: int, tokenizer: Tokenizer | None) -> Data:
    length, held_out = data.sequence_length, data.validation or data.source
    train = tuple(SyntheticRows(spec, seed, length, "train") for spec in data.source)
    rows = tuple(SyntheticRows(spec, seed, data.validation_length or length, "validation") for spec in held_out)
    own = train[0].tokenizer
    for other in (*train, *rows):
        if other.tokenizer.fingerprint != own.fingerprint:
            raise ConfigError(
                f"{train[0].name} has a vocabulary of {own.vocab_size} words and {other.name} another of "
                f"{other.tokenizer.vocab_size}: tasks mix where their vocabularies are equal"
            )
    if tokenizer is not None and tokenizer.fingerprint != own.fingerprint:
        raise ConfigError("synthetic tasks have a vocabulary of their own: the model's tokenizer cannot read them")
    fingerprint = digest(
        "synthetic",
        own.fingerprint,
        data.source,
        held_out,
        _weights(data),
        length,
        *_optional(data.validation_length),
    )
    return Data(own, fingerprint, train, Evaluation(rows), _weights(data), seed)


def _weights(data: DataConfig) -> tuple[float, ...]:
    return data.weights or (1.0,) * len(data.source)


def _open_tokenizer(sources: list[Source], splitting: bool, data: DataConfig) -> Tokenizer:
    """data.tokenizer, which sees training documents only; made once, if it is made from them."""

    def documents() -> Iterator[str]:
        for source in sources:
            yield from _side(source, "train" if splitting else "all", data)

    if not depends_on_documents(data.tokenizer):
        return build_tokenizer(data.tokenizer, documents)
    split = (data.validation_split, data.validation_fraction) if splitting else None
    key = digest("tokenizer", data.tokenizer, [source.fingerprint for source in sources], split)
    folder = cache_folder(data.cache) / "tokenizers" / key
    build_once(folder, lambda temporary: build_tokenizer(data.tokenizer, documents).save(temporary))
    return Tokenizer.load(folder)


def _side(source: Source, side: Side, data: DataConfig) -> Iterator[str]:
    return take_side(source.documents, side, data.validation_split, data.validation_fraction)


def _open_side(source: Source, side: Side, data: DataConfig, tokenizer: Tokenizer) -> Corpus:
    def documents() -> Iterator[str]:
        empty = True
        for text in _side(source, side, data):
            empty = False
            yield text
        if empty:
            raise DataError(
                f"{source.name}: the split leaves no documents for {side}: change data.validation_fraction "
                f"= {data.validation_fraction}, set data.validation_split = tail (which cuts inside a document), "
                "or name data.validation yourself"
            )

    key = (source.fingerprint, side, data.validation_split, data.validation_fraction)
    return open_corpus(source.name, key, documents, tokenizer, cache_folder(data.cache))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError if the tokenizer has ids beyond the rows of the model's embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"vocabulary that does not fit: the tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size is "
            f"{vocab_size}: set it to at least {tokenizer.vocab_size}, or to 0 to take the tokenizer's"
        )
