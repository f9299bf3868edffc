"""Student's t in float64, without scipy: its distribution, quantiles, and the power of the t test."""

import functools
import math

import numpy as np

from slm.errors import ConfigError


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b) for x in [0, 1], a, b > 0.

    The continued fraction DLMF 8.17.22, by Lentz's method (Press et al., Numerical Recipes, 6.4).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction converges slowly, and its mirror fast
        return 1 - incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + numerator * d) or tiny)
            c = (1 + numerator / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a


def two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) of Student's t with `df` degrees of freedom, which need not be whole."""
    if math.isnan(t) or math.isnan(df):
        return math.nan
    return incomplete_beta(df / (df + t * t), df / 2, 0.5) if math.isfinite(t) else 0.0


@functools.lru_cache(1024)
def critical(level: float, df: float) -> float:
    """The t with P(|T| >= t) = level: 2.776 for 5 % and 4 degrees of freedom. NaN for df = NaN."""
    if not 0 < level < 1:
        raise ConfigError(f"level = {level}: must be in (0, 1)")
    if math.isnan(df):
        return math.nan
    low, high = 0.0, 1.0
    while two_sided(high, df) > level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, df) > level else (low, middle)
    return (low + high) / 2


def t_power(effect: float, df: float, level: float) -> float:
    """P(|T'| > critical(level, df)) where T' is noncentral t with `df` and noncentrality `effect` (a mean over its
    standard error): how often the two-sided t test at `level` finds it.

    Integrates the normal distribution over that of the sample's standard deviation, s = sqrt(chi^2 / df).
    """
    t = critical(level, df)
    # log density of s: 2 (df/2)^(df/2) / Gamma(df/2) s^(df-1) exp(-df s^2 / 2)
    s = np.linspace(1e-9, 1 + 12 / math.sqrt(df), 4_001)
    log_density = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + (df - 1) * np.log(s) - df * s * s / 2
    within = _normal(t * s - effect) - _normal(-t * s - effect)
    return float(1 - np.trapezoid(np.exp(log_density) * within, s))


def _normal(z: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-one / math.sqrt(2)) for one in z])
