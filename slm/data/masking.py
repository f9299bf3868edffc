"""Masked language modelling (Devlin et al. 2019, section 3.1): which tokens are hidden, and behind what."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slm.data.packing import Batch
from slm.data.tokenizers import Tokenizer
from slm.errors import ConfigError

AS_MASK, AS_RANDOM = 0.8, 0.1
"""Shares of hidden tokens that become the mask token, and any token; the others stay, and are asked for too."""


@dataclass(frozen=True)
class Masking:
    """Makes batches for model.head = masked_lm out of those for the next token.

    The model reads what used to be the targets, with some of them hidden, and is asked for those. So weights, bytes and
    documents of targets hold as they are: what was not scored before is neither hidden nor asked for.
    """

    fraction: float
    """Share of tokens that is hidden."""
    mask: int
    """Id of the mask token."""
    vocabulary: int
    """Ids below this one are drawn at random."""
    end_of_text: int | None
    """Id that is never hidden."""
    seed: int

    @classmethod
    def create(cls, fraction: float, tokenizer: Tokenizer, vocab_size: int, seed: int) -> "Masking":
        """With the tokenizer's mask token, or the id after its last. Raises ConfigError if vocab_size ends there."""
        mask = tokenizer.vocab_size if tokenizer.mask is None else tokenizer.mask
        if mask >= vocab_size:
            raise ConfigError(
                f"model.vocab_size = {vocab_size}: this tokenizer has no [MASK], which takes the id after its own "
                f"{tokenizer.vocab_size}: set {mask + 1}, or 0"
            )
        return cls(fraction, mask, tokenizer.vocab_size, tokenizer.end_of_text, seed)

    def train(self, batch: Batch, step: int, first: int) -> Batch:
        """Rows `first`, `first` + 1, ... of batch `step`: a function of (seed, step, row), however rows are shared."""
        return self._hidden(batch, [[self.seed, step, first + row] for row in range(len(batch["targets"]))])

    def validation(self, batch: Batch) -> Batch:
        """The same tokens of a row are hidden whenever it is evaluated, whatever stands beside it."""
        return self._hidden(batch, [[self.seed, *np.frombuffer(row.tobytes(), np.uint32)] for row in batch["targets"]])

    def _hidden(self, batch: Batch, keys: Sequence[Sequence[int]]) -> Batch:
        targets = batch["targets"]
        generators = [np.random.default_rng(key) for key in keys]
        T = targets.shape[1]
        whether, how = np.stack([one.random((2, T)) for one in generators], 1)
        anything = np.stack([one.integers(0, self.vocabulary, T, np.int32) for one in generators])
        hidden = (whether < self.fraction) & (batch["weights"] > 0)
        if self.end_of_text is not None:
            hidden &= targets != self.end_of_text
        tokens = np.where(hidden & (how < AS_MASK), np.int32(self.mask), targets)
        tokens = np.where(hidden & (how >= AS_MASK) & (how < AS_MASK + AS_RANDOM), anything, tokens)
        return batch | {"tokens": tokens, "weights": batch["weights"] * hidden}
