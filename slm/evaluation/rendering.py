"""Chat templates, rendered as transformers renders them, in a process of their own.

A template is a program that came with somebody's weights. Jinja's sandbox keeps it from Python's internals, but not
from looping for ever or from filling the memory; so it runs in a child that has little memory, none of our environment,
and is killed when it takes too long. The child lives as long as its `Renderer` and renders in a millisecond or two.

`python -m slm.evaluation.rendering` is the child: it reads a JSON object a line and answers with one.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

from slm.errors import DataError

SECONDS = 10.0
"""Longest rendering, the start of the child included."""
CHARACTERS = 4 * 2**20
"""Longest text that a template may give."""
MEMORY = 512 * 2**20
"""Bytes of address space of the child."""


class Renderer:
    """One template. Calls may come from any thread; they take turns."""

    def __init__(self, template: str):
        self._template = template
        self._child: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def __call__(self, variables: dict[str, Any]) -> str:
        """The text of the template with these variables, which must be JSON.

        Raises DataError if the template is not Jinja, raises, breaks out of the sandbox, or takes too long or too much.
        """
        try:
            request = json.dumps(variables)
        except (TypeError, ValueError) as error:
            raise DataError(f"messages must consist of what JSON has: {error}") from error
        with self._lock:
            answer = self._ask(request)
        if "error" in answer:
            raise DataError(f"the model's chat template says: {answer['error']}")
        return answer["text"]

    def _ask(self, request: str) -> dict:
        child = self._child
        if child is None or child.poll() is not None:
            child = self._child = _start(self._template)
            weakref.finalize(self, _end, child)
        late = threading.Timer(SECONDS, child.kill)
        late.start()
        try:
            child.stdin.write(request + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except OSError:
            line = ""
        finally:
            late.cancel()
        if not line.endswith("\n"):
            _end(child)
            self._child = None
            raise DataError(
                f"the model's chat template took more than {SECONDS:g} seconds or {MEMORY >> 20} MiB: it loops, or it "
                "is hostile; repair the template in the model's folder"
            )
        return json.loads(line)


def _start(template: str) -> subprocess.Popen:
    # The module path and nothing else: no secret of ours is in the child's reach.
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"}
    environment |= {name: os.environ[name] for name in ("SYSTEMROOT", "TZ") if name in os.environ}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "slm.evaluation.rendering"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        encoding="utf-8",
    )
    with contextlib.suppress(OSError):  # seen when it does not answer
        child.stdin.write(json.dumps(template) + "\n")
        child.stdin.flush()
    return child


def _end(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            pipe.close()


def environment():
    """The Jinja environment in which transformers 5 renders chat templates."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant says, for masks of training losses; here it only shows it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        from datetime import datetime

        return datetime.now().strftime(form)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def _serve() -> None:
    """The child's life: a template on the first line, then requests until the parent is gone."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # no such limits on this system
        pass
    source, template = json.loads(sys.stdin.readline()), None
    for line in sys.stdin:
        try:
            template = template or environment().from_string(source)
            text = template.render(**json.loads(line))
            answer = {"text": text}
            if len(text) > CHARACTERS:
                answer = {"error": f"{len(text):,} characters, more than {CHARACTERS:,}"}
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY >> 20} MiB of memory"}
        except RecursionError:
            answer = {"error": "it calls itself without end"}
        except Exception as error:  # whatever a foreign program may raise
            answer = {"error": f"{' '.join(str(error)[:500].split()) or 'no reason given'} ({type(error).__name__})"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
