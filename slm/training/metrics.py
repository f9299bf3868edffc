"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for."""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from slm.config import LogConfig
from slm.errors import ConfigError, SlmError


class History:
    """The rows of metrics.jsonl, in memory and on disk.

    Args:
      path: the file; it need not exist.
      step: keep the rows up to this step. Later ones belong to updates that a killed run made after its last
        checkpoint and that will be made again; they are dropped, atomically. So is a last line that a kill cut short.
      write: whether this process writes the file; with several processes, one does.

    Raises SlmError if the file cannot be read or written.
    """

    def __init__(self, path: Path, step: int, write: bool = True):
        self.path, self._write = path, write
        self.rows = [row for row in read_rows(path) if row["step"] <= step]
        self._file = None
        if write:
            with _clear_errors(self.path):
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".tmp")
                partial.write_text("".join(map(_line, self.rows)))
                os.replace(partial, path)
                self._file = path.open("a")

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row with `step` and writes it through, so that a kill loses nothing that was reported."""
        row = {name: _json_value(value) for name, value in row.items()}
        self.rows.append(row)
        if self._file:
            with _clear_errors(self.path):
                self._file.write(_line(row))
                self._file.flush()

    def close(self) -> None:
        if self._file:
            with _clear_errors(self.path):
                self._file.close()


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SlmError(f"cannot use {path}: {error.strerror}") from error


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without a last line that is cut short; [] if there is no such file.

    Raises SlmError if it cannot be read, or if a line before the last is not JSON.
    """
    if not path.exists():
        return []
    with _clear_errors(path):
        lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise SlmError(f"{path}, line {number}, is not JSON: delete it, or move the file away") from error
    return rows


class Tracker(Protocol):
    """Something that takes the rows besides metrics.jsonl."""

    def write(self, step: int, row: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def trackers(cfg: LogConfig, run_dir: Path, step: int, settings: dict[str, Any]) -> list[Tracker]:
    """The trackers that `cfg` asks for, continuing from `step`.

    Raises ConfigError, naming the extra to install, where a package is missing.
    """
    found: list[Tracker] = []
    if cfg.tensorboard:
        found.append(TensorBoard(run_dir, step))
    if cfg.wandb is not None:
        found.append(WeightsAndBiases(cfg.wandb, run_dir, settings))
    return found


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise _missing("log.tensorboard", "tensorboardX") from error
        # Events after `step` are of updates that will be made again: purge_step hides them.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named like the run folder, which keeps its id, so that a resumed run continues the same curves."""

    def __init__(self, project: str, run_dir: Path, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise _missing("log.wandb", "wandb") from error
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(run_dir),
            config=settings,
        )

    def write(self, step: int, row: dict[str, float]) -> None:
        self._run.log(row, step=step)

    def close(self) -> None:
        self._run.finish()


def _missing(field: str, package: str) -> ConfigError:
    return ConfigError(f"{field} needs {package}: install it with `pip install 'slm[track]'`, or leave {field} unset")


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"


def _json_value(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
