"""Which parameters compression is about: the matrices that layers multiply by."""

import re
from typing import Any

from slm.errors import ConfigError
from slm.models.paths import flat

INSIDE = ("first", "blocks", "tail")
"""Groups of layers in the parameter tree, whose leaves are stacked: (layers, in, out)."""
CONVOLUTIONS = re.compile(r".*conv.*/kernel")
"""Filters of a few taps for each channel: no matrices, though they are called kernel."""


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
