"""Two real processes that found each other through jax.distributed: they agree on when to stop, and resume exactly."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import curve, tiny

from slm.config import to_json
from slm.training.metrics import read_rows
from slm.training.run import latest_step, load

ROOT = Path(__file__).parent.parent

PROGRAM = """
import sys
from slm.config import load_config, override
config, name, port, number, stop = sys.argv[1:]
import pytest
from tiny_run import stop_at
if int(stop):
    stop_at(pytest.MonkeyPatch(), int(stop))
from slm.training.loop import train
join = {"mesh.coordinator": "127.0.0.1:" + port, "mesh.processes": 2, "mesh.process_id": int(number)}
run = train(override(load_config(config), {"name": name} | join))
import jax
assert jax.process_count() == 2
assert len(jax.devices()) == 4
print("finished" if run.finished else "stopped", run.history[-1]["step"], flush=True)
jax.distributed.shutdown()
"""


def launch(config, name, stops=(0, 0)):
    """Runs both processes to their end; `stops`: the step at which each receives SIGTERM, 0 for never."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(config), name, str(port), str(number), str(stop)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, stop in enumerate(stops)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, outputs):
        assert process.returncode == 0, err[-3000:]
    return [out.splitlines()[-1] for out, _ in outputs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(config, what an uninterrupted run printed, what a stopped one printed, what its continuation printed)."""
    folder = tmp_path_factory.mktemp("processes")
    cfg = tiny(
        folder,
        {
            "train.accumulation": 2,
            "train.precision": "bfloat16",
            "optim.ema_decay": 0.9,
            "train.batch_size": 8,
            "train.log_every": 2,
            "mesh.fsdp": 2,
        },
    )
    config = folder / "config.json"
    config.write_text(to_json(cfg))
    whole = launch(config, "whole")
    # Only one process is told, and at a step where they do not ask each other.
    stopped = launch(config, "run", stops=(0, 5))
    saved = latest_step(cfg.run_dir)
    return cfg, whole, stopped, saved, launch(config, "run")


def test_all_processes_stop_at_the_same_step_and_save_it(runs):
    _, whole, stopped, saved, _ = runs
    assert whole == ["finished 8"] * 2
    assert stopped == ["stopped 6"] * 2
    assert saved == 6


def test_stopping_and_resuming_changes_nothing(runs):
    cfg, _, _, _, last = runs
    assert last == ["finished 8"] * 2
    rows, whole = (read_rows(Path(cfg.dir) / name / "metrics.jsonl") for name in ("run", "whole"))
    assert [row["step"] for row in rows] == [2, 4, 6, 8]  # one process writes
    assert curve(rows) == curve(whole)
    models = [load(Path(cfg.dir) / name) for name in ("run", "whole")]
    assert jax.tree.all(jax.tree.map(np.array_equal, *(model.params for model in models)))
