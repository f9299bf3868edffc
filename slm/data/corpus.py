"""Tokenised text: one array of ids, memory-mapped from a cache that is filled once."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm.data.cache import build_once, digest
from slm.data.splits import content_hash
from slm.data.tokenizers import Tokenizer
from slm.errors import DataError

# Text that is tokenised at a time: enough for all cores, little enough to bound memory.
_BATCH_CHARACTERS = 4 * 2**20
_FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """Documents as one stream of ids; each begins with the end-of-text token, if the tokenizer has one."""

    name: str
    fingerprint: str
    """Changes when the text, its split or the tokenizer changes."""
    tokens: np.ndarray
    """(n,) uint16 or uint32, the whole stream."""
    offsets: np.ndarray
    """int64 (documents + 1,): document d is tokens[offsets[d]:offsets[d + 1]], and never empty."""
    document_bytes: np.ndarray
    """int64 (documents,): length of each text in UTF-8 bytes."""
    hashes: np.ndarray
    """uint64 (documents,): slm.data.splits.content_hash of each text."""

    @property
    def documents(self) -> int:
        return len(self.document_bytes)

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Tokenizer, name: str = "text") -> "Corpus":
        """Tokenises in memory. Raises DataError if there is no text."""
        chunks = list(_tokenised(texts, tokenizer))
        if not chunks:
            raise DataError(f"{name} is empty: nothing to tokenise")
        tokens, lengths, sizes, hashes = (np.concatenate(parts) for parts in zip(*chunks))
        return cls(name, digest(tokenizer.fingerprint, hashes.tobytes()), tokens, _offsets(lengths), sizes, hashes)


def open_corpus(
    name: str, key: tuple, documents: Callable[[], Iterator[str]], tokenizer: Tokenizer, cache: Path
) -> Corpus:
    """The corpus of `documents`, from `cache` if it was tokenised before, else tokenised now.

    key: all that decides which documents those are (source fingerprint, split); the tokenizer is added to it.
    Raises DataError if there are no documents, the disk is full, or the cached files are damaged.
    """
    fingerprint = digest("corpus", _FORMAT, tokenizer.fingerprint, *key)
    folder = build_once(
        cache / "corpora" / fingerprint, lambda temporary: _write(temporary, name, documents, tokenizer)
    )
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        arrays = [np.load(folder / f"{part}.npy") for part in ("offsets", "document_bytes", "hashes")]
        if len(tokens) != arrays[0][-1]:
            raise ValueError(f"{len(tokens)} tokens instead of {arrays[0][-1]}")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{folder} is damaged ({error}): delete it, and it will be made again") from error
    return Corpus(name, fingerprint, tokens, *arrays)


def _write(folder: Path, name: str, documents: Callable[[], Iterator[str]], tokenizer: Tokenizer) -> None:
    lengths, sizes, hashes = [], [], []
    with open(folder / "tokens.bin", "wb") as file:
        for chunk in _tokenised(documents(), tokenizer):
            file.write(chunk[0].data)
            lengths.append(chunk[1])
            sizes.append(chunk[2])
            hashes.append(chunk[3])
    if not lengths:
        raise DataError(f"{name} holds no documents")
    np.save(folder / "offsets.npy", _offsets(np.concatenate(lengths)))
    np.save(folder / "document_bytes.npy", np.concatenate(sizes))
    np.save(folder / "hashes.npy", np.concatenate(hashes))
    (folder / "meta.json").write_text(json.dumps({"name": name, "dtype": token_dtype(tokenizer).name}))


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def _tokenised(
    documents: Iterable[str], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, and tokens, bytes and hash of each document, a batch of documents at a time."""
    start = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.int32)
    for texts in _batches(documents):
        rows = [
            (np.concatenate([start, ids]), len(text.encode("utf-8")), content_hash(text))
            for text, ids in zip(texts, tokenizer.encode_batch(texts))
            if ids.size  # empty texts, and white space under a tokenizer that drops it
        ]
        if rows:
            documents_ids, sizes, hashes = zip(*rows)
            yield (
                np.concatenate(documents_ids).astype(token_dtype(tokenizer)),
                np.array([len(ids) for ids in documents_ids], np.int64),
                np.array(sizes, np.int64),
                np.array(hashes, np.uint64),
            )


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])
