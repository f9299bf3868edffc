"""From the device's metrics to rows: read late, checked for divergence, timed without the pauses."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax

from slm.config import TrainConfig
from slm.errors import DivergenceError
from slm.training.metrics import History, Tracker
from slm.training.precision import STUCK_AFTER
from slm.training.progress import Progress


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens `every` steps (0: only at the end) happens after `step` updates. Always does at
    the last one, whether or not `every` divides it; never at 0."""
    return step > 0 and (step == last or (every > 0 and step % every == 0))


class Recorder:
    """Takes each step's metrics as they are dispatched and makes rows of them when they are ready. Keeps `tokens`, the
    number of targets seen, and `loss`, that of the last step read.

    Args:
      cfg: cfg.train.
      max_loss: a loss above it is a divergence.
      flops_per_token: of a training step.
      peak_flops: FLOP/s of all devices together; None where unknown.
      so_far: tokens seen, and the last loss, before the first step.
      history, trackers, progress: where rows go.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        max_loss: float,
        flops_per_token: float,
        peak_flops: float | None,
        so_far: tuple[float, float],
        history: History,
        trackers: list[Tracker],
        progress: Progress,
    ):
        self._cfg, self._max_loss = cfg, max_loss
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._history, self._trackers, self._progress = history, trackers, progress
        self._pending: deque[tuple[int, dict]] = deque()
        self._clock = _Clock()
        self.tokens, self.loss = so_far
        self._timed = (self.tokens, 0.0)
        self._unwritten: dict[str, Any] = {}

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of update number `step`, which the device may not have computed yet."""
        self._pending.append((step, metrics))

    def settle(self, until: int) -> None:
        """Waits for the updates up to number `until` and writes the rows that are due.

        A row whose step is to be evaluated waits for `evaluated`. Raises DivergenceError, naming the step.
        """
        while self._pending and self._pending[0][0] <= until:
            step, metrics = self._pending.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self._check(step, metrics)
            metrics["tokens"] = self.tokens = self.tokens + metrics["tokens"]
            self.loss = metrics["loss"]
            self._progress.step(step)
            evaluates = due(step, self._cfg.evaluate_every, self._cfg.steps)
            if evaluates or due(step, self._cfg.log_every, self._cfg.steps):
                row = {"step": step} | metrics | self._speed()
                if evaluates:
                    self._unwritten = row
                else:
                    self._write(row)

    def evaluated(self, step: int, validation: dict[str, float]) -> None:
        """Writes the row of `step` with what its evaluation found."""
        row = self._unwritten or {"step": step, "tokens": self.tokens, "loss": self.loss}
        self._unwritten = {}
        self._write(row | {f"validation_{name}": value for name, value in validation.items()})

    def has_row(self, step: int) -> bool:
        """Whether the history ends with `step`."""
        return bool(self._history.rows) and self._history.rows[-1]["step"] == step

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Time inside is not training time."""
        return self._clock.pause()

    def _speed(self) -> dict[str, float | None]:
        tokens, seconds = self._timed
        now = self._clock.seconds()
        self._timed = (self.tokens, now)
        rate = (self.tokens - tokens) / max(now - seconds, 1e-9)
        mfu = {} if self._peak_flops is None else {"mfu": rate * self._flops_per_token / self._peak_flops}
        return {"tokens_per_second": rate} | mfu

    def _write(self, row: dict[str, Any]) -> None:
        self._history.append(row)
        numbers = {name: value for name, value in self._history.rows[-1].items() if isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.write(row["step"], numbers)
        self._progress.row(numbers)

    def _check(self, step: int, metrics: dict[str, float]) -> None:
        loss = metrics["loss"]
        skipped = metrics.get("skipped_in_a_row", 0)
        if skipped >= STUCK_AFTER:
            raise DivergenceError(
                f"step {step}: float16 gradients overflowed in the last {skipped:.0f} steps, and no loss scale helps"
            )
        # A skipped float16 step has not touched the parameters, so its infinite loss is not the end.
        if not math.isfinite(loss) and not skipped:
            raise DivergenceError(f"step {step}: the loss is {loss}")
        if loss > self._max_loss and not skipped:
            raise DivergenceError(f"step {step}: the loss {loss:.4g} is above train.max_loss = {self._max_loss:.4g}")


class _Clock:
    """Wall time since it was made, without pauses."""

    def __init__(self) -> None:
        self._start, self._paused = time.perf_counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start
