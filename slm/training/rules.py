"""Decisions by parameter name: every parameter has exactly one rule in each rule set, or training does not start.

A rule set is a tuple of (pattern, value); a pattern must match the whole "/"-joined path of a parameter
(`re.fullmatch`). Names decide, never shapes: layers are stacked on a leading axis, so the number of dimensions says
nothing. ("Muon where ndim == 2" would pick the embedding and the stacked norm scales, and none of the matrices.)
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from slm.errors import ConfigError

Rules = tuple[tuple[str, Any], ...]

# A new kind of parameter that is not a matrix (a decay rate, a gate's offset, ...) gets its leaf name here, once.
# Matrices need nothing: they are called `kernel`.
_VECTORS = r"(.*/)?(scale|bias|decay|position|state|sink|mix|bonus|removal|replacement|skip|map|mixture|token_type)"
_INSIDE = r"(first|blocks|tail)/\d+"
# Beside the layers: a head's dense layer and classifier, the projection of narrow embeddings.
_BESIDE = r"(head|embed)/\w+"
# Small matrices whose outputs all heads read: split over heads they would have to be gathered.
_SHARED = r"index_\w+|latent|query_latent|key_rope|\w+_down|low|\w+_mix|mix_low|compress_\w+/\w+"

DECAY: Rules = (
    (r"(.*/)?kernel", True),
    # Norms and biases as in GPT-2 and Llama. Decaying the embedding makes its rows small and early gradients large
    # (Takase et al. 2023; OLMo 2, 2025, section 3.3), and rows of rare tokens would see more decay than gradient.
    (rf"{_VECTORS}|(.*/)?embedding", False),
)
"""Does weight decay apply?"""

MUON: Rules = (
    # Hidden matrices only (Jordan et al. 2024). A convolution's kernel is a stack of short filters, not one matrix.
    (rf"{_INSIDE}/(?!.*conv/)(.*/)?kernel", "muon"),
    (rf"{_VECTORS}|(.*/)?embedding|.*conv/kernel|head/kernel|{_BESIDE}/kernel", "adamw"),
)
"""Which half of the Muon optimizer serves the parameter?"""

SHARDING: Rules = (
    # Column-parallel (Megatron-LM, Shoeybi et al. 2019): outputs, hence heads and feed-forward columns, over `tensor`.
    (rf"{_INSIDE}/(?!.*conv/|(.*/)?({_SHARED}|out|down)/)(.*/)?kernel|head/kernel", P("fsdp", "tensor")),
    # Row-parallel: inputs over `tensor`. The embedding is read as (V, D) and, when tied, used as the transpose of the
    # output projection: vocabulary over `tensor`, so that logits are split by vocabulary and not summed over devices.
    (rf"{_INSIDE}/(?!.*compress_)(.*/)?(out|down)/kernel|(.*/)?embedding", P("tensor", "fsdp")),
    (rf"{_VECTORS}|.*conv/kernel|.*/({_SHARED})/kernel|{_BESIDE}/kernel", P()),
)
"""Mesh axes of the last dimensions (see slm.training.mesh); the leading stack axis is never sharded."""


def paths(tree: Any) -> list[str]:
    """ "/"-joined name of every leaf, in the order of jax.tree.leaves: `blocks/0/mixer/query/kernel`."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


def assign(rules: Rules, params: Any) -> Any:
    """Tree like `params` (arrays or ShapeDtypeStructs) that holds the value of each parameter's rule.

    Raises:
      ConfigError: a parameter matches no rule or several, or a rule matches no parameter; names them.
    """
    names = paths(params)
    matches = {name: [i for i, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, name)] for name in names}
    for name, found in matches.items():
        if len(found) != 1:
            listed = ", ".join(f"'{rules[i][0]}'" for i in (found or range(len(rules))))
            problem = f"{len(found)} rules, which contradict each other" if found else "none of the rules"
            raise ConfigError(f"parameter '{name}' matches {problem}: {listed}; it must match exactly one")
    used = {found[0] for found in matches.values()}
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise ConfigError(f"rule '{pattern}' matches no parameter; there are, for example: {', '.join(names[:5])}")
    values = [rules[matches[name][0]][1] for name in names]
    return jax.tree.unflatten(jax.tree.structure(params), values)


class Row(NamedTuple):
    """One line of the parameter table."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    values: dict[str, Any]


def table(params: Any, columns: dict[str, Any]) -> list[Row]:
    """The table printed at start: one row a parameter, with its value in each tree of `columns` (trees like `params`).

    Shardings are shown as their PartitionSpec.
    """
    leaves = [jax.tree.leaves(tree) for tree in columns.values()]
    rows = []
    for name, leaf, *values in zip(paths(params), jax.tree.leaves(params), *leaves, strict=True):
        shown = [getattr(value, "spec", value) for value in values]
        rows.append(Row(name, leaf.shape, str(leaf.dtype), math.prod(leaf.shape), dict(zip(columns, shown))))
    return rows
