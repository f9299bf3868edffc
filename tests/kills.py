"""SIGKILL a training run at random moments, half of them in the middle of a save, and see that nothing is lost.

    python tests/kills.py --kills 20

Every life of the run continues from the last complete checkpoint. At the end, the loss curve and the final state must
be those of a run that nobody touched.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
EVERY = 5


@dataclass
class Report:
    kills: int
    """Lives that ended by SIGKILL after the first checkpoint."""
    in_a_save: int
    """Of these, how many left an unfinished checkpoint behind."""
    steps: int
    """Length of the run."""
    steps_repeated: int
    """Steps done again, because they came after the last checkpoint."""
    same_as_uninterrupted: bool


def kill_until(folder: Path, kills: int, seed: int) -> Report:
    """Raises AssertionError if a life fails by itself, or a complete checkpoint disappears."""
    from tiny_run import curve, tiny

    from slm.config import override, to_json
    from slm.training.metrics import read_rows
    from slm.training.run import latest_step

    chance = random.Random(seed)
    # A constant schedule, so that the run may be as long as the kills need.
    changes = {"optim.schedule": "constant", "train.steps": 10**6, "checkpoint.every": EVERY, "train.log_every": 1}
    cfg = tiny(folder, changes | {"train.evaluate_every": 50, "optim.ema_decay": 0.9, "checkpoint.keep": 1})
    config = folder / "config.json"
    config.write_text(to_json(cfg))
    checkpoints, metrics = cfg.run_dir / "checkpoints", cfg.run_dir / "metrics.jsonl"
    in_a_save = repeated = 0
    for number in range(kills):
        before = latest_step(cfg.run_dir) or 0
        process = _start(config)
        _wait(process, lambda floor=before: (latest_step(cfg.run_dir) or 0) > floor)
        time.sleep(chance.uniform(0, 0.5))
        if number % 2:
            _wait(process, lambda: any(checkpoints.glob("*tmp*")))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        after = latest_step(cfg.run_dir)
        assert after > before, "a complete checkpoint has disappeared"
        in_a_save += any(checkpoints.glob("*tmp*"))
        done = read_rows(metrics)
        assert [row["step"] for row in done[:after]] == list(range(1, after + 1)), "rows before the checkpoint are lost"
        repeated += len(done) - after
        assert len(done) - after <= 2 * EVERY, "more is lost than the steps since the last checkpoint"
    steps = latest_step(cfg.run_dir) + EVERY
    for name in ("run", "whole"):
        _start(config, f"--train.steps={steps}", f"--name={name}").wait(timeout=600)
    whole, run = (override(cfg, {"name": name}).run_dir for name in ("whole", "run"))
    same = curve(read_rows(whole / "metrics.jsonl")) == curve(read_rows(run / "metrics.jsonl"))
    return Report(kills, in_a_save, steps, repeated, same and _same_state(whole, run, steps))


def _same_state(one: Path, other: Path, step: int) -> bool:
    import jax
    import numpy as np

    from slm.config import CheckpointConfig
    from slm.training.checkpoint import Checkpoints

    parts = []
    for run_dir in (one, other):
        checkpoints = Checkpoints(run_dir / "checkpoints", CheckpointConfig(), read_only=True)
        parts.append(checkpoints.restore_parts(("step", "params", "opt_state", "ema"), step))
        checkpoints.close()
    return jax.tree.all(jax.tree.map(np.array_equal, *parts))


def _start(config: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), str(config), *arguments], cwd=ROOT, env=environment
    )


def _wait(process: subprocess.Popen, condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"training ended by itself with {process.returncode}"
        assert time.monotonic() < end, "training does not get to its next checkpoint"
        time.sleep(0.001)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        report = kill_until(Path(folder), options.kills, options.seed)
    print(report)
    sys.exit(not report.same_as_uninterrupted)
