"""A hash of a mechanism that changes when it does, wherever it was written: in slm, in a file, in a notebook.

A notebook's class has no file, and its cell can be edited and run again under the same name. So its compiled code is
taken, with all that the code reads from where it was written: helpers, constants, base classes. What stands in slm
itself counts by its name here (slm.study.cells.code_version hashes those files), and so does what is installed.
"""

import dataclasses
import dis
import enum
import functools
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from slm.data.cache import digest
from slm.models.mixers import Row

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))


def fingerprint(row: Row) -> str:
    """Of its mixer and its switches. Comments and layout do not change it."""
    return digest(_described(row, {}))


def _described(thing: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    """`thing` as tuples of texts without addresses; `seen` ends circles."""

    def several(things):
        return tuple(_described(one, seen) for one in things)

    if isinstance(thing, PLAIN):
        return repr(thing)
    if isinstance(thing, tuple):
        return several(thing)
    if isinstance(thing, (set, frozenset)):
        return tuple(sorted(repr(one) for one in several(thing)))
    if isinstance(thing, enum.Enum):
        return repr(thing)
    if isinstance(thing, types.CodeType):
        return (thing.co_code, thing.co_names, thing.co_varnames, thing.co_freevars, several(thing.co_consts))
    if id(thing) in seen:
        return f"seen {seen[id(thing)][0]}"
    seen[id(thing)] = len(seen), thing  # kept, so that no other object gets its id
    if isinstance(thing, list):
        return several(thing)
    if isinstance(thing, dict):
        return several(thing.items())
    if isinstance(thing, types.ModuleType):
        file = getattr(thing, "__file__", None)
        return digest(Path(file).read_bytes()) if file and _from_here(thing.__name__) else thing.__name__
    if isinstance(thing, type):
        if not _from_here(thing.__module__):
            return f"{thing.__module__}.{thing.__qualname__}"
        # Of what Python and Flax add to a class, only the functions say what it does.
        own = [(name, one) for name, one in vars(thing).items() if not name.startswith("__") or _is_code(one)]
        return several((thing.__bases__, sorted(own, key=lambda item: item[0])))
    if isinstance(thing, (classmethod, staticmethod)):
        return several((thing.__func__,))
    if isinstance(thing, property):
        return several((thing.fget, thing.fset))
    if isinstance(thing, functools.partial):
        return several((thing.func, thing.args, thing.keywords))
    if isinstance(thing, types.FunctionType):
        inner = inspect.unwrap(thing)
        # What it was made with differs even if its code is known by name: nn.initializers.constant(1), and (2).
        given = [cell.cell_contents for cell in inner.__closure__ or () if cell != types.CellType()]
        given += [inner.__defaults__, inner.__kwdefaults__]
        if not _from_here(inner.__module__):
            return f"{inner.__module__}.{inner.__qualname__}", several(given)
        return several((inner.__code__, given, _reads(inner)))
    if dataclasses.is_dataclass(thing):
        fields = [(field.name, getattr(thing, field.name)) for field in dataclasses.fields(thing)]
        return several((type(thing), fields))
    if hasattr(thing, "dtype") and hasattr(thing, "shape"):
        array = np.asarray(thing)
        return repr((array.shape, str(array.dtype))), array.tobytes()
    if isinstance(thing, types.SimpleNamespace) or (hasattr(thing, "__dict__") and _from_here(type(thing).__module__)):
        return several((type(thing), sorted(vars(thing).items())))
    if callable(thing):  # such as jax.jit(f), or jax.custom_vjp with its two passes
        parts = sorted(getattr(thing, "__dict__", {}).items())
        return several((type(thing), [one for _, one in parts if _is_code(one)]))
    return several((type(thing),))


def _is_code(thing: Any) -> bool:
    return isinstance(thing, (types.FunctionType, classmethod, staticmethod, property))


def _reads(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Names that it and functions inside it take from its module, with what stands there now."""
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names |= {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    found = function.__globals__
    return [(name, found[name]) for name in sorted(names) if name in found]


def _from_here(module: str) -> bool:
    """Whether a module is the user's own: neither slm's, nor Python's, nor installed."""
    if module == "__main__":
        return True
    root = module.partition(".")[0]
    if root == "slm" or root in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return not {"site-packages", "dist-packages"} & set(Path(file).parts)
