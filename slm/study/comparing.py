"""Finished runs beside each other: the same text, the same table as a study's."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm.config import flatten
from slm.errors import ConfigError
from slm.evaluation.bits_per_byte import eval_step_of, evaluate_batches
from slm.evaluation.held_out import text_of
from slm.evaluation.opening import open_model
from slm.models.counts import cache_bytes, parameter_counts
from slm.models.quantized import stored_bytes
from slm.study.table import Table, make_table
from slm.training.run import FREE


def compare_runs(
    runs: Sequence[str | Path], source: str | None = None, batch_size: int = 16, level: float = 0.05
) -> Table:
    """Bits a byte, parameters and bytes of models; the first is the base.

    Runs that differ in nothing but their seed are one arm. Every text is scored by all, so differences are paired, by
    text and, where arms share seeds, by seed.

    Args:
      runs: folders of runs or saved models, Hugging Face folders, GGUF files.
      source: the text; None: what the first run held out, which the others must have held out too.
      batch_size: windows scored at a time.
      level: of intervals, and chance of a false verdict on any arm.

    Raises ConfigError for fewer than two arms or models that cut the text differently; what opening and scoring raise.
    """
    arms: dict[Any, tuple[str, dict[int, dict]]] = {}
    weights = None
    for run in runs:
        model = open_model(run)
        _, evaluation = text_of(model, run, source)
        scores = evaluate_batches(
            eval_step_of(model),
            model.params,
            evaluation.batches(batch_size),
            sources=evaluation.sources,
            by_cluster=True,
        )
        clusters = np.asarray(scores["clusters"])
        if "bits_per_byte" not in scores:
            raise ConfigError(f"{run}: its targets stand for no bytes, so there is nothing to compare: name a --source")
        nats, size = clusters[clusters[:, 1] > 0].T
        if weights is not None and not np.array_equal(weights, size):
            raise ConfigError(
                f"{run} was scored on other texts than {runs[0]}: name one for all with --source, and compare models "
                "with the same windows"
            )
        weights = size
        facts = {
            "bits_per_byte": nats / math.log(2) / size,
            "parameters": parameter_counts(model.config.model)["total"],
            "bytes": stored_bytes(model.params),
            "state_bytes": cache_bytes(model.config.model, 1, model.config.data.sequence_length, model.dtype),
        }
        key = tuple(
            (path, value)
            for path, value in flatten(model.config).items()
            if path != "seed" and (path == "train.steps" or not path.startswith(FREE))
        )
        known = arms.setdefault(key, (Path(run).name, {}))[1]
        if model.config.seed in known:  # not a further seed: another model
            known = arms.setdefault((key, str(run)), (Path(run).name, {}))[1]
        known[model.config.seed] = facts
    if len(arms) < 2:
        raise ConfigError(f"{', '.join(map(str, runs))}: name at least two models that differ in more than their seed")
    results = {}
    for name, seeds in _named(arms.values()):
        first = next(iter(seeds.values()))
        results[name] = first | {"bits_per_byte": {seed: facts["bits_per_byte"] for seed, facts in seeds.items()}}
    return make_table(results, weights=weights, level=level)


def _named(arms) -> list[tuple[str, dict]]:
    """With numbers behind names that occur twice."""
    found: list[tuple[str, dict]] = []
    for name, seeds in arms:
        same = sum(other == name or other.startswith(f"{name} (") for other, _ in found)
        found.append((f"{name} ({same + 1})" if same else name, seeds))
    return found
