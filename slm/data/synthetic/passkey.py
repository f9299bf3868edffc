"""A pass key hidden in real text (Mohtashami & Jaggi 2023, Landmark attention, arXiv:2305.16300)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from slm.data.corpus import Corpus
from slm.data.synthetic.draws import Draws, Side
from slm.data.synthetic.rows import TaskRows
from slm.data.synthetic.task import Samples, Task
from slm.data.tokenizers import Tokenizer
from slm.errors import DataError

TELLS = " The pass key is {key}. Remember it. {key} is the pass key. "
ASKS = " What is the pass key? The pass key is"


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """`... The pass key is 90516. Remember it. 90516 is the pass key. ... What is the pass key? The pass key is 90516`.

    What surrounds it is a run of a text source's tokens from anywhere in it: of training documents in training, of
    held-out ones in validation (of all of it where data.validation names this task). The digits are scored, and nothing
    else. The model reads it through its own tokenizer, so that any model of text can be asked, and the task mixes with
    text.

    Published: needle and question as here, after an instruction, among one repeated sentence; prompts of 1k tokens and
    more. Here the text is real and the instruction is left out, to leave room for text at `length=256`.
    """

    own_vocabulary: ClassVar[bool] = False

    text: str = "cpython"
    """A text source, as in data.source (without a comma in its name)."""
    digits: int = 5
    """Digits of the key."""
    depth: float | None = None
    """Share of the text that precedes the needle; None: any, drawn alike."""

    def check(self) -> str | None:
        if not 1 <= self.digits <= 9:
            return f"digits = {self.digits}: must be between 1 and 9"
        if self.depth is not None and not 0 <= self.depth <= 1:
            return f"depth = {self.depth}: must be between 0 and 1"
        return "text: synthetic tasks have no text" if self.text.startswith("synthetic:") else None


class PasskeyRows(TaskRows):
    """Samples of the task over a corpus; see slm.data.packing.Rows. Raises DataError if they do not fit `length`."""

    task: Passkey

    def __init__(
        self, spec: str, task: Passkey, corpus: Corpus, tokenizer: Tokenizer, seed: int, length: int, side: Side
    ):
        super().__init__(spec, task, tokenizer.token_bytes, seed, length, side)
        self._corpus, self._tokenizer = corpus, tokenizer
        self._question = tokenizer.encode(ASKS)
        # No tokenizer of text has more tokens than bytes.
        least = len(tokenizer.encode(TELLS.format(key=""))) + len(self._question) + 3 * (task.digits + 1) + 1
        if (wanted := task.length or length) < least:
            raise DataError(f"{spec} needs data.sequence_length and its own length of at least {least}, not {wanted}")

    def draw(self, draws: Draws, length: int) -> Samples:
        tokens, targets = np.zeros((2, draws.count, length), np.int64)
        scored = np.zeros((draws.count, length), bool)
        # (B, 3), not one call each: a call spends a block of the stream.
        key, start, depth = draws.uniform(3).T
        if self.task.depth is not None:
            depth = np.full(draws.count, self.task.depth)
        for row in range(draws.count):
            ids, answer = self._sample(key[row], start[row], depth[row], length + 1)
            tokens[row], targets[row] = ids[:-1], ids[1:]
            scored[row, length - len(answer) :] = answer
        return Samples(tokens, targets, scored)

    def _sample(self, key: float, start: float, depth: float, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`size` ids, and which of the last ones are digits to be said."""
        digits = f"{int(key * 10**self.task.digits):0{self.task.digits}d}"
        needle = self._tokenizer.encode(TELLS.format(key=digits))
        answer = self._tokenizer.encode(f" {digits}")
        scored = np.array([self._tokenizer.decode([i]).strip() != "" for i in answer])
        begin = np.array([] if self._tokenizer.end_of_text is None else [self._tokenizer.end_of_text], np.int64)
        text = self._text(start, size - len(begin) - len(needle) - len(self._question) - len(answer))
        cut = round(depth * len(text))
        return np.concatenate([begin, text[:cut], needle, text[cut:], self._question, answer]), scored

    def _text(self, start: float, size: int) -> np.ndarray:
        """`size` tokens of the corpus from the share `start` of it on, as one text, round its end if need be."""
        stream = self._corpus.tokens
        found = np.zeros(0, np.int64)
        wanted = size
        while len(found) < size:
            place = int(start * len(stream)) + np.arange(wanted)
            found = stream[place % len(stream)].astype(np.int64)
            found = found[found != self._tokenizer.end_of_text]
            wanted *= 2
        return found[:size]
