"""Which parameters compression is about: the matrices that layers multiply by."""

import re
from typing import Any

import jax

from slm.errors import ConfigError

INSIDE = ("first", "blocks", "tail")
"""Groups of layers in the parameter tree, whose leaves are stacked: (layers, in, out)."""
CONVOLUTIONS = re.compile(r".*conv.*/kernel")
"""Filters of a few taps for each channel: no matrices, though they are called kernel."""


def names(path: tuple) -> str:
    """ "/"-joined name of a parameter, as slm.training.rules has it: `blocks/0/mixer/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matrices(params: Any, skip: tuple[str, ...] = (), field: str = "skip") -> list[str]:
    """Names of the matrices inside layers, without those that a pattern of `skip` matches whole (re.fullmatch).

    Raises ConfigError, naming `field`, for a pattern that matches none, or if nothing is left.
    """
    found = [
        name
        for path, leaf in jax.tree.leaves_with_path(params)
        if (name := names(path)).split("/")[0] in INSIDE
        and name.endswith("/kernel")
        and leaf.ndim == 3
        and not CONVOLUTIONS.fullmatch(name)
    ]
    for pattern in skip:
        if not any(re.fullmatch(pattern, name) for name in found):
            raise ConfigError(
                f"{field} = {pattern!r} matches no matrix; there are, for example: {', '.join(found[:4])}"
            )
    kept = [name for name in found if not any(re.fullmatch(pattern, name) for pattern in skip)]
    if not kept:
        raise ConfigError(f"{field} leaves no matrix: name fewer")
    return kept
