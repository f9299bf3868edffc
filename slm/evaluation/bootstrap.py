"""Percentile intervals of means, over whatever was drawn: texts, seeds, or both."""

import numpy as np

RESAMPLINGS = 10_000


def bootstrap_interval(
    sums: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamplings: int = RESAMPLINGS,
) -> tuple[float, float]:
    """Interval of sum(sums) / sum(weights) from the percentiles of its resamplings with replacement.

    Rows and columns are resampled independently of each other, so that both count as drawn by chance; of a single row,
    or column, there is only the other to draw (Efron & Tibshirani 1993; for both Owen 2007, "The pigeonhole bootstrap",
    which is conservative).

    Args:
      sums: (S, E): such as seeds by texts, and nats of the one.
      weights: (E,), such as bytes of the texts, the same for all rows; None: ones.
      seed: of the resamplings.
      confidence: in (0, 1).
    """
    S, E = sums.shape
    weights = np.ones(E) if weights is None else weights
    rng = np.random.default_rng(seed)
    # Counts of each column and row in a resampling; sums are then products of matrices.
    columns = rng.multinomial(E, np.full(E, 1 / E), resamplings)
    rows = rng.multinomial(S, np.full(S, 1 / S), resamplings)
    means = ((rows @ sums) * columns).sum(1) / (S * (columns @ weights))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamplings: int = RESAMPLINGS,
) -> tuple[float, float]:
    """As `bootstrap_interval`, of mean(second) - mean(first) of (n,) and (m,) values, each resampled by itself."""
    rng = np.random.default_rng(seed)
    means = [rng.multinomial(len(x), np.full(len(x), 1 / len(x)), resamplings) @ x / len(x) for x in (first, second)]
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means[1] - means[0], [tail, 100 - tail])
    return float(low), float(high)
