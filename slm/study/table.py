"""The table of a study: for each arm and metric its mean, its difference to the base, and what that says.

table = make_table({"softmax": {"bits_per_byte": {0: 1.69, 1: 1.70, 2: 1.68}, "params": 2_212_288},
                    "gla": {"bits_per_byte": {0: 1.66, 1: 1.68, 2: 1.65}, "params": 2_230_000}})
print(table); table.markdown(); table.latex(); table.json(); table.pandas()
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.errors import ConfigError
from slm.study import table_text
from slm.study.statistics import Difference, Verdict, holm, mean_of, paired_difference, verdict, welch

HIGHER_IS_BETTER = ("accuracy", "tokens_per_s", "tokens_per_second", "mfu")
"""Metrics of which more is better without saying so; of all others less is."""


@dataclass(frozen=True)
class Cell:
    """One arm's value of one metric. NaN: not known."""

    mean: float
    low: float
    high: float
    """t interval over the seeds (and texts); NaN where there is one value, or one that no seed changes."""
    n: int
    """Seeds; 0 where the arm has no value, or one without a seed."""
    difference: Difference | None
    """Arm less base over the seeds that both have; None for the base, and without a value in both."""
    p: float
    """Of that difference, corrected for the number of arms (Holm); NaN where nothing is tested."""
    verdict: Verdict | None
    """None for the base, and for values that no seed changes, which are not tested."""


@dataclass(frozen=True)
class Table:
    """What `make_table` returns; prints as text of at most 100 columns, and in a notebook as Markdown."""

    arms: tuple[str, ...]
    metrics: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]
    """(arm, metric) to its cell; every pair has one."""
    base: str
    level: float
    notes: tuple[str, ...]
    """What the numbers mean, what is missing, and how small a difference would have been seen."""

    def __str__(self) -> str:
        return table_text.text(self)

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def text(self, columns: int = 100) -> str:
        """For a terminal: metrics that do not fit into `columns` side by side follow below."""
        return table_text.text(self, columns)

    def markdown(self) -> str:
        """One GitHub table, notes as a list below it."""
        return table_text.markdown(self)

    def latex(self) -> str:
        """A `tabular` for the package booktabs, notes as comments; what is better than the base is bold."""
        return table_text.latex(self)

    def json(self) -> str:
        """All numbers in full; null where there is none."""
        cells = [
            {"arm": arm, "metric": metric, **_record(self.cells[arm, metric])}
            for arm in self.arms
            for metric in self.metrics
        ]
        whole = {"base": self.base, "level": self.level, "cells": cells, "notes": list(self.notes)}
        return json.dumps(whole, indent=2, allow_nan=False) + "\n"

    def pandas(self) -> Any:
        """A DataFrame: a row an arm, columns (metric, quantity) as in `json`. Raises ConfigError without pandas."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise ConfigError("table.pandas() needs pandas: pip install pandas; or use table.json()") from None
        rows = {
            arm: {(metric, k): v for metric in self.metrics for k, v in _record(self.cells[arm, metric]).items()}
            for arm in self.arms
        }
        frame = pandas.DataFrame.from_dict(rows, orient="index")
        frame.columns = pandas.MultiIndex.from_tuples(frame.columns, names=("metric", None))
        frame.index.name = "arm"
        return frame


def make_table(
    results: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str] | None = None,
    *,
    base: str | None = None,
    higher_is_better: Sequence[str] = HIGHER_IS_BETTER,
    weights: np.ndarray | None = None,
    level: float = 0.05,
) -> Table:
    """Means with intervals, paired differences to the base, p values corrected over the arms, and verdicts.

    Args:
      results: arm to metric to its values: a dict from seed to a number, or to (E,) scores of the E texts that all runs
        were scored on; or one number, of what no seed changes, such as parameters. None and numbers that are not finite
        stand for runs that failed; they are left out, and a note says so.
      metrics: columns; None: all, in the order in which they come.
      base: the arm that others are compared with; None: the first.
      higher_is_better: metrics of which more is better; of all others less is.
      weights: (E,) of the texts, such as their bytes.
      level: of intervals and verdicts; for verdicts the chance that any arm of a metric is called better or worse that
        is not.

    Raises:
      ConfigError: no arm, an unknown base, a metric that no arm has, or scores of different texts.
    """
    results = {str(arm): dict(values) for arm, values in results.items()}
    if not results:
        raise ConfigError("a table needs at least one arm")
    base = next(iter(results)) if base is None else base
    if base not in results:
        raise ConfigError(f"base = {base!r}: must be one of {', '.join(results)}")
    known = list(dict.fromkeys(metric for values in results.values() for metric in values))
    metrics = known if metrics is None else list(metrics)
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"no arm has the metric {metric!r}: there are {', '.join(known)}")
    cells: dict[tuple[str, str], Cell] = {}
    notes: list[str] = []
    for metric in metrics:
        column, said = _column(
            {arm: values.get(metric) for arm, values in results.items()},
            metric, base, metric not in higher_is_better, weights, level,
        )  # fmt: skip
        cells |= {(arm, metric): cell for arm, cell in column.items()}
        notes += said
    notes = [_explained(cells, base, level), *dict.fromkeys(notes)]
    return Table(tuple(results), tuple(metrics), cells, base, level, tuple(notes))


def _column(values: dict[str, Any], metric, base, lower_is_better, weights, level):
    """({arm: Cell}, notes) of one metric."""
    notes, by_seed = [], {}
    for arm, value in values.items():
        by_seed[arm], failed = _by_seed(value)
        if failed:
            total = len(by_seed[arm]) + len(failed)
            notes.append(f"{arm}: {metric} of {len(failed)} of {total} seeds is missing or not finite, and left out")
    fixed = _fixed(by_seed)
    differences: dict[str, Difference] = {}
    for arm, seeds in by_seed.items():
        if arm == base or not seeds or not by_seed[base]:
            continue
        shared = [seed for seed in by_seed[base] if seed in seeds]
        try:
            if shared:
                a, b = (_stacked({seed: one[seed] for seed in shared}) for one in (by_seed[base], seeds))
                differences[arm] = paired_difference(a, b, weights if a.ndim == 2 else None, level=level)
            else:
                differences[arm] = welch(*(_means(one, weights) for one in (by_seed[base], seeds)), level=level)
                notes.append(f"{arm}: {metric} shares no seed with {base}; compared without pairs (Welch)")
        except ConfigError as error:
            raise ConfigError(f"arm '{arm}', {metric}: {error}") from error
    tested = {} if fixed else differences
    corrected = dict(zip(tested, holm([d.p for d in tested.values()])))
    cells = {}
    for arm, seeds in by_seed.items():
        mean = low = high = math.nan
        if seeds:
            values = _stacked(seeds)
            own = mean_of(values, weights if values.ndim == 2 else None, level=level, resamplings=0)
            mean, low, high = own.mean, own.low, own.high
        if fixed:
            low = high = math.nan
        p, difference = corrected.get(arm, math.nan), differences.get(arm)
        said = verdict(difference, p=p, lower_is_better=lower_is_better) if arm in tested else None
        cells[arm] = Cell(mean, low, high, len(seeds) - (None in seeds), difference, p, said)
    ties = [tested[arm].detectable(comparisons=len(tested)) for arm in tested if cells[arm].verdict == "tie"]
    if ties and max(ties) > 0:
        notes.append(
            f"{metric}: a tie is not proof of equality; true differences up to {max(ties):.2g} would be missed in more "
            "than 20% of such studies"
        )
    if any(cells[arm].verdict == "unknown" for arm in tested):
        notes.append(f"{metric}: one seed cannot tell a difference from chance; run at least 3")
    return cells, notes


def _by_seed(value: Any) -> tuple[dict[Any, Any], list[Any]]:
    """({seed: finite value}, seeds that failed); the key None stands for a value without a seed."""
    if not isinstance(value, Mapping):
        value = {} if value is None else {None: value}
    good = {seed: v for seed, v in value.items() if v is not None and np.isfinite(np.asarray(v, np.float64)).all()}
    return good, [seed for seed in value if seed not in good]


def _fixed(by_seed: dict[str, dict[Any, Any]]) -> bool:
    """Whether no seed changes this metric in any arm: it is known then, not estimated."""
    if any(np.ndim(v) for seeds in by_seed.values() for v in seeds.values()):
        return False
    if all(set(seeds) <= {None} for seeds in by_seed.values()):
        return True
    several = any(len(seeds) > 1 for seeds in by_seed.values())
    return several and all(len(set(seeds.values())) <= 1 for seeds in by_seed.values())


def _stacked(seeds: dict[Any, Any]) -> np.ndarray:
    """(S,) or (S, E)."""
    shapes = {np.shape(v) for v in seeds.values()}
    if len(shapes) > 1:
        raise ConfigError(f"seeds have scores of different texts, of shapes {', '.join(map(str, sorted(shapes)))}")
    return np.array(list(seeds.values()), np.float64)


def _means(seeds: dict[Any, Any], weights) -> np.ndarray:
    return np.array([np.average(v, weights=weights if np.ndim(v) else None) for v in seeds.values()])


def _explained(cells: dict[tuple[str, str], Cell], base: str, level: float) -> str:
    """What all numbers have in common."""
    counts = sorted({cell.n for cell in cells.values() if cell.n})
    text = f"± is half the {1 - level:.0%} t interval"
    if counts:
        text += f" over {counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} seeds"
    others = len({arm for arm, _ in cells}) - 1
    if others:
        text += f"; differences are to {base}, paired by seed; p of t tests"
        text += f", corrected for {others} arms (Holm)" if others > 1 else ""
    return text


def _record(cell: Cell) -> dict[str, Any]:
    d = cell.difference
    numbers = {"mean": cell.mean, "low": cell.low, "high": cell.high, "n": cell.n}
    for name, attribute in (("", "mean"), ("_low", "low"), ("_high", "high"), ("_p", "p"), ("_n", "n")):
        numbers[f"difference{name}"] = None if d is None else getattr(d, attribute)
    for i, side in enumerate(("low", "high")):
        numbers[f"difference_bootstrap_{side}"] = None if d is None else d.bootstrap[i]
    numbers |= {"p": cell.p, "verdict": cell.verdict}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
