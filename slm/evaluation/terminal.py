"""A chat in the terminal, or by lines on stdin where there is none."""

import contextlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from slm.errors import SlmError
from slm.evaluation.chat import render, reply
from slm.models.language_model import LanguageModel

HELP = "/reset begins anew, /quit or Ctrl-D ends the chat, Ctrl-C ends the answer."
# Text of a model must not steer the terminal: escape sequences, and what else is neither text, newline nor tab.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def converse(model: LanguageModel, settings: Mapping[str, Any], system: str | None = None) -> None:
    """Reads a message a line from stdin and writes the answers to stdout as they come, until the input ends.

    Args:
      model: with a chat template.
      settings: of slm.stream; the seed counts up from answer to answer.
      system: first message of each conversation; None: what the template has.

    Raises SlmError if the model cannot chat at all; what is wrong with one message is written to stderr.
    """
    opening = [] if system is None else [{"role": "system", "content": system}]
    render(model, [*opening, {"role": "user", "content": "?"}])  # a model that cannot chat says so at once
    live = sys.stdin.isatty()
    if live:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() its editing and history)
        print(HELP)
    messages, answers = list(opening), 0
    while (line := _ask(live)) is not None:
        line = line.strip()
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(opening)
            print("a new conversation")
        elif line.startswith("/"):
            print(f"no command {line.split()[0]}; {HELP}")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(model, messages, dict(settings) | {"seed": settings["seed"] + answers})
            except SlmError as error:
                messages.pop()
                print(f"error: {error}", file=sys.stderr)
                continue
            answers += 1
            messages.append({"role": "assistant", "content": answer})


def _ask(live: bool) -> str | None:
    """The next line; None when there is none."""
    while True:
        try:
            return input("> " if live else "")
        except EOFError:
            if live:
                print()
            return None
        except KeyboardInterrupt:
            if not live:
                raise
            print(f"\n{HELP}")


def _answer(model: LanguageModel, messages: list[dict], settings: dict[str, Any]) -> str:
    """Writes the answer and returns it, as far as it came."""
    written = []
    try:
        for piece in reply(model, messages, **settings):
            written.append(piece)
            print(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    return "".join(written)
