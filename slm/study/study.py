"""Studies: arms by seeds, run once, compared with intervals, drawn, reported.

import slm
base = slm.load_config("configs/quickstart.py")
runs = slm.study.ablate(base, slm.study.grid({"model.attention": ["softmax", "gla"]}), seeds=3, tokens=5e6)
print(runs.table("bits_per_byte", "params"))
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slm.config import Experiment, flatten
from slm.errors import ConfigError
from slm.models.language_model import LanguageModel
from slm.study import drawing
from slm.study.budget import with_seconds, with_tokens
from slm.study.cells import SHORT, Cell, make_cells
from slm.study.grids import Grid, as_grid, configs
from slm.study.matching import Match, matched
from slm.study.running import Stopped, run_cells
from slm.study.table import HIGHER_IS_BETTER, Table, make_table

FIXED = ("parameters", "non_embedding", "flops_per_token", "state_bytes", "peak_bytes")
"""Metrics that no seed changes."""
DEPENDS_ON_PACK = ("tokens_per_second", "peak_bytes", "seconds", "compile_seconds")
"""Metrics that depend on how many runs trained together, of which there is then one measurement, not several."""


def ablate(
    base: Experiment,
    grid: Grid | Mapping[str, Any],
    *,
    seeds: int | Sequence[int] = 3,
    tokens: float | None = None,
    seconds: float | None = None,
    folder: str | Path = "studies",
    match: Literal["parameters", "flops"] | None = None,
    solve: str = "model.width",
    pack: int | None = None,
    processes: int = 0,
    show: bool = True,
) -> "Study":
    """Trains every arm with every seed, but for what is done already, and returns what came of it.

    Arms that differ only in seed and numbers (learning rate, weight decay, b2, eps; alpha and temperature of
    distillation) train in one program. A run that diverges, or fails, becomes a row. Ctrl-C keeps what is done: call
    again to go on.

    Args:
      base: what arms change. The first arm is what the others are compared with, unless one of them changes nothing.
      grid: arms; or field to values, whose product they are (slm.study.grid).
      seeds: how many, from 0, or which. Each seeds initialisation and the order of the data, for all arms alike.
      tokens: to train each run on, up to a batch, whatever its batches; None: train.steps as the configs have it.
      seconds: to train each run for, instead: a short trial of each arm tells how many steps that is, and all seeds get
        as many. What compilation, evaluation and saving take does not count.
      folder: where cells are kept. Studies may share it: equal cells are trained once.
      match: give all arms as many parameters, or FLOPs a token, as base, by the value of `solve` that comes nearest.
      solve: model.width, model.layers or model.mlp_width.
      pack: most runs in one program; 1: none together; None: as many as usually gain (on a CPU, long runs none).
      processes: 0: all in this process; more: so many at a time, each with a device or cores of its own.
      show: a line for each run that ends, with the time that is left.

    Raises ConfigError for an arm that cannot be, or is another one under a second name, DataError for data that cannot
    be read; nothing has been trained then.
    """
    if tokens is not None and seconds is not None:
        raise ConfigError("tokens and seconds exclude each other: arms are equal in the one or in the other")
    matches: dict[str, Match] = {}
    if match is None:
        found = configs(base, grid)
    else:
        matches = matched(base, grid, match, solve)
        found = {name: one.config for name, one in matches.items()}
    unchanged = [name for name, cfg in found.items() if flatten(cfg) == flatten(base)]
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"seeds = {seeds!r}: give a number above 0, or different seeds")
    if (tokens, seconds) != (None, None) and any("train.steps" in dict(arm.changes) for arm in as_grid(grid)):
        raise ConfigError("an arm sets train.steps, and so do tokens= and seconds=: leave one of them out")
    if tokens is not None:
        found = {name: with_tokens(cfg, tokens) for name, cfg in found.items()}
    if seconds is not None:
        found = with_seconds(found, seconds, folder)
    cells = make_cells(found, chosen, folder)
    try:
        run_cells(cells, processes, pack, show)
    except Stopped:
        if show:
            print("stopped and saved: the same call goes on from here")
    first = unchanged[0] if unchanged else next(iter(found))
    return Study(cells, first, matches)


class Study:
    """Results of cells. Reads their folders when asked, so that it can be made again from them."""

    def __init__(self, cells: Sequence[Cell], base: str, matches: Mapping[str, Match] | None = None):
        self.cells = tuple(cells)
        self.base = base
        self.matches = dict(matches or {})
        """Arm to the size that was solved for, if arms were matched."""

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.seed for cell in self.cells))

    def rows(self) -> list[dict[str, Any]]:
        """One for each cell: arm, seed, status (done, diverged, failed, unfinished), error, and its metrics."""
        return [
            {"arm": cell.arm, "seed": cell.seed} | (cell.result() or {"status": "unfinished"}) for cell in self.cells
        ]

    def pandas(self) -> Any:
        """`rows` as a DataFrame. Raises ConfigError without pandas."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise ConfigError("pandas() needs pandas: pip install pandas; or use rows()") from None
        return pandas.DataFrame(self.rows())

    def values(self, metric: str) -> dict[str, dict[int, float | None]]:
        """Arm to seed to value; None where a run has none. Raises ConfigError for a metric that no run has."""
        metric = SHORT.get(metric, metric)
        rows = self.rows()
        done = [row for row in rows if row["status"] == "done"]
        if not done:
            raise ConfigError(f"no run of {len(rows)} is done, so there is no {metric!r} yet; rows() says why")
        known = sorted({name for row in done for name, value in row.items() if isinstance(value, (int, float))})
        if metric not in known:
            raise ConfigError(f"no run has the metric {metric!r}: there are {', '.join(known)}")
        found: dict[str, dict[int, float | None]] = {arm: {} for arm in self.arms}
        for row in rows:
            found[row["arm"]][row["seed"]] = row.get(metric) if row["status"] == "done" else None
        return found

    def table(self, *metrics: str, level: float = 0.05) -> Table:
        """Mean of each metric with its interval, paired difference to the base, p after Holm's correction, verdict.

        Args:
          metrics: such as bits_per_byte, loss, params, tokens_per_s, state_bytes, peak_bytes, flops_per_token, seconds;
            none: bits_per_byte, or else loss, and params.
          level: of intervals, and chance of a false verdict on any arm.
        """
        if not metrics:
            known = {name for row in self.rows() for name in row}
            metrics = ("bits_per_byte" if "bits_per_byte" in known else "loss", "params")
        results: dict[str, dict[str, Any]] = {arm: {} for arm in self.arms}
        packs = {row.get("packed", 1) for row in self.rows()}
        for metric in metrics:
            for arm, by_seed in self.values(metric).items():
                known, name = [value for value in by_seed.values() if value is not None], SHORT.get(metric, metric)
                if name in FIXED:
                    results[arm][metric] = known[0] if known else None
                elif name in DEPENDS_ON_PACK and max(packs) > 1:
                    results[arm][metric] = float(np.mean(known)) if known else None
                else:
                    results[arm][metric] = by_seed
        table = make_table(results, metrics, base=self.base, level=level)
        if len(packs) > 1 and any(SHORT.get(metric, metric) in DEPENDS_ON_PACK for metric in metrics):
            note = (
                f"Programs trained {min(packs)} to {max(packs)} runs at once, so that speeds and bytes of arms do not "
                "compare: see pack=1."
            )
            table = dataclasses.replace(table, notes=(*table.notes, note))
        return table

    def best(self, metric: str = "bits_per_byte") -> LanguageModel:
        """The trained model of the arm with the best mean, and of its seeds the best. Raises ConfigError."""
        sign = -1 if SHORT.get(metric, metric) in HIGHER_IS_BETTER else 1
        means, where = {}, {}
        for arm, by_seed in self.values(metric).items():
            done = {seed: sign * value for seed, value in by_seed.items() if value is not None}
            if done:
                means[arm], where[arm] = float(np.mean(list(done.values()))), min(done, key=done.get)
        arm = min(means, key=means.get)
        return self.model(arm, where[arm])

    def cell(self, arm: str, seed: int | None = None) -> Cell:
        """Raises ConfigError for one that is not there."""
        for cell in self.cells:
            if cell.arm == arm and seed in (None, cell.seed):
                return cell
        raise ConfigError(f"no cell of arm {arm!r} and seed {seed}: arms {', '.join(self.arms)}; seeds {self.seeds}")

    def model(self, arm: str, seed: int | None = None) -> LanguageModel:
        """The trained model of a cell, of the first seed if none is given."""
        from slm.training.run import load

        return load(self.cell(arm, seed).folder)

    def curve(self, metric: str = "bits_per_byte", x: str = "tokens") -> dict[str, dict[int, np.ndarray]]:
        """Arm to seed to (points, 2): x and metric wherever a run recorded both, in order; those of
        validation, if there are such."""
        found: dict[str, dict[int, np.ndarray]] = {arm: {} for arm in self.arms}
        for cell in self.cells:
            rows = cell.history()
            name = f"validation_{metric}" if any(f"validation_{metric}" in row for row in rows) else metric
            points = [(row[x], row[name]) for row in rows if row.get(name) is not None and x in row]
            found[cell.arm][cell.seed] = np.array(points, np.float64).reshape(-1, 2)
        return found

    def plot(self, metric: str = "bits_per_byte", x: str = "tokens", path: str | Path | None = None) -> Any:
        """Curves of each arm: the mean over seeds, and a band from the lowest to the highest; matplotlib's Figure.

        Args:
          metric: as it stands in metrics.jsonl, with or without `validation_`; or any of the table's.
          x: tokens, step; or a metric of the table, such as params: then a point an arm, with its interval.
          path: save it there too (.png, .svg, .pdf).
        """
        if SHORT.get(x, x) in FIXED or x in ("seconds", "tokens_per_s", "tokens_per_second"):
            figure = drawing.points(self.table(metric, x), metric, x)
        else:
            figure = drawing.curves(self.curve(metric, x), metric, x)
        if path is not None:
            figure.savefig(path)
        return figure

    def report(self, path: str | Path, title: str = "Study", metrics: Sequence[str] = ()) -> Path:
        """Writes one HTML file that needs no network: tables, curves, configs, environment, failures."""
        from slm.study.page import page

        path = Path(path)
        path.write_text(page(self, title, metrics), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        done = sum(row["status"] == "done" for row in self.rows())
        lines = [f"Study of {len(self.arms)} arms with {len(self.seeds)} seeds: {done} of {len(self.cells)} runs done"]
        for row in self.rows():
            if row["status"] not in ("done", "unfinished"):
                lines.append(f"  {row['arm']}, seed {row['seed']}: {row['status']}: {row['error']}")
        return "\n".join(lines)
