"""Holding out validation text, and the proof that none of it is trained on."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from slm.errors import DataError

Side = Literal["all", "train", "validation"]
Documents = Callable[[], Iterator[str]]


def content_hash(text: str) -> int:
    """64 bits that depend on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def take_side(documents: Documents, side: Side, how: str, fraction: float) -> Iterator[str]:
    """The documents of one side of a split.

    "document": held out iff a hash of the text falls below `fraction`, so that a copy of a document, in whatever
    source, lands on the same side. "tail": the last `fraction` of all characters, cut inside a document if need be;
    one file of n characters keeps exactly int(n * (1 - fraction)) for training, as in nanoGPT.
    """
    if side == "all":
        yield from documents()
    elif how == "document":
        threshold = int(fraction * 2**64)
        for text in documents():
            if (content_hash(text) < threshold) == (side == "validation"):
                yield text
    else:
        yield from _cut(documents, side, int(sum(map(len, documents())) * (1 - fraction)))


def _cut(documents: Documents, side: Side, cut: int) -> Iterator[str]:
    """The text before (train) or after (validation) character `cut` of the stream of all documents."""
    position = 0
    for text in documents():
        inside = min(max(cut - position, 0), len(text))
        position += len(text)
        if piece := text[:inside] if side == "train" else text[inside:]:
            yield piece


def check_disjoint(train_hashes: list[np.ndarray], validation_hashes: list[np.ndarray]) -> None:
    """Raises DataError, saying how many, if documents for validation are also trained on.

    Each array holds the `content_hash` of the documents of one corpus, uint64.
    """
    validation = np.unique(np.concatenate(validation_hashes))
    shared = np.intersect1d(np.concatenate(train_hashes), validation)
    if shared.size:
        raise DataError(
            f"{shared.size} of {validation.size} validation documents are also in the training data: "
            "validation would measure memory. Remove the copies, or leave data.validation empty with "
            "data.validation_split = document, which keeps copies on one side"
        )
