"""Induction heads and selective copying, with the settings of H3 and Mamba."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from slm.data.synthetic.draws import Draws, Side
from slm.data.synthetic.task import Samples, Task, numbers


@dataclass(frozen=True, kw_only=True)
class InductionHeads(Task):
    """`... ? a ... ?` asks for what followed the marker before (Olsson et al. 2022, in the form of Fu et al. 2023, H3).

    Ids below vocab - 1 are drawn alike, vocab - 1 is the marker. Nothing follows the second marker.

    Published: length 256, vocab 16, tests of length 64 to 2^20, data without end in batches of 8 (Gu & Dao 2023, Mamba,
    appendix E.1, without code; the default). H3: `vocab=20,length=31,samples=5000,tests=500,loss=all` (30 tokens before
    the second marker; of its 20 ids one more is special and unused, github.com/HazyResearch/safari).
    Reduced: `length=64`.
    """

    length: int = 256
    vocab: int = 16
    """Ids, the marker among them."""
    loss: Literal["answers", "all"] = "answers"
    """What is scored in training: the answer, or every next token. In validation it is always the answer."""

    @property
    def words(self) -> tuple[str, ...]:
        return numbers(self.vocab)

    def check(self) -> str | None:
        if self.length < 4:
            return f"length = {self.length}: must be at least 4"
        return None if self.vocab >= 3 else f"vocab = {self.vocab}: must be at least 3"

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        marker = self.vocab - 1
        tokens = draws.integers(marker, self.length)
        place = draws.integers(self.length - 3, 1)
        np.put_along_axis(tokens, place, marker, axis=1)
        tokens[:, -1] = marker
        answer = np.take_along_axis(tokens, place + 1, axis=1)
        targets = np.concatenate([tokens[:, 1:], answer], axis=1)
        scored = np.full(tokens.shape, self.loss == "all" and side == "train")
        scored[:, -1] = True
        return Samples(tokens, targets, scored)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Copy the tokens that stand among blanks, in order (Gu & Dao 2023, Mamba, section 4.1.1; variable copying of
    github.com/state-spaces/s4, src/dataloaders/datasets/copying.py).

    `. . 5 . 3 . . 7 | | |` asks for 5, 3, 7, one at each closing marker. Id 0 is blank, vocab - 1 the marker, the rest
    are data. The data's places are drawn alike, their number is not to be found out: the markers count it.

    Published: length 4096, vocab 16, copies 16, data without end in batches of 64 (Mamba, appendix E.1). Reduced:
    `length=256`. MAD's version, with other gaps, is `mad_selective_copying`.
    """

    length: int = 4096
    """Input tokens, the closing markers included."""
    vocab: int = 16
    """Ids, blank and marker among them."""
    copies: int = 16
    """Tokens to copy."""

    @property
    def words(self) -> tuple[str, ...]:
        return numbers(self.vocab)

    def check(self) -> str | None:
        if self.copies < 1 or self.length < 2 * self.copies:
            return f"copies = {self.copies}: must be between 1 and half of length = {self.length}"
        return None if self.vocab >= 3 else f"vocab = {self.vocab}: must be at least 3"

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        context = self.length - self.copies
        data = 1 + draws.integers(self.vocab - 2, self.copies)
        tokens = np.zeros((draws.count, self.length), np.int64)
        np.put_along_axis(tokens, np.sort(draws.choose(context, self.copies), axis=1), data, axis=1)
        tokens[:, context:] = self.vocab - 1
        targets = np.zeros_like(tokens)
        targets[:, context:] = data
        return Samples(tokens, targets, targets > 0)
