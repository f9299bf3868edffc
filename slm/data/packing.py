"""Windows of fixed length over a corpus, read at random and many at once."""

from typing import Literal, Protocol

import numpy as np

from slm.data.corpus import Corpus
from slm.errors import DataError

Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """Sequences of equal length T by number: what training and evaluation draw from."""

    name: str
    documents: int
    """Documents that the rows come from."""
    answers: bool
    """Whether each document is a question, whose answer is right or wrong as a whole."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Batch:
        """Rows as arrays (len(indices), T): tokens, targets, segment_ids, positions int32 and weights float32."""
        ...

    def summary(self) -> dict[str, int | None]:
        """Sequences, documents, tokens and bytes; None for what is not counted."""
        ...


class _Windows:
    answers = False

    def __init__(self, corpus: Corpus, length: int, packing: Literal["documents", "stream"], end_of_text: int | None):
        self.name, self.documents = corpus.name, corpus.documents
        self.corpus, self.length, self.packing = corpus, length, packing
        self._separated = end_of_text is not None

    def summary(self) -> dict[str, int | None]:
        sizes = {"tokens": len(self.corpus.tokens), "bytes": int(self.corpus.document_bytes.sum())}
        return {"sequences": len(self), "documents": self.documents, **sizes}


class TrainingWindows(_Windows):
    """Window i feeds tokens [iT, iT + T) and asks for tokens [iT + 1, iT + T].

    Windows never move: an epoch reads each once, the next one in another order. Up to T tokens at the end go unread.

    packing "documents": segments and positions start afresh at each document, and at each window. The target of a
    document's last token is the end of text that begins the next, which is how endings are learned; without such a
    token a document says nothing about the next, and that target has weight 0. "stream": one segment, all weights 1.

    Raises DataError if the corpus does not fill one window.
    """

    def __init__(self, corpus: Corpus, length: int, packing: Literal["documents", "stream"], end_of_text: int | None):
        super().__init__(corpus, length, packing, end_of_text)
        if len(self) < 1:
            raise DataError(
                f"{corpus.name}: {len(corpus.tokens)} training tokens do not fill one sequence of "
                f"data.sequence_length = {length} (and one more as the last target): lower it, or give more text"
            )

    def __len__(self) -> int:
        return (len(self.corpus.tokens) - 1) // self.length

    def read(self, indices: np.ndarray) -> Batch:
        start_B = np.asarray(indices, np.int64) * self.length
        tokens_BxT1 = self.corpus.tokens[start_B[:, None] + np.arange(self.length + 1)].astype(np.int32)
        document_BxT1 = documents_at(self.corpus.offsets, start_B, self.length + 1)
        segment_ids_BxT, positions_BxT = segments(self.packing, self.corpus.offsets, start_B, document_BxT1)
        weights_BxT = np.ones(segment_ids_BxT.shape, np.float32)
        if self.packing == "documents" and not self._separated:
            weights_BxT[document_BxT1[:, 1:] != document_BxT1[:, :-1]] = 0
        return {
            "tokens": tokens_BxT1[:, :-1],
            "targets": tokens_BxT1[:, 1:],
            "weights": weights_BxT,
            "segment_ids": segment_ids_BxT,
            "positions": positions_BxT,
        }


class EvaluationWindows(_Windows):
    """Windows that ask for every token of a corpus exactly once, the last one padded.

    Not scored (weight 0): padding; the end of text that begins a document; without one, a document's first token,
    which nothing precedes. Adds `bytes` (UTF-8 bytes of each scored target) and `document` (number of the target's
    document in the corpus), int32, to what training windows hold.
    """

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        packing: Literal["documents", "stream"],
        end_of_text: int | None,
        token_bytes: np.ndarray,
    ):
        super().__init__(corpus, length, packing, end_of_text)
        self._token_bytes = token_bytes
        if len(self) < 1:
            raise DataError(f"{corpus.name}: {len(corpus.tokens)} token is too little to evaluate on: give more text")

    def __len__(self) -> int:
        return -(-(len(self.corpus.tokens) - 1) // self.length)

    def read(self, indices: np.ndarray) -> Batch:
        start_B = np.asarray(indices, np.int64) * self.length
        last = len(self.corpus.tokens) - 1
        index_BxT1 = start_B[:, None] + np.arange(self.length + 1)
        real_BxT = index_BxT1[:, 1:] <= last
        tokens_BxT1 = self.corpus.tokens[np.minimum(index_BxT1, last)].astype(np.int32)
        document_BxT1 = documents_at(self.corpus.offsets, start_B, self.length + 1)
        first_BxT = document_BxT1[:, 1:] != document_BxT1[:, :-1]
        segment_ids_BxT, positions_BxT = segments(self.packing, self.corpus.offsets, start_B, document_BxT1)
        # A stream without separators runs on from one document into the next, so that first tokens have a past.
        scored_BxT = real_BxT & ~first_BxT if self._separated or self.packing == "documents" else real_BxT
        targets_BxT = tokens_BxT1[:, 1:] * real_BxT
        return {
            "tokens": tokens_BxT1[:, :-1] * real_BxT,
            "targets": targets_BxT,
            "weights": scored_BxT.astype(np.float32),
            "segment_ids": segment_ids_BxT * real_BxT,
            "positions": positions_BxT * real_BxT,
            "bytes": self._token_bytes[targets_BxT] * scored_BxT,
            "document": (document_BxT1[:, 1:] * real_BxT).astype(np.int32),
        }


def documents_at(offsets: np.ndarray, start_B: np.ndarray, length: int) -> np.ndarray:
    """int64 (B, length): the document of each token in windows of a stream; beyond its end, the last one."""
    documents = len(offsets) - 1
    first_B = np.searchsorted(offsets, start_B, side="right")  # documents that begin after the window does
    behind_B = np.minimum(np.searchsorted(offsets, start_B + length, side="left"), documents)
    count_B = np.maximum(behind_B - first_B, 0)
    row = np.repeat(np.arange(len(start_B)), count_B)
    within = np.arange(len(row)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    begins_BxL = np.zeros((len(start_B), length), np.int64)
    begins_BxL[row, offsets[first_B[row] + within] - start_B[row]] = 1
    return (first_B - 1)[:, None] + np.cumsum(begins_BxL, axis=1)


def segments(
    packing: str, offsets: np.ndarray, start_B: np.ndarray, document_BxT1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """segment_ids (from 1) and positions (from 0) of the inputs of windows that begin at start_B, int32 (B, T)."""
    document_BxT = document_BxT1[:, :-1]
    index_BxT = start_B[:, None] + np.arange(document_BxT.shape[1])
    if packing == "stream":
        document_BxT = np.zeros_like(document_BxT)  # as if all were one
    segment_ids_BxT = document_BxT - document_BxT[:, :1] + 1
    positions_BxT = index_BxT - np.maximum(offsets[document_BxT], start_B[:, None])
    return segment_ids_BxT.astype(np.int32), positions_BxT.astype(np.int32)
