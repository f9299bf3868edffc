"""Each variant at a learning rate of its own, and whether rates found on small models serve large ones.

best, basins = slm.study.tune(base, {"model.attention": ["softmax", "gla"]}, [1e-3, 2e-3, 4e-3], tokens=1e6)
runs = slm.study.ablate(base, best, seeds=5, tokens=1e6)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.config import flatten
from slm.errors import ConfigError
from slm.study.grids import Grid, arms, grid
from slm.study.learning_rate import Sensitivity, sensitivity
from slm.study.names import text_of
from slm.study.student import critical
from slm.study.study import Study, ablate

FIELD = "optim.learning_rate"
TUNING_SEED = 10_000
"""Seed of runs that only choose a value. Comparisons count from 0, so that none is judged by what it was chosen by."""


def tune(
    base: Any,
    variants: Grid | Mapping[str, Any],
    values: Sequence[float],
    *,
    field: str = FIELD,
    metric: str = "loss",
    tolerance: float = 0.02,
    seeds: int | Sequence[int] = (TUNING_SEED,),
    **how: Any,
) -> tuple[Grid, dict[str, Sensitivity]]:
    """Trains every variant at every value, and gives each the value of its lowest mean loss.

    Args:
      base, variants: as of `ablate`.
      values: of `field`, at least three, above 0.
      metric: what is to be low.
      tolerance: of the basin, in units of the metric.
      seeds: of these runs; other than those of the comparison that follows, lest chance be chosen.
      how: tokens, folder, match, solve, pack, processes, show: as of `ablate`.

    Returns:
      The variants with their values, under their names; and of each variant its basin, which says so if the best value
      is the lowest or highest that was tried.

    Raises ConfigError as `ablate`, and for a variant that trained at fewer than three values.
    """
    variants = variants if isinstance(variants, Grid) else grid(variants)
    values = sorted(values)
    study = ablate(base, variants * grid({field: values}), seeds=seeds, **how)
    found = basins(study, field=field, metric=metric, tolerance=tolerance)
    chosen, by_name = {}, {}
    for arm, (basin, losses) in zip(variants, found.values(), strict=True):
        chosen[arm.name] = dict(arm.changes) | {field: min(losses, key=losses.get)}
        by_name[arm.name] = basin
    return arms(chosen), by_name


def basins(
    study: Study, *, field: str = FIELD, metric: str = "loss", tolerance: float = 0.02
) -> dict[str, tuple[Sensitivity, dict[float, float]]]:
    """For arms that differ in nothing but `field`: the basin, and value to mean loss over seeds (infinite where a run
    diverged). Named by what else tells the arms apart.

    Raises ConfigError where a group has fewer than three values, naming it.
    """
    lost = {(row["arm"], row["seed"]) for row in study.rows() if row["status"] == "diverged"}
    values = study.values(metric)
    result = {}
    for name, members in _groups(study, field).items():
        pairs = []
        for arm in members:
            at = flatten(study.cell(arm).config)[field]
            for seed, value in values[arm].items():
                if value is not None or (arm, seed) in lost:
                    pairs.append((at, math.inf if value is None else value))
        try:
            basin = sensitivity(pairs, tolerance)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        means = {at: float(np.mean([loss for rate, loss in pairs if rate == at])) for at, _ in pairs}
        result[name] = basin, means
    return result


@dataclass(frozen=True)
class Transfer:
    """What `transfer` returns."""

    sizes: tuple[float, ...]
    best: tuple[float, ...]
    """Best value of each size, from its basin."""
    drift: float
    """Powers of the size by which the best value grows; 0: it transfers."""
    low: float
    high: float
    """The t interval of the drift around the fitted line; NaN from two sizes."""
    loss: float
    """What the largest model loses by the best value of the smallest, in units of the metric; of losses between the
    values that were tried, linear in the logarithm."""
    at_edge: bool
    """Some best value is the lowest or highest that was tried, so that the drift may be larger."""

    def __str__(self) -> str:
        pairs = ", ".join(f"{best:.3g} at {size:,.0f}" for size, best in zip(self.sizes, self.best))
        text = f"best {pairs}; grows with size to the power {self.drift:+.2f} ({self.low:+.2f} to {self.high:+.2f}); "
        text += f"the value of the smallest costs the largest {self.loss:+.4f}"
        return text + ("; a best value is at the edge: try more" if self.at_edge else "")


def transfer(
    study: Study, *, field: str = FIELD, size: str = "model.width", metric: str = "loss", tolerance: float = 0.02
) -> Transfer:
    """Does the best learning rate of a small model serve a large one? The check behind muTransfer (Yang et al. 2022,
    "Tensor Programs V", figure 1): best rate against size, and what the rate of the smallest costs the largest.

    Args:
      study: of arms that are the product of sizes and values of `field`, and of nothing else.
      size: a field, such as model.width, or a metric that no seed changes, such as parameters.

    Raises ConfigError for fewer than two sizes or, in one of them, fewer than three values.
    """
    found = basins(study, field=field, metric=metric, tolerance=tolerance)
    groups = _groups(study, field)
    measured = {}
    for name, members in groups.items():
        flat = flatten(study.cell(members[0]).config)
        result = study.cell(members[0]).result() or {}
        at = flat.get(size, result.get(size))
        if not isinstance(at, (int, float)):
            raise ConfigError(f"size = {size!r}: a field that is a number, such as model.width, or a metric")
        if at in measured:
            raise ConfigError(f"two groups of arms have {size} = {at}: a transfer is checked over sizes alone")
        measured[at] = found[name]
    if len(measured) < 2:
        raise ConfigError(f"{len(measured)} size: arms of several {size} are needed")
    sizes = sorted(measured)
    best = [measured[at][0].best for at in sizes]
    x, y = np.log2(sizes), np.log2(best)
    drift, level = np.polyfit(x, y, 1)
    half = math.nan
    if len(x) > 2:
        error = math.sqrt(((y - drift * x - level) ** 2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
        half = critical(0.05, len(x) - 2) * error
    losses = measured[sizes[-1]][1]
    tried = sorted(losses)
    taken = float(np.interp(np.log(best[0]), np.log(tried), [losses[rate] for rate in tried]))
    return Transfer(
        sizes=tuple(sizes), best=tuple(best), drift=float(drift), low=float(drift - half), high=float(drift + half),
        loss=taken - min(losses.values()), at_edge=any(measured[at][0].at_edge for at in sizes),
    )  # fmt: skip


def _groups(study: Study, field: str) -> dict[str, list[str]]:
    """Arms that differ in `field` alone, in order; named by what else tells the groups apart."""
    own = {arm: _decides(study.cell(arm).config, field) for arm in study.arms}
    if any(field not in flatten(study.cell(arm).config) for arm in study.arms):
        raise ConfigError(f"{field} is not a field of the config")
    varying = [path for path in next(iter(own.values())) if len({one[path] for one in own.values()}) > 1]
    groups: dict[str, list[str]] = {}
    for arm, one in own.items():
        name = " ".join(f"{path.rsplit('.', 1)[-1]}={text_of(one[path])}" for path in varying) or field
        groups.setdefault(name, []).append(arm)
    return groups


def _decides(cfg: Any, field: str) -> dict[str, Any]:
    return {path: value for path, value in flatten(cfg).items() if path not in (field, "name", "dir", "seed")}
