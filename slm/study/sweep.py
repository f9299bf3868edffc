"""Studies from the command line: --sweep "optim.learning_rate=1e-3,3e-3 model.attention=softmax,gla"."""

import ast
from pathlib import Path
from typing import Any

from slm.config import Experiment
from slm.errors import ConfigError
from slm.study.grids import Grid, grid
from slm.study.study import Study, ablate

FOLDER = "studies"


def sweep(base: Experiment, text: str, seeds: int = 3, processes: int = 0, folder: str | Path = FOLDER) -> Study:
    """Trains the product of the values in `text` with each seed, and prints the table. The cells are those of
    `ablate(base, fields(text), seeds=seeds)`, in the folder that it takes unless told otherwise."""
    study = ablate(base, fields(text), seeds=seeds, processes=processes, folder=folder)
    print(study)
    if any(row["status"] == "done" for row in study.rows()):
        print(study.table())
    return study


def fields(text: str) -> Grid:
    """The grid of `FIELD=VALUE,VALUE FIELD=VALUE`. Raises ConfigError for anything else."""
    found: dict[str, list[Any]] = {}
    for part in text.split():
        field, equals, values = part.partition("=")
        if not (field and equals and values) or field in found:
            raise ConfigError(
                f"--sweep: {part!r} is not FIELD=VALUE,VALUE, or is there twice; for example "
                '"optim.learning_rate=1e-3,3e-3 model.attention=softmax,gla"'
            )
        field = field.replace("-", "_")
        found[field] = [_value(one) for one in values.split(",")]
    if not found:
        raise ConfigError('--sweep is empty; for example "optim.learning_rate=1e-3,3e-3"')
    return grid(found)


def _value(text: str) -> Any:
    parts = [_literal(part) for part in text.split("+")]
    # 1e+3 is a number.
    return _literal(text) if len(parts) == 1 or not isinstance(_literal(text), str) else tuple(parts)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
