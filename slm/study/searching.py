"""Search over fields of a config through optuna, on the cells of studies: what was trained is read, not trained again.

found = slm.study.search(base, {"optim.learning_rate": (1e-4, 1e-1), "model.attention": ["softmax", "gla"]}, trials=32,
                         tokens=1e6)
found.best, found.runs.table(), slm.study.ablate(base, {"optim.learning_rate": [...]}, ...)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slm.config import Experiment
from slm.errors import ConfigError
from slm.study.cells import SHORT
from slm.study.grids import arms
from slm.study.study import Study, ablate
from slm.study.table import HIGHER_IS_BETTER

LOG_FROM = 10.0
"""Ranges whose ends are this many times apart are searched on a logarithmic scale."""


@dataclass(frozen=True)
class Search:
    """What `search` returns."""

    best: dict[str, Any]
    """Field to value, of the best mean over seeds. It was chosen by these very runs, so its score flatters it: compare
    it with others on other seeds."""
    value: float
    """Its mean."""
    runs: Study
    """All trials, arms `trial 0`, `trial 1`, ..."""
    optuna: Any
    """The optuna.study.Study, for its plots and importances."""


def search(
    base: Experiment,
    space: Mapping[str, tuple[float, float] | list],
    trials: int = 32,
    *,
    metric: str = "loss",
    at_once: int = 4,
    seeds: int = 1,
    sampler_seed: int = 0,
    **how: Any,
) -> Search:
    """The best of `trials` settings, proposed by optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

    Nothing is kept but cells: the sampler proposes the same after the same answers, so the same call goes on where a
    stopped one was.

    Args:
      base: the config.
      space: field to (lowest, highest), whole numbers if both are whole, on a logarithmic scale from a factor of ten
        on; or to a list of values.
      metric: what is to be best. A trial in which a run diverged or failed is the worst of all.
      at_once: trials proposed before the next answer; they train together where they can.
      seeds: runs of each trial.
      sampler_seed: of the proposals.
      how: tokens, seconds, folder, match, solve, pack, processes, show: as of `ablate`.

    Raises ConfigError without optuna, for a range that is none, as `ablate`, and when no trial succeeded.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError("search needs optuna: pip install 'slm[search]'; or use slm.study.grid") from None
    if trials < 1 or at_once < 1:
        raise ConfigError(f"trials = {trials}, at_once = {at_once}: must be at least 1")
    spread = {field: _distribution(optuna, field, values) for field, values in space.items()}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        higher = SHORT.get(metric, metric) in HIGHER_IS_BETTER
        sampler = optuna.samplers.TPESampler(seed=sampler_seed, n_startup_trials=min(10, max(1, trials // 3)))
        asked = optuna.create_study(direction="maximize" if higher else "minimize", sampler=sampler)
        cells = []
        for first in range(0, trials, at_once):
            proposed = [asked.ask(spread) for _ in range(min(at_once, trials - first))]
            named = {f"trial {one.number}": _values(space, one.params) for one in proposed}
            runs = ablate(base, arms(named), seeds=seeds, **how)
            cells += runs.cells
            rows = runs.rows()
            if any(row["status"] == "unfinished" for row in rows):
                break  # stopped: the same call goes on
            for one in proposed:
                scores = [row.get(SHORT.get(metric, metric)) for row in rows if row["arm"] == f"trial {one.number}"]
                known = [score for score in scores if score is not None]
                # Infinite, not left out: the sampler is to keep away from there.
                bad = -math.inf if higher else math.inf
                asked.tell(one, sum(known) / len(known) if len(known) == len(scores) else bad)
    finally:
        optuna.logging.set_verbosity(verbosity)
    told = [one for one in asked.trials if one.value is not None and math.isfinite(one.value)]
    if not told:
        raise ConfigError(f"no trial of the search has a {metric}: see the rows of its cells, or run it on")
    best = (max if higher else min)(told, key=lambda one: one.value)
    return Search(_values(space, best.params), best.value, Study(cells, cells[0].arm), asked)


def _distribution(optuna: Any, field: str, values: Any) -> Any:
    if isinstance(values, list) and values:
        return optuna.distributions.CategoricalDistribution(range(len(values)))
    if not (isinstance(values, tuple) and len(values) == 2 and values[0] < values[1]):
        raise ConfigError(f"search: {field} = {values!r}: give (lowest, highest), or a list of values")
    low, high = values
    log = low > 0 and high / low >= LOG_FROM
    if all(isinstance(end, int) for end in values):
        return optuna.distributions.IntDistribution(low, high, log=log)
    return optuna.distributions.FloatDistribution(low, high, log=log)


def _values(space: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """What the sampler chose; of lists, which it knows by number only."""
    return {field: space[field][value] if isinstance(space[field], list) else value for field, value in params.items()}
