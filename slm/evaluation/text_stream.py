"""From token ids, as they come, to text: whole characters only, and nothing from a stop string on."""

from collections.abc import Iterable, Sequence
from typing import Any

from slm.errors import ConfigError

_BROKEN = "\ufffd"


class TextStream:
    """The text of one continuation while it grows.

    All that `push` and `close` return, joined, is the decoded text up to the first stop string, whatever the pieces:
    that stop string counts as first which is complete first.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.stopped = False
        """Whether a stop string has come; nothing more is returned."""
        self._tokenizer, self._stop = tokenizer, stop
        # Decoding starts anew at an old border between characters, so that long texts cost no more than short ones; not
        # at the last one, because some tokenizers drop the space before the first token.
        self._ids: list[int] = []
        self._start = self._border = 0
        self._sent = 0  # characters of the text from _start on that have been passed on
        self._held = ""  # the beginning, perhaps, of a stop string

    def push(self, ids: Iterable[int]) -> str:
        """The text that these further ids complete."""
        self._ids.extend(int(i) for i in ids)
        return self._take(final=False)

    def close(self) -> str:
        """What was held back, when no ids follow: unfinished characters become U+FFFD."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._ids[self._start :])
        whole = len(text) if final else len(text.rstrip(_BROKEN))
        self._held += text[self._sent : whole]
        self._sent = max(self._sent, whole)
        if whole == len(text) and self._border < len(self._ids):
            after = self._tokenizer.decode(self._ids[self._border :])
            if after:
                self._start, self._border, self._sent = self._border, len(self._ids), len(after)
        return self._before_stop(final)

    def _before_stop(self, final: bool) -> str:
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One or several stop strings as a tuple. Raises ConfigError for what is no text, or empty."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for one in stops:
        if not isinstance(one, str) or not one:
            raise ConfigError(f"stop = {stop!r}: must be texts that are not empty")
    return stops
