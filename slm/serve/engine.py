"""Continuous batching: requests join and leave a running batch between its steps.

One thread owns the device. Each turn it drops what was cancelled or is late, gives free slots to the longest waiting,
reads one chunk of one prompt, and draws one token for every live slot; so a long prompt delays the others by a chunk,
not by its length. What a request draws depends on its own prompt, settings and seed, and not on what runs beside it.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from slm.errors import ConfigError, SlmError
from slm.evaluation.sampling import Sampling, make_sampling
from slm.evaluation.text_stream import TextStream
from slm.models.language_model import LanguageModel
from slm.serve.slots import Slots

log = logging.getLogger("slm.serve")


class Full(SlmError):
    """As many requests wait as may wait."""


class Closed(SlmError):
    """The engine is shutting down, or the device failed."""


@dataclass(frozen=True)
class Request:
    """What is to be written."""

    ids: np.ndarray
    """The prompt, (T,) int32, T >= 1."""
    max_tokens: int
    ends: tuple[int, ...] = ()
    """Ids that end the text."""
    sampling: Sampling = field(default_factory=make_sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some of what was written; the last piece of a request has a finish."""

    text: str
    tokens: int
    """Drawn so far, without the one that ended the text."""
    finish: Literal["stop", "length", "late", "failed"] | None = None
    """stop: an ending id or a stop string came. late, failed: the rest will not come."""


class Job:
    """A request under way."""

    def __init__(self, request: Request, listen: Callable[[Piece], None], deadline: float, stream: TextStream):
        self.request, self.listen, self.deadline, self.stream = request, listen, deadline, stream
        self.cancelled = False
        self.read = 0  # ids of the prompt that are in the cache
        self.tokens = 0

    def cancel(self) -> None:
        """Nobody listens any more: the slot is given away before the next step. From any thread, at any time."""
        self.cancelled = True


class Engine:
    """Runs requests from any thread until `close`.

    Args:
      model: a language model with a tokenizer.
      slots: requests that are decoded together.
      length: most tokens of a prompt and its continuation.
      queue: requests that may wait for a slot.
      timeout: seconds that a request may take, waiting included.
      chunk: tokens of a prompt that are read between two steps.
      cache_dtype: of cached keys and values; None: that of computation.

    Raises ConfigError for sizes that do not fit the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int = 4,
        length: int = 2048,
        queue: int = 32,
        timeout: float = 600.0,
        chunk: int = 128,
        cache_dtype: Any = None,
    ):
        self.length, self.queue, self.timeout = length, queue, timeout
        self._tokenizer = model.tokenizer
        self._slots = Slots(model, slots, length, chunk, cache_dtype)
        self._jobs: list[Job | None] = [None] * slots
        self._waiting: collections.deque[Job] = collections.deque()
        self._wake = threading.Condition()
        self._closing = self._broken = False
        self._thread = threading.Thread(target=self._run, name="slm-serve", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether requests are served."""
        return not (self._broken or self._closing)

    def load(self) -> tuple[int, int]:
        """(requests in slots, requests waiting)."""
        return sum(job is not None for job in self._jobs), len(self._waiting)

    def warm_up(self) -> None:
        """Compiles what serving needs, so that the first request need not wait. Raises Closed if it fails."""
        done = threading.Event()
        ask = Request(np.zeros(1, np.int32), min(2, self.length - 1), sampling=make_sampling(1.0))
        self.submit(ask, lambda piece: done.set() if piece.finish else None)
        done.wait()
        if not self.healthy:
            raise Closed("the model cannot be run here: see the log above")

    def submit(self, request: Request, listen: Callable[[Piece], None]) -> Job:
        """Queues a request; `listen` is called from the engine's thread with every piece, and must not block.

        Raises ConfigError if the request does not fit a slot, Full if too many wait, Closed after `close` or a failure.
        """
        total = len(request.ids) + request.max_tokens
        if request.max_tokens < 1 or not len(request.ids):
            raise ConfigError(f"max_tokens = {request.max_tokens}, {len(request.ids)} prompt tokens: both at least 1")
        if total > self.length:
            raise ConfigError(
                f"the prompt's {len(request.ids)} tokens and max_tokens = {request.max_tokens} exceed this server's "
                f"context of {self.length} tokens"
            )
        job = Job(request, listen, time.monotonic() + self.timeout, TextStream(self._tokenizer, request.stop))
        with self._wake:
            if not self.healthy:
                raise Closed("the server is shutting down" if self._closing else "the device failed: see the log")
            # A request that finds a free slot does not wait, whatever the queue.
            if len(self._waiting) >= self.queue + sum(one is None for one in self._jobs):
                raise Full(f"{len(self._waiting)} requests are waiting already: try again later")
            self._waiting.append(job)
            self._wake.notify()
        return job

    def close(self) -> None:
        """Ends all requests as failed, and the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._admit():
                self._read_a_chunk()
                if self._slots.live_S.any():
                    tokens_S, live_S = self._slots.step(), self._slots.live_S
                    for slot in np.flatnonzero(live_S):
                        self._take(int(slot), int(tokens_S[slot]))
        except Exception:
            log.exception("the device failed; no more requests are served")
            self._broken = True
        with self._wake:
            left = [*self._waiting, *(job for job in self._jobs if job)]
            self._waiting.clear()
            self._jobs = [None] * len(self._jobs)
        for job in left:
            _tell(job, "", "failed")

    def _admit(self) -> bool:
        """Waits for work and places it; False when it is time to end."""
        with self._wake:
            while not (self._closing or self._waiting or any(self._jobs)):
                self._wake.wait()
            if self._closing:
                return False
            now = time.monotonic()
            gone = {id(job): job for job in [*self._waiting, *self._jobs] if job and _over(job, now)}
            self._waiting = collections.deque(job for job in self._waiting if id(job) not in gone)
            for slot, job in enumerate(self._jobs):
                if job and id(job) in gone:
                    self._free(slot)
                if self._jobs[slot] is None and self._waiting:
                    self._jobs[slot] = self._waiting.popleft()
        for job in gone.values():
            if not job.cancelled:
                _tell(job, job.stream.close(), "late")
        return True

    def _read_a_chunk(self) -> None:
        reading = [
            (job.deadline, slot) for slot, job in enumerate(self._jobs) if job and job.read < len(job.request.ids)
        ]
        if not reading:
            return
        slot = min(reading)[1]  # who came first
        job = self._jobs[slot]
        ask = job.request
        token = self._slots.fill(slot, ask.ids, job.read, ask.sampling, ask.seed)
        job.read = min(job.read + self._slots.chunk, len(ask.ids))
        if token is not None:
            self._take(slot, token)

    def _take(self, slot: int, token: int) -> None:
        """Passes on what a token adds to a text, and frees the slot with the last one."""
        job, finish = self._jobs[slot], None
        if token in job.request.ends:
            text, finish = job.stream.close(), "stop"
        else:
            job.tokens += 1
            text = job.stream.push([token])
            if not job.stream.stopped and job.tokens == job.request.max_tokens:
                text += job.stream.close()
                finish = "length"
            if job.stream.stopped:
                finish = "stop"
        if finish:
            self._free(slot)
        if text or finish:
            _tell(job, text, finish)

    def _free(self, slot: int) -> None:
        self._slots.free(slot)
        self._jobs[slot] = None


def _over(job: Job, now: float) -> bool:
    return job.cancelled or now > job.deadline


def _tell(job: Job, text: str, finish: str | None) -> None:
    try:
        job.listen(Piece(text, job.tokens, finish))
    except Exception:  # whoever listened is gone; nobody else may suffer from that
        job.cancel()
