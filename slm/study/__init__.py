"""Studies of what the other rooms can do: they import everything, and nothing imports them.

    runs = slm.study.ablate(base, slm.study.grid({"model.attention": ["softmax", "gla"]}), seeds=3, tokens=5e6)
    runs.table("bits_per_byte", "params")       # means, paired differences, corrected p values
    runs.plot("bits_per_byte"), runs.best("bits_per_byte"), runs.report("study.html")

Names are imported when first used.
"""

import importlib

# No module is called like a name in it: the package's attribute would be the one or the other, by what came first.
_HOME = {
    "Study": "slm.study.study",
    "ablate": "slm.study.study",
    "attention_map": "slm.study.inside",
    "influence": "slm.study.inside",
    "effective_context": "slm.study.inside",
    "norms": "slm.study.inside",
    "overview": "slm.study.inside",
    "browse": "slm.study.inside",
    "draw_map": "slm.study.inside",
    "compare_runs": "slm.study.comparing",
    "Arm": "slm.study.grids",
    "Grid": "slm.study.grids",
    "arms": "slm.study.grids",
    "chain": "slm.study.grids",
    "configs": "slm.study.grids",
    "grid": "slm.study.grids",
    "paired": "slm.study.grids",
    "when": "slm.study.grids",
    "Match": "slm.study.matching",
    "match": "slm.study.matching",
    "matched": "slm.study.matching",
    "Difference": "slm.study.statistics",
    "holm": "slm.study.statistics",
    "minimum_detectable": "slm.study.statistics",
    "paired_difference": "slm.study.statistics",
    "seeds_needed": "slm.study.statistics",
    "verdict": "slm.study.statistics",
    "welch": "slm.study.statistics",
    "Search": "slm.study.searching",
    "search": "slm.study.searching",
    "sensitivity": "slm.study.learning_rate",
    "basins": "slm.study.tuning",
    "transfer": "slm.study.tuning",
    "tune": "slm.study.tuning",
    "fit_scaling_law": "slm.study.scaling",
    "Table": "slm.study.table",
    "make_table": "slm.study.table",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'slm.study' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
