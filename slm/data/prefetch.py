"""Batches made in the background while the device computes."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


def prefetch(fn: Callable[[int], T], start_step: int, depth: int = 2) -> "Prefetcher[T]":
    """Iterates over fn(start_step), fn(start_step + 1), ... computed up to `depth` ahead in one thread.

    An exception in `fn` is raised where its value was due, after the values before it. Use it as a context manager, or
    call `close()`.
    """
    return Prefetcher(fn, start_step, depth)


class Prefetcher(Generic[T]):
    def __init__(self, fn: Callable[[int], T], start_step: int, depth: int):
        self._fn, self._step = fn, start_step
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        # A daemon, so that a program that dies without close() is not kept alive.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                item = (self._fn(self._step), None)
            except BaseException as error:
                item = (None, error)
            self._step += 1
            self._put(item)
            if item[1] is not None:
                return

    def _put(self, item: tuple[T | None, BaseException | None]) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:  # look again whether to stop
                continue

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        value, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        return value

    def close(self) -> None:
        """Stops the thread, once the batch it is making is done. Safe to repeat."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
