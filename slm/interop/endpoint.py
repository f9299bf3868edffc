"""Closed models as teachers: text, and top log-probabilities where given, from any OpenAI-compatible endpoint.

    teacher = Endpoint("https://api.openai.com/v1", "gpt-4o-mini", cache="teacher.jsonl")
    replies = teacher.chat([[{"role": "user", "content": "Why is the sky blue?"}]], max_tokens=200, top_logprobs=5)

Every reply is written to the cache file as it comes, and what is there is not asked for again: an interrupted run goes
on where it stopped. The key comes from an environment variable and goes nowhere but into the request's header.
"""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slm.errors import ConfigError, DataError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT = 120.0
LARGEST_REPLY = 64 * 2**20


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    finish: str
    """Why it ended: `stop`, `length`, ..."""
    top_logprobs: tuple[dict[str, float], ...] | None
    """For each token of the answer its likeliest tokens and their natural log-probabilities; None if not given."""


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible address. Safe to use from several threads."""

    url: str
    """Base address, such as https://api.openai.com/v1."""
    model: str
    cache: str | Path
    """JSONL file of replies, by a hash of model and request."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset for a server that needs none."""
    requests_per_minute: float = 60.0
    workers: int = 4
    """Requests under way at once."""
    retries: int = 6
    """Tries after the first, with growing pauses, where the server is busy or cannot be reached."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    first_pause: float = 1.0
    """Seconds before the first retry; doubled for each next one."""
    _known: dict[str, dict] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _next_start: float = field(default=0.0, repr=False)

    def __post_init__(self):
        """Raises ConfigError for an address that would send the key in the clear, DataError for an unreadable cache."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ConfigError(
                f"url = {self.url!r}: give an address such as https://api.openai.com/v1, without a password"
            )
        if parts.scheme == "http" and parts.hostname not in LOOPBACK and os.environ.get(self.key_variable):
            raise ConfigError(f"url = {self.url!r} would send the key of {self.key_variable} in the clear: use https")
        if self.requests_per_minute <= 0 or self.workers < 1 or self.retries < 0:
            raise ConfigError("requests_per_minute must be above 0, workers at least 1, retries at least 0")
        self.cache = Path(self.cache)
        self._known = _read_cache(self.cache)

    def chat(self, conversations: Sequence[list[dict]], **settings: Any) -> list[Reply]:
        """The answer to each conversation, a list of {"role", "content"}.

        Args:
          conversations: asked in parallel, answered in order.
          settings: max_tokens, temperature, top_p, seed, stop, and whatever else the endpoint takes; top_logprobs=n
            asks for the n likeliest tokens at each place.

        Raises DataError when the server refuses a request, or cannot be reached after all retries; what came until
        then is in the cache.
        """
        if settings.get("top_logprobs"):
            settings = settings | {"logprobs": True}
        bodies = [{"model": self.model, "messages": messages} | settings for messages in conversations]
        return [_reply(answer) for answer in self._all("/chat/completions", bodies)]

    def _all(self, path: str, bodies: list[dict]) -> list[dict]:
        with ThreadPoolExecutor(self.workers) as pool:
            waiting = [pool.submit(self._one, path, body) for body in bodies]
            try:
                return [future.result() for future in waiting]
            except BaseException:
                # What is under way ends and is kept; what has not begun does not begin.
                pool.shutdown(cancel_futures=True)
                raise

    def _one(self, path: str, body: dict) -> dict:
        text = json.dumps(body, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(f"{self.url}{path}\n{text}".encode()).hexdigest()
        if key not in self._known:
            answer = self._ask(path, text.encode())
            _reply(answer)  # what cannot be used is not kept
            line = json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n"
            with self._lock:
                self._known[key] = answer
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write(line)
        return self._known[key]

    def _ask(self, path: str, body: bytes) -> dict:
        pause = self.first_pause
        for left in range(self.retries, -1, -1):
            self._wait_for_turn()
            try:
                return self._send(path, body)
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}: {_excerpt(error)}"
                if error.code not in TRANSIENT:
                    raise DataError(self._clean(f"{self.url}{path} refused a request: {problem}")) from None
                pause = max(pause, _retry_after(error))
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:
                problem = f"no JSON came back: {error}"
            if left:
                time.sleep(min(pause, LONGEST_WAIT))
                pause *= 2
        raise DataError(self._clean(f"{self.url}{path} did not answer after {self.retries + 1} tries: {problem}"))

    def _send(self, path: str, body: bytes) -> dict:
        request = urllib.request.Request(self.url.rstrip("/") + path, body, {"Content-Type": "application/json"})
        if key := os.environ.get(self.key_variable):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with _OPENER.open(request, timeout=self.timeout) as response:
            answer = json.loads(response.read(LARGEST_REPLY))
        if not isinstance(answer, dict):
            raise ValueError("not an object")
        return answer

    def _wait_for_turn(self) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 60 / self.requests_per_minute
        time.sleep(max(0.0, start - time.monotonic()))

    def _clean(self, text: str) -> str:
        """Servers like to repeat the key in their errors."""
        key = os.environ.get(self.key_variable)
        return text.replace(key, "***") if key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the conversation, if not the key, to an address that nobody named."""

    def redirect_request(self, *arguments):
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _reply(answer: dict) -> Reply:
    try:
        choice = answer["choices"][0]
        content = (choice.get("logprobs") or {}).get("content")
        tops = None
        if content is not None:
            tops = tuple({one["token"]: float(one["logprob"]) for one in at["top_logprobs"]} for at in content)
        return Reply(choice["message"]["content"] or "", choice.get("finish_reason") or "", tops)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"the endpoint's answer has not the form of a chat completion: {str(answer)[:200]}") from error


def _read_cache(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read the cache {path}: {error.strerror or error}") from error
    known = {}
    for number, line in enumerate(lines):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            if number < len(lines) - 1:
                raise DataError(f"line {number + 1} of the cache {path} is damaged: delete it to ask again") from None
            # A run that was killed while it wrote: that answer is asked for again.
            path.write_bytes(b"".join(part + b"\n" for part in lines[:-1]))
            break
        if row is not None:
            known[row["key"]] = row["answer"]
    return known


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(500).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return float(error.headers.get("Retry-After") or 0)
    except ValueError:
        return 0.0
