"""Names of a grid's arms: short, unique, made of what differs."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from slm.errors import ConfigError

BASE = "base"
"""Name of an arm that changes nothing."""


def names_of(cells: Sequence[Sequence[Any]], changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each cell. A cell is a sequence of parts with `label` (or None) and `changes`, ((field, value), ...).

    Fields that all cells set alike are left out. Where short names are not unique, each value gets its field's name and
    all of its digits. Raises ConfigError if two cells have the same name even so.
    """
    absent = object()
    paths = list(dict.fromkeys(path for one in changes for path in one))
    varying = {path for path in paths if len({one.get(path, absent) for one in changes}) > 1}
    leaves = Counter(path.rsplit(".", 1)[-1] for path in paths)
    short = {path: path.rsplit(".", 1)[-1] if leaves[path.rsplit(".", 1)[-1]] == 1 else path for path in paths}

    def name(cell, wanted, explicit: bool) -> str:
        words = []
        for part in cell:
            if part.label is not None:
                words.append(part.label)
                continue
            for path, value in part.changes:
                if path in wanted:
                    words.append(
                        f"{short[path]}={text_of(value, exact=explicit)}" if explicit else word_of(short[path], value)
                    )
        return " ".join(words)

    for explicit in (False, True):
        names = [name(cell, varying, explicit) or name(cell, set(paths), explicit) or BASE for cell in cells]
        if len(set(names)) == len(names):
            return names
    ((twice, _),) = Counter(names).most_common(1)
    raise ConfigError(f"two arms are called '{twice}': give them names of their own with arms({{name: changes}})")


def word_of(name: str, value: Any) -> str:
    """`gla` for text, which speaks for itself; else `width=128`."""
    words = value if isinstance(value, tuple) and value else (value,)
    return text_of(value) if all(isinstance(w, str) for w in words) else f"{name}={text_of(value)}"


def text_of(value: Any, exact: bool = False) -> str:
    """A value as a name has it: patterns joined by commas, numbers to four digits unless `exact`."""
    if isinstance(value, tuple):
        return ",".join(text_of(v, exact) for v in value) or "()"
    if isinstance(value, float) and not exact and math.isfinite(value):
        return f"{value:.4g}"
    return value if isinstance(value, str) else repr(value)
