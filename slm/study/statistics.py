"""Is one variant better than another? Differences over shared seeds and shared texts, with intervals and p values.

d = paired_difference(base, arm)          # bits per byte by seed, or by seed and text
d.mean, (d.low, d.high), d.p, d.detectable()
verdict(d)                     # better, worse, tie
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slm.errors import ConfigError
from slm.study.student import critical, t_power, two_sided

Verdict = Literal["better", "worse", "tie", "unknown"]


@dataclass(frozen=True)
class Difference:
    """A mean, or a difference of means, and how well it is known. NaN where one value alone says nothing of that."""

    mean: float
    """Of a difference: second less first."""
    low: float
    high: float
    """The t interval, which covers the true mean in 1 - level of all studies."""
    bootstrap: tuple[float, float]
    """Percentile bootstrap of the same coverage; from fewer than about ten seeds it is too narrow (by the root of
    (n - 1) / n at least), and the t interval is the one to trust."""
    p: float
    """Two-sided, of a true mean of 0."""
    standard_error: float
    df: float
    """Degrees of freedom."""
    n: int
    """Seeds; of `welch` those of the second."""
    level: float

    @property
    def half_width(self) -> float:
        """Of the t interval."""
        return (self.high - self.low) / 2

    def detectable(self, power: float = 0.8, comparisons: int = 1) -> float:
        """The true difference that a study like this one finds with probability `power` at its level, divided by the
        number of comparisons."""
        if math.isnan(self.df):
            return math.nan
        return detectable_effect(self.df, self.level / comparisons, power) * self.standard_error

    def __str__(self) -> str:
        return (
            f"{self.mean:+.4g}, {1 - self.level:.0%} from {self.low:+.4g} to {self.high:+.4g} "
            f"(bootstrap {self.bootstrap[0]:+.4g} to {self.bootstrap[1]:+.4g}), p = {self.p:.3g}, n = {self.n}"
        )


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    over: Literal["all", "seeds", "texts"] = "all",
    level: float = 0.05,
    seed: int = 0,
    resamplings: int = 10_000,
) -> Difference:
    """Mean of second - first over what both share: the paired t test, and the bootstrap of the same differences.

    Args:
      first, second: (S,), or (S, E): a score for each seed, or for each seed and text (evaluation batch, document), in
        the same order.
      weights: (E,): of the texts, such as their bytes, where scores are per byte; None: equal.
      over: what else could have been drawn. `seeds`: the texts are the ones that count, others are not of interest;
        `texts`: so are the seeds; `all`: both by chance, so that the result holds for other seeds and other texts. Then
        their variances add up, with Welch's and Satterthwaite's degrees of freedom, which is the min F' test of Clark
        1973 (The language-as-fixed-effect fallacy): somewhat conservative where the two interact.
      level: of the intervals, which cover 1 - level.
      seed, resamplings: of the bootstrap (slm.evaluation.bootstrap); 0: none, its interval is NaN.

    Raises:
      ConfigError: shapes differ, no values, or values that are not finite.
    """
    first, second = (_values(name, x) for name, x in (("first", first), ("second", second)))
    if first.shape != second.shape:
        raise ConfigError(
            f"paired_difference: {first.shape} and {second.shape} values: give the same seeds and texts to both"
        )
    return mean_of(second - first, weights, over=over, level=level, seed=seed, resamplings=resamplings)


def mean_of(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    over: Literal["all", "seeds", "texts"] = "all",
    level: float = 0.05,
    seed: int = 0,
    resamplings: int = 10_000,
) -> Difference:
    """Mean of values by seed, or by seed and text, with its intervals; arguments and errors as of paired_difference."""
    from slm.evaluation.bootstrap import bootstrap_interval

    values = _values("values", values)
    values = values[:, None] if values.ndim == 1 else values
    S, E = values.shape
    w = np.ones(E) if weights is None else np.asarray(weights, np.float64)
    if w.shape != (E,) or not (w > 0).all():
        raise ConfigError(f"weights: give {E} positive numbers, one for each text")
    if over not in ("all", "seeds", "texts"):
        raise ConfigError(f"over = {over!r}: must be all, seeds or texts")
    if not 0 < level < 1:
        raise ConfigError(f"level = {level}: must be in (0, 1)")
    w = w / w.mean()
    sums = values * w
    by_seed, by_text = sums.mean(1), sums.mean(0)
    mean = float(by_seed.mean())
    variances, freedom = [], []
    if over != "texts" and S > 1:
        variances.append(by_seed.var(ddof=1) / S)
        freedom.append(S - 1)
    if over != "seeds" and E > 1:
        # Of a ratio of sums, linearised; the mean of these residuals is 0.
        variances.append(((by_text - mean * w) ** 2).sum() / (E * (E - 1)))
        freedom.append(E - 1)
    if over == "seeds":
        sums, w = by_seed[:, None], np.ones(1)
    elif over == "texts":
        sums = by_text[None]
    bootstrap = math.nan, math.nan
    if variances and resamplings:
        bootstrap = bootstrap_interval(sums, w, seed=seed, confidence=1 - level, resamplings=resamplings)
    return _tested(mean, variances, freedom, bootstrap, S, level)


def welch(
    first: np.ndarray, second: np.ndarray, *, level: float = 0.05, seed: int = 0, resamplings: int = 10_000
) -> Difference:
    """Mean of second less that of first, (n,) and (m,) values that share no seeds, of variances that may differ (Welch
    1947). `paired_difference` finds smaller differences wherever seeds are shared.

    Raises:
      ConfigError: as `paired_difference`.
    """
    first, second = (_values(name, x).reshape(-1) for name, x in (("first", first), ("second", second)))
    mean = float(second.mean() - first.mean())
    if min(len(first), len(second)) < 2:
        return _tested(mean, [], [], (math.nan, math.nan), len(second), level)
    from slm.evaluation.bootstrap import bootstrap_difference

    variances = [x.var(ddof=1) / len(x) for x in (first, second)]
    bootstrap = math.nan, math.nan
    if resamplings:
        bootstrap = bootstrap_difference(first, second, seed=seed, confidence=1 - level, resamplings=resamplings)
    return _tested(mean, variances, [len(first) - 1, len(second) - 1], bootstrap, len(second), level)


def _tested(mean, variances, freedom, bootstrap, n, level) -> Difference:
    """From the variances of independent parts of the mean, and the degrees of freedom that each is known with."""
    if not variances:
        return Difference(mean, math.nan, math.nan, bootstrap, math.nan, math.nan, math.nan, n, level)
    total = float(sum(variances))
    error = math.sqrt(total)
    # By shares, so that one part alone gives its own degrees of freedom exactly.
    df = 1 / sum((v / total) ** 2 / f for v, f in zip(variances, freedom)) if total > 0 else min(freedom)
    if error == 0:  # runs that do not depend on the seed
        p = float(mean == 0)
    else:
        p = two_sided(mean / error, df)
    half = critical(level, df) * error
    return Difference(mean, mean - half, mean + half, bootstrap, p, error, float(df), n, level)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): rejecting those below a level rejects a true hypothesis in at
    most that share of all studies, however the tests depend on each other. NaN stays NaN and does not count."""
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def verdict(difference: Difference, *, p: float | None = None, lower_is_better: bool = True) -> Verdict:
    """What the second is, compared with the first: `better` or `worse` if p <= the difference's level, else a `tie`,
    that is, not told apart (`detectable` says what would have been); `unknown` with nothing to judge by.

    Args:
      p: corrected, where there are several arms (`holm`); None: the difference's own.
    """
    p = difference.p if p is None else p
    if math.isnan(p):
        return "unknown"
    if p > difference.level or difference.mean == 0:
        return "tie"
    return "better" if (difference.mean < 0) == lower_is_better else "worse"


@functools.lru_cache(256)
def detectable_effect(df: float, level: float = 0.05, power: float = 0.8) -> float:
    """The true mean, in standard errors, that a two-sided t test finds with probability `power`: 3.76 for 4 degrees of
    freedom at 5 % and 80 %. Exact, by the noncentral t distribution (Cohen 1988, 2.5; not t_a + t_b)."""
    if not level < power < 1:
        raise ConfigError(f"power = {power}: must be between the level {level} and 1")
    low, high = 0.0, 1.0
    while t_power(high, df, level) < power:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if t_power(middle, df, level) < power else (low, middle)
    return high


def minimum_detectable(
    standard_deviation: float, n: int, *, level: float = 0.05, power: float = 0.8, comparisons: int = 1
) -> float:
    """The true difference that `n` paired seeds find with probability `power`, in units of the standard deviation.

    Args:
      standard_deviation: of the paired differences, as of a pilot study.
      comparisons: arms beside the base; the level is divided by them, which is the worst case of `holm`.
    """
    if n < 2:
        raise ConfigError(f"n = {n}: at least 2 seeds are needed to know what chance does")
    return detectable_effect(n - 1, level / comparisons, power) * standard_deviation / math.sqrt(n)


def seeds_needed(
    standard_deviation: float, difference: float, *, level: float = 0.05, power: float = 0.8, comparisons: int = 1
) -> int:
    """The fewest paired seeds whose `minimum_detectable` is at most `difference` (above 0); at most 10,000."""
    options = {"level": level, "power": power, "comparisons": comparisons}
    low, high = 1, 10_000
    if not difference > 0 or minimum_detectable(standard_deviation, high, **options) > difference:
        raise ConfigError(f"difference = {difference}: not found by {high:,} seeds either")
    while high - low > 1:
        middle = (low + high) // 2
        enough = minimum_detectable(standard_deviation, middle, **options) <= difference
        low, high = (low, middle) if enough else (middle, high)
    return high


def _values(name: str, x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim not in (1, 2) or not x.size:
        raise ConfigError(f"{name}: give numbers by seed, or by seed and text, not an array of shape {x.shape}")
    if not np.isfinite(x).all():
        raise ConfigError(f"{name}: {int((~np.isfinite(x)).sum())} of {x.size} values are not finite; leave them out")
    return x
