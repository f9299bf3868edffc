"""How long the arms of a study train: on equal tokens, or for equal seconds."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from slm.config import Experiment, check, flatten, override
from slm.data.cache import digest, locked
from slm.errors import ConfigError, SlmError
from slm.study.cells import code_version
from slm.study.packing import NUMBERS

TRIAL_STEPS = 40
SPEEDS = "speeds.json"


def with_tokens(cfg: Experiment, tokens: float) -> Experiment:
    """`cfg` with the fewest steps that see so many tokens."""
    if not tokens > 0:
        raise ConfigError(f"tokens = {tokens}: must be above 0")
    steps = max(1, math.ceil(tokens / (cfg.train.batch_size * cfg.data.sequence_length)))
    return check(override(cfg, {"train.steps": steps}))


def with_seconds(arms: Mapping[str, Experiment], seconds: float, folder: str | Path) -> dict[str, Experiment]:
    """Each arm with as many steps as it makes in so many seconds of training, alone on this machine, compilation,
    evaluation and saving apart.

    A short trial tells how many; FOLDER/speeds.json keeps what it found, so that a study that is called again is the
    same study. Arms that differ in NUMBERS share a trial, and so their steps. An arm that diverges in its trial, or
    finds no memory, gets as many steps as the trial has, to do so as a row of the study.

    Raises ConfigError for an arm that cannot be trained, naming it; KeyboardInterrupt when a trial is told to stop.
    """
    if not seconds > 0:
        raise ConfigError(f"seconds = {seconds}: must be above 0")
    file = Path(folder) / SPEEDS
    file.parent.mkdir(parents=True, exist_ok=True)
    keys = {name: _key(cfg) for name, cfg in arms.items()}
    with locked(file):
        known = json.loads(file.read_text()) if file.exists() else {}
        for name, cfg in arms.items():
            if (key := keys[name]) not in known:
                try:
                    known[key] = steps_per_second(cfg)
                except ConfigError as error:
                    raise ConfigError(f"arm '{name}': {error}") from error
                except (SlmError, MemoryError, jax.errors.JaxRuntimeError):
                    continue
                partial = file.with_suffix(".tmp")
                partial.write_text(json.dumps(known, indent=1) + "\n")
                os.replace(partial, file)
    steps = {key: max(1, round(seconds * speed)) for key, speed in known.items()}
    return {
        name: check(override(cfg, {"train.steps": steps.get(keys[name], TRIAL_STEPS)})) for name, cfg in arms.items()
    }


def steps_per_second(cfg: Experiment) -> float:
    """Median speed of a short run, which leaves nothing behind. Raises ConfigError where there is none to measure,
    KeyboardInterrupt if the run is told to stop."""
    from slm.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        trial = override(cfg, {
            "name": "trial", "dir": folder, "train.steps": TRIAL_STEPS, "train.log_every": 5, "train.evaluate_every": 0,
            "train.evaluate_sequences": 1, "checkpoint.every": 0, "log.console": False,
        })  # fmt: skip
        run = train(check(trial))
    if not run.finished:
        raise KeyboardInterrupt
    rows = run.history
    # The first row has the host's start in it.
    speeds = sorted(row["tokens_per_second"] for row in rows[1:] if row.get("tokens_per_second"))
    if not speeds:
        raise ConfigError("a trial run told no speed")
    # Speeds count the targets that are scored, of which a synthetic task has few.
    return speeds[len(speeds) // 2] * rows[-1]["step"] / rows[-1]["tokens"]


def _key(cfg: Experiment) -> str:
    """Of what a step's time depends on."""
    free = ("name", "dir", "seed", "log.", "checkpoint.", "data.cache", "train.steps", "train.evaluate_")
    decides = [(path, value) for path, value in flatten(cfg).items() if not (path.startswith(free) or path in NUMBERS)]
    return digest(sorted(decides), code_version(), jax.devices()[0].device_kind, jax.device_count())
