"""Random numbers of many samples at once, each sample's a pure function of (seed, stream, side, index)."""

import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

Side = Literal["train", "validation"]

_LOW = np.uint64(2**32 - 1)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3), on arrays.

    Four counters and two keys of 32 bits, held in uint64; returns four independent arrays of 32 random bits. NumPy has
    this family, but one generator a sample would cost more than the samples.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), p1 & _LOW
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


class Draws:
    """What the samples `indices` draw, in the order of the calls; arrays have the samples as their first axis.

    seed: the run's. stream: names what is drawn, so that different tasks share nothing. side: of the split.
    """

    def __init__(self, seed: int, stream: str, side: Side, indices: np.ndarray):
        self.indices = np.asarray(indices, np.int64)
        self._seed = seed % 2**64
        self._stream = zlib.crc32(stream.encode())
        self._side = int(side == "validation")
        self._block = 0

    @property
    def count(self) -> int:
        """Samples."""
        return len(self.indices)

    def words(self, *shape: int) -> np.ndarray:
        """uint64 (count, *shape) of 32 random bits."""
        size = int(np.prod(shape, dtype=np.int64))
        blocks = -(-size // 4)
        index = self.indices.astype(np.uint64)[:, None]
        block = np.arange(self._block, self._block + blocks, dtype=np.uint64)[None]
        self._block += blocks
        grid = np.zeros((self.count, blocks), np.uint64)
        stream = np.uint64(self._stream)
        side = (index >> np.uint64(32)) * np.uint64(2) + np.uint64(self._side)
        random = philox((grid + block, grid + stream, grid + (index & _LOW), grid + side), divmod(self._seed, 2**32))
        return np.stack(random, axis=-1).reshape(self.count, -1)[:, :size].reshape(self.count, *shape)

    def integers(self, high: int | np.ndarray, *shape: int) -> np.ndarray:
        """int64 (count, *shape), uniform over [0, high); the bias is at most high / 2^32."""
        return ((self.words(*shape) * np.asarray(high).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 (count, *shape) in (0, 1)."""
        return (self.words(*shape) + 0.5) / 2**32

    def choose(self, options: int, take: int) -> np.ndarray:
        """int64 (count, take): distinct numbers below `options`, in random order (Fisher and Yates's shuffle)."""
        deck = np.tile(np.arange(options, dtype=np.int32), (self.count, 1))
        rows = np.arange(self.count)
        places = np.arange(take) + self.integers(options - np.arange(take), take)
        for i in range(take):
            chosen = deck[rows, places[:, i]]
            deck[rows, places[:, i]] = deck[:, i]
            deck[:, i] = chosen
        return deck[:, :take].astype(np.int64)

    def arrange(self, options: int, take: int, *shape: int) -> np.ndarray:
        """int64 (count, *shape, take): the same, in as many independent draws of few numbers as `shape` says."""
        chosen = self.integers(options - np.arange(take), *shape, take)
        for i in range(1, take):
            for earlier in np.moveaxis(np.sort(chosen[..., :i], axis=-1), -1, 0):
                chosen[..., i] += chosen[..., i] >= earlier  # steps over those that are taken
        return chosen

    def choose_weighted(self, weights: np.ndarray, take: int) -> np.ndarray:
        """int64 (count, take): distinct numbers, drawn one after another with probabilities proportional to `weights`
        of those that are left. The first arrivals of exponential clocks of these rates (Efraimidis & Spirakis 2006)."""
        arrivals = -np.log(self.uniform(len(weights))) / weights
        return np.argsort(arrivals, axis=1)[:, :take]

    def generators(self) -> Iterator[np.random.Generator]:
        """One NumPy generator a sample, for tasks that are drawn one sample at a time."""
        # A counter-based generator: sample i starts in a block of its own, so it needs none of the samples before it.
        key = np.array([self._seed, 2 * self._stream + self._side], np.uint64)
        for index in self.indices:
            yield np.random.Generator(np.random.Philox(key=key, counter=[0, 0, int(index), 0]))
