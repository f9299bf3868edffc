"""How much a variant depends on its learning rate: the best one, and how far off it may be."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from slm.errors import ConfigError


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` returns."""

    best: float
    """The learning rate of the lowest loss."""
    loss: float
    """There."""
    low: float
    high: float
    """Between them the loss stays within the tolerance of the lowest: the basin."""
    width: float
    """Of the basin, in factors of ten."""
    open_low: bool
    open_high: bool
    """The basin goes on beyond what was tried, so that `low`, or `high`, and `width` are bounds."""
    at_edge: bool
    """The lowest loss is at the lowest or highest rate that was tried: the best one may lie beyond it."""

    def __str__(self) -> str:
        low, high = ("at most " if self.open_low else "") + f"{self.low:.3g}", f"{self.high:.3g}"
        text = f"best {self.best:.3g} (loss {self.loss:.4f}), basin from {low} to "
        text += ("at least " if self.open_high else "") + f"{high}, {self.width:.2f} decades"
        return text + ("; the best is at the edge: try more" if self.at_edge else "")


def sensitivity(pairs: Iterable[tuple[float, float]], tolerance: float = 0.02) -> Sensitivity:
    """The best learning rate and the width of its basin, for each variant instead of one rate for all.

    A parabola in log rate through the best rate and its two neighbours; elsewhere the loss between two rates is taken
    to be linear in log rate. (Learning-rate sensitivity in the sense of Wortsman et al. 2024, "Small-scale proxies for
    large-scale Transformer training instabilities", section 2.)

    Args:
      pairs: (learning rate, loss), in any order; several losses of one rate, as of several seeds, are averaged. A loss
        that is not finite stands for a run that diverged: the basin ends at the next rate that did not.
      tolerance: what the loss may be above the lowest, in its own units.

    Raises:
      ConfigError: fewer than three rates with a finite loss; a rate that is not above 0; no tolerance.
    """
    losses: dict[float, list[float]] = {}
    for rate, loss in pairs:
        if not (rate > 0 and math.isfinite(rate)):
            raise ConfigError(f"learning rate {rate}: must be above 0")
        losses.setdefault(float(rate), []).append(float(loss))
    if not tolerance > 0:
        raise ConfigError(f"tolerance = {tolerance}: must be above 0")
    rates = sorted(losses)
    y = np.array([np.mean(losses[rate]) for rate in rates])
    x = np.log10(rates)
    finite = np.flatnonzero(np.isfinite(y))
    if len(finite) < 3:
        raise ConfigError(f"{len(finite)} learning rates with a finite loss: a basin needs at least 3")
    i = int(finite[y[finite].argmin()])
    inner = 0 < i < len(x) - 1 and bool(np.isfinite(y[i - 1 : i + 2]).all())
    best, lowest, curve = float(x[i]), float(y[i]), 0.0
    if inner:
        best, lowest, curve = _vertex(x[i - 1 : i + 2], y[i - 1 : i + 2])
    ends = []
    for side in (-1, 1):
        outwards = np.arange(i, -1, -1) if side < 0 else np.arange(i, len(x))
        parabola = (best, lowest, curve, float(x[i + side])) if inner else None
        ends.append(_crossing(x[outwards], y[outwards], lowest + tolerance, parabola))
    (low, open_low), (high, open_high) = ends
    return Sensitivity(
        best=10**best,
        loss=lowest,
        low=10**low,
        high=10**high,
        width=high - low,
        open_low=open_low,
        open_high=open_high,
        at_edge=i in (0, len(x) - 1),
    )


def _vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(x, y, half the second derivative) of the parabola through three points, the middle one the lowest."""
    d1, d2 = x[1] - x[0], x[2] - x[1]
    curve = ((y[2] - y[1]) / d2 - (y[1] - y[0]) / d1) / (d1 + d2)
    if curve <= 0:  # three equal losses
        return float(x[1]), float(y[1]), 0.0
    slope = ((y[1] - y[0]) / d1 * d2 + (y[2] - y[1]) / d2 * d1) / (d1 + d2)
    return float(x[1] - slope / (2 * curve)), float(y[1] - slope**2 / (4 * curve)), float(curve)


def _crossing(x, y, limit: float, parabola: tuple[float, float, float, float] | None) -> tuple[float, bool]:
    """(where the loss first reaches `limit` from x[0] outwards, whether it does not within the x that were tried)."""
    if parabola:
        best, lowest, curve, reach = parabola
        if curve > 0:
            way = math.sqrt((limit - lowest) / curve)
            there = best + math.copysign(way, reach - x[0])
            if (reach - there) * math.copysign(1, reach - x[0]) >= 0:
                return there, False
        x, y = x[1:], y[1:]
    for k in range(1, len(x)):
        if not math.isfinite(y[k]):
            return float(x[k - 1]), False
        if y[k] >= limit:
            share = (limit - y[k - 1]) / (y[k] - y[k - 1])
            return float(x[k - 1] + share * (x[k] - x[k - 1])), False
    return float(x[-1]), True
