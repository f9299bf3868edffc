"""Parameters by name: trees of dicts as one dict with "/"-joined paths, and back."""

from collections.abc import Callable
from typing import Any

import jax


def flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves by "/"-joined name, in the order of jax.tree.leaves: `blocks/0/mixer/query/kernel`."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(leaves: dict[str, Any]) -> dict:
    """The inverse of `flat` for trees of dicts."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
