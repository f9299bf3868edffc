"""Traces of chosen steps, for TensorBoard, XProf or Perfetto."""

from pathlib import Path
from typing import Any, Self

import jax

from slm.config import LogConfig


class Profiler:
    """Context manager that traces the steps of log.profile into RUN/profile."""

    def __init__(self, cfg: LogConfig, run_dir: Path):
        self._first, self._last = cfg.profile or (0, 0)
        self._folder = str(run_dir / "profile")
        self._on = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._on:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, results: Any) -> None:
        if self._on and step == self._last:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._on = False
