"""Stopping on request: Ctrl-C and SIGTERM let the current step finish, save, and leave with exit code 0.

Exit code 0, because nothing went wrong: the run is complete up to its checkpoint and the same command resumes it.
A second Ctrl-C does not wait (KeyboardInterrupt); the last complete checkpoint is intact then too.
"""

import signal
import threading
from typing import Self

import jax
import numpy as np

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager that turns signals into a flag; outside the main thread, where Python allows no handlers, it
    only carries the flag."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first signal that arrived at this process."""
        self._previous: dict = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
            if outer := self._outer(signal.SIGTERM):
                self.signal = outer.signal
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if outer := self._outer(number):
            outer._handle(number, frame)

    def _outer(self, number: int) -> "StopRequest | None":
        """The request around this one, which hears of the same signals: whoever asked a run to stop has asked all that
        was to follow it."""
        handler = getattr(self._previous.get(number), "__self__", None)
        return handler if isinstance(handler, StopRequest) else None

    def agreed(self, step: int, every: int) -> bool:
        """Whether to stop at `step`: the same answer in all processes, which therefore save the same step.

        A scheduler may signal one process only, or all at different steps. So several processes ask each other, every
        `every` steps because it costs them a wait for the device; a single one answers at once.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        if step % every:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.int32(self.signal is not None)).any())
