"""Layers in arrays of their own, for decoding on a CPU.

A scan over stacked layers copies each layer's weights out of the stack before it multiplies them. A decode step does
little else than read weights, and XLA:CPU does not fuse that copy: apart, the same step takes about two thirds of the
time (benchmarks/README.md). On a CPU the parts are views of the stack, and cost no memory.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from slm.models.mixers import layers
from slm.models.transformer import Transformer


def apart(transformer: Transformer, params: Any) -> tuple[Transformer, Any]:
    """The same model in as many groups of one layer as it is deep; the arguments where that does not help.

    The arrays of the result are views of `params`, and keep them alive.
    """
    if not _helps(transformer, params):
        return transformer, params
    every = layers(transformer.cfg)
    cfg = dataclasses.replace(transformer.cfg, attention=tuple(one.mechanism for one in every), scan=False)
    one_by_one = dataclasses.replace(transformer, cfg=cfg)

    def view(leaf, i):
        return jax.device_put(np.asarray(leaf)[i : i + 1], leaf.sharding, may_alias=True)

    groups = split_layers(transformer, params, view)
    return one_by_one, {name: tree for name, tree in params.items() if name not in transformer.groups} | groups


def split_layers(transformer: Transformer, tree: dict, part=lambda leaf, i: leaf[i : i + 1]) -> dict:
    """The groups of a tree of parameters or of a cache, of `transformer`, as `apart` has them.

    `part`: (stacked leaf, number of the layer in it) -> leaf of that layer alone, stacked with length 1.
    """
    found, blocks = {}, {}
    for group, (pattern, repeats) in transformer.groups.items():
        if group == "first":
            found[group] = tree[group]
            continue
        for r in range(repeats):
            for i in range(len(pattern)):
                blocks[str(len(blocks))] = jax.tree.map(lambda leaf, r=r: part(leaf, r), tree[group][str(i)])
    return found | {"blocks": blocks}


def _helps(transformer: Transformer, params: Any) -> bool:
    on_one_cpu = all(
        isinstance(leaf, jax.Array) and len(leaf.devices()) == 1 and leaf.devices().copy().pop().platform == "cpu"
        for leaf in jax.tree.leaves(params)
    )
    stacked = any(repeats > 1 for _, repeats in transformer.groups.values())
    return on_one_cpu and stacked and not transformer.cfg.shared_layers
