"""Cells of a study: one arm with one seed. Each is an ordinary run folder, named after everything that decides it."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm.config import DataConfig, Experiment, flatten
from slm.data.cache import digest
from slm.errors import ConfigError
from slm.models.counts import cache_bytes, flops_per_token, parameter_counts
from slm.models.mixers import MIXERS, SHIPPED, layer_pattern
from slm.study.fingerprints import fingerprint
from slm.training import precision
from slm.training.metrics import read_rows
from slm.training.plan import PLAN
from slm.training.run import METRICS, stored_config

RESULT = "result.json"
SHORT = {"params": "parameters", "tokens_per_s": "tokens_per_second"}
"""Names that metrics may also be asked for by."""
MAKES_NUMBERS = (
    "attention", "compress", "data", "models", "training", "experiment.py", "compression.py",
    "evaluation/bits_per_byte.py", "study/packing.py",
)  # fmt: skip
"""Rooms and files of slm that decide what a run learns and how it is scored; a change in any makes new cells."""
WHERE = (
    "name", "dir", "log.", "checkpoint.", "mesh.", "data.cache", "data.tfds_dir", "data.download",
    "train.log_every", "train.evaluate_every", "train.overwrite",
)  # fmt: skip
"""Fields, and sections, that say where a cell runs and how often it reports: a cell with others of them is the same."""
MODELS = ("model.init_from", "distill.teacher", "distill.cached")
"""Fields that name files of which a run is made."""
ENDS = 65_536
"""Bytes at either end of such a file that are looked at."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: str
    seed: int
    config: Experiment
    """With the run's name and folder filled in."""

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    def result(self) -> dict[str, Any] | None:
        """What it came to; None: it has not ended."""
        try:
            return json.loads((self.folder / RESULT).read_text())
        except (OSError, ValueError):
            return None

    def history(self) -> list[dict]:
        """Rows of its metrics.jsonl, as far as they go."""
        return read_rows(self.folder / METRICS)

    def finish(self, status: str, **facts: Any) -> None:
        """Writes its result, whole or not at all. status: done, diverged, failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{RESULT}.{os.getpid()}"
        partial.write_text(json.dumps({"status": status} | facts, indent=1) + "\n")
        os.replace(partial, self.folder / RESULT)


def make_cells(configs: Mapping[str, Experiment], seeds: Sequence[int], folder: str | Path) -> list[Cell]:
    """Every arm with every seed; seeds vary fastest.

    The name of a run is a hash of its config (but for WHERE), of its data's content, of the models that it starts from
    or is taught by, of slm's code, and of the mechanisms that a program has added to MIXERS: the same cell in another
    study is the same folder, and a cell whose data or code has changed is another one.

    Raises ConfigError for arms that are one and the same run, and what opening the data raises.
    """
    from slm.data.pipeline import open_data

    @functools.cache
    def content(data: DataConfig, seed: int) -> str:
        return open_data(data, seed).fingerprint

    @functools.cache
    def files(model: str) -> str | None:
        return files_of(Path(model))

    cells, by_name = [], {}
    for arm, cfg in configs.items():
        for seed in map(int, seeds):
            one = dataclasses.replace(cfg, seed=seed, train=dataclasses.replace(cfg.train, overwrite=False))
            fields = flatten(one)
            decides = {path: value for path, value in fields.items() if not path.startswith(WHERE)}
            models = [files(fields[path]) for path in MODELS if fields[path]]
            name = digest(sorted(decides.items()), models, content(one.data, seed), code_version(), own_code(one))
            other = by_name.setdefault(name, arm)
            if other != arm:
                raise ConfigError(_same(other, arm, configs))
            cells.append(Cell(arm, seed, dataclasses.replace(one, name=name, dir=str(Path(folder) / "cells"))))
    return cells


def _same(one: str, other: str, configs: Mapping[str, Experiment]) -> str:
    a, b = (flatten(configs[arm]) for arm in (one, other))
    fields = " and ".join(path for path in a if a[path] != b[path])
    if not fields:
        return f"arms '{one}' and '{other}' have one and the same config: leave one of them out"
    return (
        f"arms '{one}' and '{other}' are one and the same run: they differ only in {fields}, which makes no "
        "other run of it (seeds vary by seeds=)"
    )


def files_of(model: Path) -> str | None:
    """A hash that tells whether a model's files are still what they were: their names, sizes, beginnings and ends. None
    where there are none, such as for a name on the Hub."""
    if not model.exists():
        return None
    found = []
    for path in sorted(model.rglob("*")) if model.is_dir() else [model]:
        if path.is_file() and path.suffix != ".lock" and path.name != RESULT:
            with path.open("rb") as file:
                begins = file.read(ENDS)
                file.seek(max(0, path.stat().st_size - ENDS))
                found.append((path.relative_to(model).as_posix(), path.stat().st_size, digest(begins, file.read())))
    return digest(found)


def own_mechanisms(cfg: Experiment) -> list[str]:
    """Names of its mechanisms that are not slm's, but this program's."""
    converted = dataclasses.replace(cfg.model, attention=cfg.convert.attention)
    names = dict.fromkeys([*layer_pattern(cfg.model), *layer_pattern(converted)])
    return [name for name in names if name in MIXERS and MIXERS[name] != SHIPPED.get(name)]


def own_code(cfg: Experiment) -> list[tuple[str, str]]:
    """A hash of each of `own_mechanisms`, whose source `code_version` does not see."""
    return [(name, fingerprint(MIXERS[name])) for name in own_mechanisms(cfg)]


def measured(cell: Cell, together: int = 1) -> dict[str, Any]:
    """Facts about a run that has ended: sizes from its config, scores from its last rows.

    `parameters`, `flops_per_token` (of training); `peak_bytes`, of a training step on one device, by XLA's account, and
    `compile_seconds` (of runs in one program, its share); `state_bytes`, what decoding carries for a text of
    data.sequence_length; `tokens_per_second`, the median of its rows, times the runs that trained
    `together` in one program, whose speed that is; and the last value of everything in its rows,
    those of validation without their prefix.
    """
    from slm.compress.shrink import shipped_config

    cfg, rows = cell.config, cell.history()
    facts: dict[str, Any] = json.loads(plan.read_text()) if (plan := cell.folder / PLAN).exists() else {}
    for row in rows:
        facts |= {name.removeprefix("validation_"): value for name, value in row.items()}
    if "validation_loss" in (rows[-1] if rows else {}):
        facts["training_loss"] = rows[-1]["loss"]
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    if speeds:
        facts["tokens_per_second"] = together * speeds[len(speeds) // 2]
    model = shipped_config(stored_config(cell.folder) or cfg).model
    dtype = precision.compute_dtype(cfg.train.precision)
    counts = parameter_counts(model)
    return facts | {
        "parameters": counts["total"],
        "non_embedding": counts["total"] - counts["embedding"] - counts["head"],
        "flops_per_token": flops_per_token(model, cfg.data.sequence_length)["train"],
        "state_bytes": cache_bytes(model, 1, cfg.data.sequence_length, dtype) if model.causal else 0,
    }


@functools.cache
def code_version() -> str:
    """A hash of the sources in MAKES_NUMBERS."""
    home = Path(__file__).parent.parent
    files = []
    for place in MAKES_NUMBERS:
        files += [home / place] if place.endswith(".py") else sorted((home / place).rglob("*.py"))
    return digest([(path.relative_to(home).as_posix(), path.read_bytes()) for path in files])
