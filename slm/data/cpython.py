"""The text that every machine with Python has: the language's documentation topics and its standard library.

`pydoc_data.topics` (what `help("for")` prints: about 80 topics, half a megabyte of prose) and the .py files of the
standard library without tests (about 700 files, 11 MB). Licence: Python Software Foundation License.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from slm.data.cache import digest
from slm.data.files import read_text
from slm.data.sources import Source
from slm.errors import DataError

# Tests dwarf the library; packages that happen to be installed are not part of it.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def cpython_source() -> Source:
    """One document a help topic, then one a library module. Raises DataError on a Python without its library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = _modules(root)
    if not modules:
        raise DataError(
            f"cpython: no library sources in {root} (a stripped Python): name a text file or folder instead"
        )
    sizes = [(str(path.relative_to(root)), path.stat().st_size) for path in modules]

    def read() -> Iterator[str]:
        for _, text in cpython_documents():
            yield text

    return Source("cpython", digest("cpython", sys.version, sizes), read)


def cpython_documents() -> Iterator[tuple[str, str]]:
    """Pairs of name and text, in a fixed order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("cpython: pydoc_data.topics is missing from this Python: name a text file instead") from error
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _modules(root):
        yield str(path.relative_to(root)), read_text(path)


def _modules(root: Path) -> list[Path]:
    modules = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        modules += [Path(folder, name) for name in names if name.endswith(".py")]

    def wanted(path: Path) -> bool:
        # topics.py is the topics once more, escaped; _sysconfigdata describes the machine that built this Python.
        return path != root / "pydoc_data" / "topics.py" and not path.name.startswith("_sysconfigdata")

    return sorted(filter(wanted, modules))
