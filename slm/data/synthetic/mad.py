"""The six tasks of MAD, mechanistic architecture design (Poli et al. 2024, arXiv:2403.17844; github.com/athms/mad-lab).

Settings are the benchmark's baselines (configs/tasks/*.yml): 12,800 training samples (memorisation: 256), which every
epoch sees again, and 1,280 tests. The benchmark trains for 200 epochs in batches of 128 and takes the best of learning
rates 1e-4, 5e-4, 1e-3 and weight decays 0, 0.1; a task's score is the mean over its baseline and these changes of one
setting at a time: `vocab` 32, 64, 128 (noisy recall 48, 80, 144; memorisation 512 ... 8192), `length` 256, 512, 1024
(compression 64, 128, 256; selective copying 512, 1024), `samples` 6400, 3200, 1600, 800, `noise` 0.4, 0.6, 0.8,
`copies` 32, 64, 96. Reduced: fewer `samples`.

In the benchmark accuracies are means over the target's classes; here, over targets.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from slm.data.synthetic.draws import Draws, Side
from slm.data.synthetic.task import Samples, Task, numbers


@dataclass(frozen=True, kw_only=True)
class MADTask(Task):
    """What the tasks share."""

    samples: int = 12_800
    tests: int = 1280
    length: int = 128
    vocab: int = 16
    """Ids in all."""

    @property
    def words(self) -> tuple[str, ...]:
        return numbers(self.vocab)


@dataclass(frozen=True, kw_only=True)
class InContextRecall(MADTask):
    """`k1 v1 k2 v2 k1 v1 ...`: a key seen before predicts its value (`in-context-recall`, multi_query).

    Keys are drawn alike from the first half of the ids, each sample's value of a key from the second half. Training
    scores every next token, as published; validation the values of keys seen before. `length` tokens are made, of
    which the last is a target only.
    """

    loss: Literal["all", "answers"] = "all"
    """What is scored in training: every next token, or the answers. In validation it is always the answers."""
    noise: float = 0.0
    """Probability that two tokens from `noise_vocab` ids of their own stand instead of a pair."""
    noise_vocab: int = 0
    """Ids, the last of `vocab`, that noise is made of."""

    def check(self) -> str | None:
        if self.length < 4 or self.length % 2:
            return f"length = {self.length}: must be even, and at least 4"
        if not 0 <= self.noise < 1:
            return f"noise = {self.noise}: must be at least 0 and below 1"
        if self.noise and self.noise_vocab < 1:
            return f"noise = {self.noise} needs noise_vocab above 0"
        if self.noise_vocab < 0 or self.vocab - self.noise_vocab < 2:
            return f"noise_vocab = {self.noise_vocab}: must leave at least 2 of vocab = {self.vocab}"
        return None

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        count, pairs, meaningful = draws.count, self.length // 2, self.vocab - self.noise_vocab
        half = meaningful // 2
        value_of = half + draws.integers(meaningful - half, half)
        keys = draws.integers(half, pairs)
        noisy = draws.uniform(pairs) < self.noise
        np.put_along_axis(noisy, draws.integers(pairs - 1, 1), False, axis=1)  # there is a pair to ask about
        # The last pair asks for a key that was presented, each alike.
        noisy[:, -1] = True
        presented = np.zeros((count, half), bool)
        row, pair = np.nonzero(~noisy)
        presented[row, keys[row, pair]] = True
        noisy[:, -1] = False
        keys[:, -1] = np.argmax(np.where(presented, draws.uniform(half), 0), axis=1)

        ids = np.stack([keys, np.take_along_axis(value_of, keys, axis=1)], axis=2)
        if self.noise:
            ids = np.where(noisy[:, :, None], meaningful + draws.integers(self.noise_vocab, pairs, 2), ids)
        # A pair is asked about if the same key came before: each key's first pair is not.
        asked = ~noisy
        first = np.argmax((keys[:, :, None] == np.arange(half)) & ~noisy[:, :, None], axis=1)
        row, key = np.nonzero(presented)
        asked[row, first[row, key]] = False
        answers = np.stack([np.zeros_like(asked), asked], axis=2).reshape(count, -1)
        return _shifted(ids.reshape(count, -1), answers, self.loss, side)


@dataclass(frozen=True, kw_only=True)
class NoisyInContextRecall(InContextRecall):
    """In-context recall, every fifth pair replaced by noise of 16 ids of its own (`noisy-in-context-recall`)."""

    vocab: int = 32
    noise: float = 0.2
    noise_vocab: int = 16


@dataclass(frozen=True, kw_only=True)
class FuzzyInContextRecall(MADTask):
    """In-context recall with keys and values of 1 to 3 tokens (`fuzzy-in-context-recall`, multi_query).

    The last id pads samples at the start, as a visible token. A key or value is a run of different ids. Training scores
    every next token; in validation all keys have `motif` tokens and the values of keys seen before are scored. As
    published, the pair that is asked at the end is now and then missing from what precedes it.
    """

    loss: Literal["all", "answers"] = "all"
    """As in in-context recall."""
    motif: int = 3
    """Most tokens of a key and of a value."""

    def check(self) -> str | None:
        if self.motif < 1 or self.length < 8 * self.motif:
            return f"motif = {self.motif}: must be between 1 and an eighth of length = {self.length}"
        least = 2 * self.motif + 1
        return None if self.vocab >= least else f"vocab = {self.vocab}: must be at least {least} for motif {self.motif}"

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        # No sample has more pairs. The first is the one that is asked for at the end.
        units, half = self.length // 2, (self.vocab - 1) // 2
        key_size = np.full((draws.count, units), self.motif)
        if side == "train":
            key_size = 1 + draws.integers(self.motif, units)
        value_size = 1 + draws.integers(self.motif, units)
        keys = draws.arrange(half, self.motif, units).tolist()
        values = (half + draws.arrange(self.vocab - 1 - half, self.motif, units)).tolist()
        places = draws.integers(self.length - 2 * (key_size + value_size)[:, 0]).tolist()

        ids = np.full((draws.count, self.length + 1), self.vocab - 1, np.int64)
        answers = np.zeros(ids.shape, bool)
        for row in range(draws.count):
            told = [tuple(key[:size]) for key, size in zip(keys[row], key_size[row].tolist())]
            meant = [tuple(value[:size]) for value, size in zip(values[row], value_size[row].tolist())]
            sample, scored = self._sample(told, meant, places[row])
            ids[row, -len(sample) :] = sample
            answers[row, -len(sample) :] = scored
        return _shifted(ids, answers, self.loss, side)

    def _sample(self, keys: list[tuple], values: list[tuple], place: int) -> tuple[list[int], list[bool]]:
        """Pairs one after another, of which the first is held back until `place` or until its key is drawn again."""
        asked, answer = keys[0], values[0]
        value_of = {asked: answer}
        ids: list[int] = []
        answers: list[bool] = []
        seen: set[tuple] = set()
        size = len(asked) + len(answer)
        fresh = iter(zip(keys[1:], values[1:]))
        while len(ids) < self.length - size - 2 * self.motif:
            key, value = (asked, answer) if len(ids) >= place and asked not in seen else next(fresh)
            value = value_of.setdefault(key, value)
            ids += key + value
            answers += [False] * len(key) + [key in seen] * len(value)
            seen.add(key)
        return [*ids, *asked, *answer], [*answers, *[False] * len(asked), *[True] * len(answer)]


@dataclass(frozen=True, kw_only=True)
class Memorisation(MADTask):
    """`k1 ? k2 ? ...`: the value of each key is asked for and never shown (`memorization`).

    One fixed map from keys to values, the same in training and validation, is to be learned: keys are the first half of
    the ids below vocab - 1, which asks; each has a value of its own from the second half.
    """

    samples: int = 256
    length: int = 32
    vocab: int = 256
    map_seed: int = 12345
    """Seed of the map."""

    def check(self) -> str | None:
        if self.length < 2 or self.length % 2:
            return f"length = {self.length}: must be even, and at least 2"
        return None if self.vocab >= 3 else f"vocab = {self.vocab}: must be at least 3"

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        half = (self.vocab - 1) // 2
        value_of = half + np.random.default_rng(self.map_seed).permutation(self.vocab - 1 - half)[:half]
        keys = draws.integers(half, self.length // 2)
        tokens = np.full((draws.count, self.length), self.vocab - 1, np.int64)
        tokens[:, 0::2] = keys
        targets = np.zeros_like(tokens)
        targets[:, 1::2] = value_of[keys]
        return Samples(tokens, targets, np.broadcast_to(np.arange(self.length) % 2 == 1, tokens.shape))


@dataclass(frozen=True, kw_only=True)
class Compression(MADTask):
    """`x1 x2 ... xn c c ... c`: what precedes the first c is to be said at the c's, in order (after `compression`).

    Adapted: in the benchmark (n = 31) an autoencoder's decoder says it, from the hidden state at the only c. A language
    model has no such decoder, so here it answers step by step: for a recurrence the demand on its state is the same,
    but attention may look back at the x and need compress nothing. Vocab - 1 is c.
    """

    length: int = 32
    """n + 1; a sample has 2n tokens."""

    @property
    def shortest(self) -> int:
        return 2 * (self.length - 1)

    def check(self) -> str | None:
        if self.length < 2:
            return f"length = {self.length}: must be at least 2"
        return None if self.vocab >= 2 else f"vocab = {self.vocab}: must be at least 2"

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        data = draws.integers(self.vocab - 1, self.length - 1)
        tokens = np.concatenate([data, np.full_like(data, self.vocab - 1)], axis=1)
        targets = np.concatenate([np.zeros_like(data), data], axis=1)
        return Samples(tokens, targets, np.broadcast_to(np.arange(tokens.shape[1]) >= data.shape[1], tokens.shape))


@dataclass(frozen=True, kw_only=True)
class MADSelectiveCopying(MADTask):
    """`. 5 . . 3 7 | . . .`: after the bar, the data are to be said at the blanks, in order (`selective-copying`).

    Id vocab - 1 is the bar and vocab - 2 blank. As published, each blank stands in a gap before one of the data, drawn
    alike, so that the last of them is next to the bar.
    """

    length: int = 256
    copies: int = 16
    """Tokens to copy."""

    def check(self) -> str | None:
        if self.copies < 1 or self.length < 2 * self.copies + 1:
            return f"copies = {self.copies}: must be at least 1, and fit twice into length - 1 = {self.length - 1}"
        return None if self.vocab >= 3 else f"vocab = {self.vocab}: must be at least 3"

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        blanks = self.length - 2 * self.copies - 1
        data = draws.integers(self.vocab - 2, self.copies)
        gap = draws.integers(self.copies, blanks)
        before = (gap[:, :, None] <= np.arange(self.copies)).sum(axis=1)  # blanks before each
        tokens = np.full((draws.count, self.length), self.vocab - 2, np.int64)
        np.put_along_axis(tokens, before + np.arange(self.copies), data, axis=1)
        tokens[:, blanks + self.copies] = self.vocab - 1
        targets = np.zeros_like(tokens)
        targets[:, -self.copies :] = data
        scored = np.broadcast_to(np.arange(self.length) >= self.length - self.copies, tokens.shape)
        return Samples(tokens, targets, scored)


def _shifted(ids: np.ndarray, answers: np.ndarray, loss: str, side: Side) -> Samples:
    """A sequence (B, L + 1) whose every token is the target of the one before."""
    everything = loss == "all" and side == "train"
    return Samples(ids[:, :-1], ids[:, 1:], answers[:, 1:] | everything)
