"""Which parameters compression is about: the matrices that layers multiply by."""

import re
from typing import Any

from slm.errors import ConfigError
from slm.training.transforms import flat

INSIDE = ("first", "blocks", "tail")
"""Groups of layers in the parameter tree, whose leaves are stacked: (layers, in, out)."""
CONVOLUTIONS = re.compile(r".*conv.*/kernel")
"""Filters of a few taps for each channel: no matrices, though they are called kernel."""


APART = ("key_up", "value_up", "conv", "forget")
"""Parts of names of matrices that layers do more with than multiply by them, or in higher precision: left alone."""


def quantizable(params: Any, skip: tuple[str, ...] = (), field: str = "skip") -> list[str]:
    """Those of `matrices` that layers only multiply by."""
    return [name for name in matrices(params, skip, field) if not any(part in name.split("/")[-2] for part in APART)]


def matrices(params: Any, skip: tuple[str, ...] = (), field: str = "skip") -> list[str]:
    """Names of the matrices inside layers, without those that a pattern of `skip` matches whole (re.fullmatch).

    Raises ConfigError, naming `field`, for a pattern that matches none, or if nothing is left.
    """
    found = [
        name
        for name, leaf in flat(params).items()
        if name.split("/")[0] in INSIDE
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
