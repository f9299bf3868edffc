"""A batch in the tokens of another tokenizer, for a teacher that has one (distill.loss = uld).

Both read the same text. Their next tokens may be compared where both have read the same bytes of it: where a token of
the one and a token of the other end together. The paper (Boizard et al. 2024) takes the n-th token of both instead,
which soon are of different places.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

TRANSLATED = ("teacher_tokens", "teacher_segment_ids", "teacher_at")
"""Entries of a batch: (B, T, K) ids of the teacher, of which a row has T K one after the other, and the segments that
they are in, 0 for padding; (B, T) index in that row of the token that ends with the student's, -1 where none does."""
BROKEN = "\N{REPLACEMENT CHARACTER}"


class Piece(NamedTuple):
    """Text within one row that no end-of-text token interrupts."""

    row: int
    first: int
    """Its first token in the row, which may be the end-of-text token that begins a document."""
    last: int
    """Behind its last token."""
    begins: bool
    """Whether it begins with that token."""


class Translator(NamedTuple):
    """From the student's tokens to the teacher's."""

    student: Any
    teacher: Any
    """slm.data.tokenizers.Tokenizer, both."""
    prefix: Sequence[int]
    """Ids with which a document begins for the teacher; perhaps none."""
    spread: int
    """K: the teacher's tokens of a row are cut off behind T K."""

    def entries(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`TRANSLATED` of a batch with `tokens` and `segment_ids` (B, T)."""
        tokens, segments = batch["tokens"], batch["segment_ids"]
        B, T = tokens.shape
        found = {
            "teacher_tokens": np.zeros((B, T * self.spread), np.int32),
            "teacher_at": np.full((B, T), -1, np.int32),
        }
        found["teacher_segment_ids"] = np.zeros_like(found["teacher_tokens"])
        used = np.zeros(B, np.int64)
        pieces = self._pieces(tokens, segments)
        read = [_text(self.student, tokens[one.row, one.first : one.last]) for one in pieces]
        for one, (text, ends), ids in zip(
            pieces, read, self.teacher.encode_batch([text for text, _ in read]), strict=True
        ):
            row, begin = one.row, used[one.row]
            prefix = np.array(self.prefix if one.begins else (), np.int32)
            theirs = _ends(self.teacher, ids, len(text.encode()))
            theirs = None if theirs is None else np.concatenate([np.zeros(len(prefix), np.int64), theirs])
            ids = np.concatenate([prefix, ids])[: T * self.spread - begin]
            used[row] += len(ids)
            found["teacher_tokens"][row, begin : used[row]] = ids
            found["teacher_segment_ids"][row, begin : used[row]] = segments[row, one.first]
            if ends is None or theirs is None or not len(theirs):
                continue
            at = np.searchsorted(theirs, ends, side="right") - 1  # the last, where some end together
            same = (at >= 0) & (at < len(ids)) & (theirs[np.maximum(at, 0)] == ends)
            found["teacher_at"][row, one.first : one.last] = np.where(same, begin + at, -1)
        shape = (B, T, self.spread)
        return found | {name: found[name].reshape(shape) for name in ("teacher_tokens", "teacher_segment_ids")}

    def _pieces(self, tokens: np.ndarray, segments: np.ndarray) -> list[Piece]:
        ending = (
            np.zeros(tokens.shape, bool) if self.student.end_of_text is None else tokens == self.student.end_of_text
        )
        starts = ending | (np.diff(segments, axis=1, prepend=-1) != 0)
        found = []
        for row in range(len(tokens)):
            edges = [*np.flatnonzero(starts[row]).tolist(), tokens.shape[1]]
            found += [
                Piece(row, first, last, bool(ending[row, first]))
                for first, last in itertools.pairwise(edges)
                if segments[row, first]
            ]
        return found


def spread_of(student: Any, teacher: Any, prefix: Sequence[int], batch: dict[str, np.ndarray]) -> int:
    """The K for which the teacher's tokens of these rows fit into T K."""
    T = batch["tokens"].shape[1]
    longest = Translator(student, teacher, prefix, 8).entries(batch)["teacher_segment_ids"].reshape(-1, 8 * T) > 0
    return max(1, -(-int(longest.sum(1).max()) // T))


def _text(tokenizer: Any, ids: np.ndarray) -> tuple[str, np.ndarray | None]:
    """(text of the ids, byte of it behind each; -1 for those of a character that the edge of the row cuts in two). None
    where the bytes do not add up: a tokenizer that does not keep its text."""
    first, last = 0, len(ids)
    text = tokenizer.decode(ids)
    while text.startswith(BROKEN) and first < 4:
        first += 1
        text = tokenizer.decode(ids[first:])
    while text.endswith(BROKEN) and last > len(ids) - 4:
        last -= 1
        text = tokenizer.decode(ids[first:last])
    ends = np.cumsum(tokenizer.token_bytes[ids[first:last]], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if total == len(text.encode()) + 1:
        text = " " + text  # which SentencePiece drops from the beginning of what it decodes
    if total != len(text.encode()):
        return text, None
    return text, np.concatenate([np.full(first, -1), ends, np.full(len(ids) - last, -1)])


def _ends(tokenizer: Any, ids: np.ndarray, size: int) -> np.ndarray | None:
    """Byte of a text of `size` bytes behind each of its ids. None where they do not add up."""
    ends = np.cumsum(tokenizer.token_bytes[ids], dtype=np.int64)
    more = (int(ends[-1]) if len(ends) else 0) - size
    return ends - more if more in (0, 1) else None  # 1: a space that SentencePiece puts first
