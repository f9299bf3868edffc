"""Pictures of studies, as matplotlib's Figures in the project's one look."""

import math
from typing import Any

import numpy as np

from slm.evaluation import style

WORDS = {
    "bits_per_byte": "bits per byte", "loss": "loss, nats a token", "tokens": "tokens", "step": "steps",
    "parameters": "parameters", "params": "parameters", "tokens_per_s": "tokens a second",
    "state_bytes": "bytes of decoding state", "peak_bytes": "bytes at the peak",
    "flops_per_token": "FLOPs a token", "grad_norm": "norm of the gradient", "optim.learning_rate": "learning rate",
}  # fmt: skip


def curves(series: dict[str, dict[int, np.ndarray]], metric: str, x: str) -> Any:
    """A line an arm, the mean over its seeds at the x that all of them have, and a band from lowest to highest."""
    made = style.axes()
    lowest, last = [], []
    for number, (arm, by_seed) in enumerate(series.items()):
        runs = [points for points in by_seed.values() if len(points)]
        if not runs:
            continue
        xs, ys = _together(runs)
        if not len(xs):
            continue
        look = style.look(number)
        made.plot(xs, ys.mean(0), label=style.label(arm), **look | ({} if len(xs) < 30 else {"marker": None}))
        if len(runs) > 1:
            made.fill_between(xs, ys.min(0), ys.max(0), color=look["color"], alpha=0.15, linewidth=0)
        lowest.append(ys.min())
        last += ys[:, -max(2, len(xs) * 3 // 4) :].ravel().tolist()
    if lowest and min(lowest) < np.quantile(last, 0.99):
        # The first values would press all that matters into a strip at the bottom.
        margin = 0.08 * (max(last) - min(lowest))
        made.set_ylim(min(lowest) - margin, max(last) + margin)
    return _labelled(made, metric, x)


def _together(runs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(x, values of each run there), at the x that all have; where they have none, such as tokens of runs that see
    different numbers of them, at all x that lie within every run, between whose points lines are drawn."""
    shared = sorted(set(runs[0][:, 0]).intersection(*(set(points[:, 0]) for points in runs)))
    if not shared:
        begins, ends = max(points[:, 0].min() for points in runs), min(points[:, 0].max() for points in runs)
        shared = sorted({x for points in runs for x in points[:, 0] if begins <= x <= ends})
    return np.array(shared), np.array([np.interp(shared, points[:, 0], points[:, 1]) for points in runs])


def points(table: Any, metric: str, x: str) -> Any:
    """A point an arm: mean of both metrics, with the interval of each."""
    made = style.axes()
    for number, arm in enumerate(table.arms):
        across, up = table.cells[arm, x], table.cells[arm, metric]
        if math.isnan(up.mean) or math.isnan(across.mean):
            continue
        bars = {
            f"{name}err": [[cell.mean - cell.low], [cell.high - cell.mean]]
            for name, cell in (("x", across), ("y", up))
            if not math.isnan(cell.low)
        }
        look = style.look(number) | {"linestyle": "none", "markersize": 6}
        made.errorbar(across.mean, up.mean, label=style.label(arm), capsize=3, elinewidth=1, **bars, **look)
    return _labelled(made, metric, x)


def _labelled(made: Any, metric: str, x: str) -> Any:
    from matplotlib.ticker import EngFormatter

    for axis, name in ((made.xaxis, x), (made.yaxis, metric)):
        axis.set_label_text(WORDS.get(name, name))
        if max(map(abs, axis.get_view_interval())) >= 10_000:
            axis.set_major_formatter(EngFormatter(sep=""))
    style.legend(made)
    return made.figure
