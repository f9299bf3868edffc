"""Studies of what the other rooms can do: they import everything, and nothing imports them.

runs = slm.study.ablate(base, slm.study.grid({"model.attention": ["softmax", "gla"]}), seeds=3, tokens=5e6)
runs.table("bits_per_byte", "params"), runs.plot("bits_per_byte"), runs.best(), runs.report("study.html")
"""

import importlib

_HOME = {
    "ablate": "study", "Study": "study",
    "grid": "grids", "paired": "grids", "arms": "grids", "chain": "grids", "when": "grids", "Arm": "grids", "Grid": "grids",
    "configs": "grids", "matched": "matching", "match": "matching",
    "make_table": "table", "Table": "table",
    "minimum_detectable": "statistics", "seeds_needed": "statistics", "holm": "statistics", "welch": "statistics",
}  # fmt: skip
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'slm.study' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(f"slm.study.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
