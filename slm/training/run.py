"""Run folders: what a run is called, what is in it, and whether a config may continue it."""

import contextlib
import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from slm.config import Experiment, check, flatten, from_json, longest_sequence, override, to_json
from slm.errors import CheckpointError, ConfigError, SlmError
from slm.models.counts import abstract_parameters
from slm.models.language_model import LanguageModel
from slm.training.metrics import read_rows
from slm.training.optimizers import evaluation_params

CONFIG, METRICS, CHECKPOINTS, TOKENIZER = "config.json", "metrics.jsonl", "checkpoints", "tokenizer.json"

FREE = (
    "name", "dir", "log.", "checkpoint.", "mesh.",
    "data.cache", "data.tfds_dir", "data.download",
    "model.scan", "model.remat", "model.mixer.implementation", "model.mixer.chunk",
    "train.steps", "train.accumulation", "train.loss_chunk", "train.max_loss", "train.log_every",
    "train.evaluate_every", "train.evaluate_sequences", "train.overwrite",
)  # fmt: skip
"""Fields, and sections, in which a run and its continuation may differ: how, how long and where it runs, not what it
learns. (Another train.steps stretches the schedules that decay until the end.)"""

FILLED_IN = {"model.vocab_size": 0, "model.max_length": None}
"""Fields that a run's config.json holds filled in; these values say that the run may choose."""


@dataclass(frozen=True)
class Run:
    """What `slm.train` returns."""

    dir: Path
    """The run folder."""
    history: list[dict]
    """The rows of metrics.jsonl: `step`, `tokens`, `loss` ... and, where evaluated, `validation_loss` ..."""
    finished: bool
    """False: stopped by a signal; training again with the same config resumes."""

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model of the latest checkpoint, loaded when first asked for. Raises CheckpointError."""
        return load(self.dir)


def load(run_dir: str | Path, checkpoint: str | int = "latest") -> LanguageModel:
    """The model of a run, its averaged weights (EMA, schedule-free) where it has them, or of a folder of slm.save.

    Args:
      run_dir: the folder.
      checkpoint: of a run: "latest", "best" (of lowest validation loss among those kept), or a step's number.

    Raises CheckpointError if there is no such run, no such checkpoint in it, or a damaged one.
    """
    from slm.data.tokenizers import Tokenizer
    from slm.interop.saved import is_saved, load_saved
    from slm.interop.starting import kept_origin

    run_dir = Path(run_dir)
    if is_saved(run_dir):
        if checkpoint != "latest":
            raise CheckpointError(f"{run_dir} is a saved model and has no checkpoint {checkpoint}: leave it out")
        return load_saved(run_dir)
    cfg = stored_config(run_dir)
    if cfg is None:
        near = f"; runs there: {', '.join(found)}" if (found := run_names(run_dir.parent)) else ""
        raise CheckpointError(f"{run_dir} is not a run: it has no {CONFIG}{near}")
    tokenizer_file = run_dir / TOKENIZER
    if not tokenizer_file.is_file():
        raise CheckpointError(f"{run_dir} has no {TOKENIZER}: copy it back, or train the run again")
    cfg, params = _shipped(run_dir, cfg, checkpoint)
    params = jax.tree.map(jnp.asarray, params)
    return LanguageModel(params, cfg, Tokenizer.load(tokenizer_file), origin=kept_origin(run_dir))


def data_fingerprint(run_dir: str | Path, cfg: Experiment) -> str:
    """Fingerprint of the data that the run was trained on. Raises CheckpointError as `load` does."""
    from slm.training.checkpoint import Checkpoints

    with contextlib.closing(Checkpoints(Path(run_dir) / CHECKPOINTS, cfg.checkpoint, read_only=True)) as checkpoints:
        return checkpoints.read_meta()["data"]


def _shipped(run_dir: Path, cfg: Experiment, which: str | int) -> tuple[Experiment, Any]:
    """(config, parameters) of the model that a run ships."""
    from slm.training.checkpoint import Checkpoints, compare

    checkpoints = Checkpoints(run_dir / CHECKPOINTS, cfg.checkpoint, read_only=True)
    try:
        step = checkpoints.find(which)
        schedule_free = cfg.optim.name == "schedule_free_adamw"
        techniques = cfg.prune.on or cfg.quantize.on or cfg.shrink.learned
        name = "params" if cfg.optim.ema_decay is None else "ema"
        further = ("opt_state",) * schedule_free + ("extra",) * techniques
        parts = checkpoints.restore_parts((name, "step", *further), step)
        params = parts[name]
        compare(params, abstract_parameters(cfg.model), str(checkpoints.folder))
        if schedule_free:  # whose average is made of two trees
            params = evaluation_params(cfg.optim, SimpleNamespace(**parts["opt_state"]), params)
        if not techniques:
            return cfg, params
        from slm.compress.techniques import shipped

        return shipped(cfg, params, parts["extra"], parts["step"])
    finally:
        checkpoints.close()


def run_names(folder: Path) -> list[str]:
    """Names of the runs in a folder."""
    return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))


def stored_config(run_dir: Path) -> Experiment | None:
    """The config of an existing run; None if there is no such run. Raises CheckpointError if it is damaged."""
    try:
        return from_json((run_dir / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ConfigError, ValueError, OSError) as error:
        raise CheckpointError(f"{run_dir / CONFIG} cannot be used: {error}") from error


def check_continues(cfg: Experiment, stored: Experiment) -> None:
    """Raises ConfigError, listing the differing fields and the ways out, if `cfg` would not continue `stored`."""
    new, old = flatten(cfg), flatten(stored)
    differing = [
        f"{path} was {old[path]!r}, now {new[path]!r}"
        for path in new
        if new[path] != old[path]
        and not path.startswith(FREE)
        and not (path in FILLED_IN and new[path] == FILLED_IN[path])
    ]
    if differing:
        raise ConfigError(
            f"{cfg.run_dir} was trained with another config: {'; '.join(differing)}. Use --name for a new run, restore "
            "these values to resume it, or --train.overwrite True to delete it and start again"
        )


def filled_in(cfg: Experiment, vocab_size: int) -> Experiment:
    """`cfg` with the fields that a run may choose set to what it has chosen, as its config.json shows them."""
    changes: dict[str, Any] = {}
    if not cfg.model.vocab_size:
        changes["model.vocab_size"] = vocab_size
    if cfg.model.position == "learned" and cfg.model.max_length is None:
        changes["model.max_length"] = longest_sequence(cfg.data)
    return check(override(cfg, changes))


def resumable(cfg: Experiment) -> bool:
    """Whether `cfg` has a run to continue.

    Raises ConfigError if its folder holds another experiment's checkpoints, CheckpointError if it does not say whose.
    """
    if cfg.train.overwrite or latest_step(cfg.run_dir) is None:
        return False
    if (stored := stored_config(cfg.run_dir)) is None:
        raise CheckpointError(
            f"{cfg.run_dir} has checkpoints but no {CONFIG}, so it cannot be told whether this would continue them: "
            f"copy {CONFIG} back to resume, or use --name for a new run"
        )
    check_continues(cfg, stored)
    return True


def latest_step(run_dir: Path) -> int | None:
    """The latest complete checkpoint, by folder names alone."""
    steps = [int(path.name) for path in (run_dir / CHECKPOINTS).glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def finished_run(cfg: Experiment) -> Run | None:
    """The run that `cfg` describes if it has nothing left to do. Raises ConfigError as check_continues does."""
    if not resumable(cfg) or latest_step(cfg.run_dir) < cfg.train.steps:
        return None
    rows = read_rows(cfg.run_dir / METRICS)
    # The row of the last step is written after its evaluation; it is missing if train.steps was lowered to a step where
    # a checkpoint happens to be.
    if not rows or rows[-1]["step"] < cfg.train.steps:
        return None
    return Run(cfg.run_dir, rows, finished=True)


def prepare(cfg: Experiment, tokenizer: Any, resuming: bool) -> None:
    """Creates the run folder with config.json and tokenizer.json, after deleting an old run if asked to.

    A resumed run keeps its tokenizer: whether the new one is the same is checked when its checkpoint is read.

    Raises SlmError if it cannot, and ConfigError for a folder to overwrite that is not a run.
    """
    run_dir = cfg.run_dir
    try:
        if cfg.train.overwrite and run_dir.exists():
            _delete(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resuming:
            tokenizer.save(run_dir / TOKENIZER)
        partial = run_dir / f"{CONFIG}.tmp"
        partial.write_text(to_json(cfg))
        os.replace(partial, run_dir / CONFIG)
    except OSError as error:
        raise SlmError(f"cannot write the run folder {run_dir}: {error.strerror or error}") from error


def _delete(run_dir: Path) -> None:
    if any(run_dir.iterdir()) and not (run_dir / CONFIG).is_file():
        raise ConfigError(f"train.overwrite: {run_dir} has no {CONFIG}, so it is not a run; use another --name")
    shutil.rmtree(run_dir)


def as_settings(cfg: Experiment) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(to_json(cfg))
