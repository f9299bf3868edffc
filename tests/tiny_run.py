"""The smallest experiment that has everything, for tests of the loop; and ways to interrupt it."""

import signal

import jax

from slm.config import (
    CheckpointConfig,
    DataConfig,
    Experiment,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    override,
)
from slm.training import loop
from slm.training import mesh as meshes
from slm.training.signals import StopRequest

MAKE_MESH = meshes.make_mesh
TIMINGS = {"tokens_per_second", "mfu"}


def write_text(folder):
    """A text that has something to learn, different everywhere."""
    path = folder / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(400)))
    return path


def tiny(folder, changes=None) -> Experiment:
    """An experiment whose text, cache and runs are in `folder`."""
    path = folder / "text.txt"
    if not path.exists():
        write_text(folder)
    cfg = Experiment(
        name="run",
        dir=str(folder / "runs"),
        model=ModelConfig(layers=2, width=32, heads=2),
        data=DataConfig(source=(str(path),), validation_split="tail", sequence_length=16, cache=str(folder / "cache")),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=3),
        train=TrainConfig(steps=8, batch_size=4, log_every=2, evaluate_every=4, evaluate_sequences=8),
        checkpoint=CheckpointConfig(every=4),
        log=LogConfig(console=False),
    )
    return override(cfg, changes or {})


def use_devices(monkeypatch, count):
    """Makes the loop see only the first `count` of the test process's devices."""
    monkeypatch.setattr(meshes, "make_mesh", lambda cfg, devices=None: MAKE_MESH(cfg, devices or jax.devices()[:count]))


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Makes this process receive a signal when the loop has done `step` updates."""

    class Stop(StopRequest):
        def agreed(self, now, every):
            if now == step:
                signal.raise_signal(number)
            return super().agreed(now, every)

    monkeypatch.setattr(loop, "StopRequest", Stop)


def curve(rows):
    """Rows without the timings, which no two runs share."""
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]
