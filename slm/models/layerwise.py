"""A model, one layer at a time: for methods that look at a layer, change it, and go on with what it then says."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slm.models.blocks import block
from slm.models.embedding import embed
from slm.models.mixers import Layer, layers
from slm.models.transformer import Transformer
from slm.models.watch import Take, watch


@dataclass(frozen=True)
class Place:
    """Where a layer's parameters lie in the tree: params[group][number][...][index]."""

    group: str
    number: str
    index: int


def places(transformer: Transformer) -> list[Place]:
    """The place of each layer, in order of depth. Layers that share parameters share their place."""
    return [
        Place(group, str(i), 0 if transformer.cfg.shared_layers else repeat)
        for group, (pattern, repeats) in transformer.groups.items()
        for repeat in range(repeats)
        for i in range(len(pattern))
    ]


def layer_params(params: Any, place: Place) -> Any:
    """One layer's parameters, as its block takes them."""
    return jax.tree.map(lambda a: a[place.index], params[place.group][place.number])


def with_layer(params: Any, place: Place, layer: Any) -> Any:
    """`params` with one layer's parameters replaced by ones of the same shapes. Arrays of numpy change in place."""

    def put(stack, one):
        if isinstance(stack, jax.Array):
            return stack.at[place.index].set(one)
        stack[place.index] = one
        return stack

    stacked = jax.tree.map(put, params[place.group][place.number], layer)
    return params | {place.group: params[place.group] | {place.number: stacked}}


def assembled(transformer: Transformer, outer: Any, layers_: list[Any]) -> dict:
    """The tree of a model from what stands outside of layers and the parameters of each layer, in order of depth."""
    found: dict[str, Any] = {name: part for name, part in outer.items() if name not in transformer.groups}
    rows = iter(layers_)
    for group, (pattern, repeats) in transformer.groups.items():
        stacks: list[list[Any]] = [[] for _ in pattern]
        for _ in range(repeats):
            for stack in stacks:
                stack.append(next(rows))
        found[group] = {str(i): jax.tree.map(lambda *a: jnp.stack(a), *stack) for i, stack in enumerate(stacks)}
    return found


@functools.partial(jax.jit, static_argnums=0)
def enter(transformer: Transformer, params: Any, tokens_BxT) -> jax.Array:
    """The residual stream (B, T, D) before the first layer; each row is one text from its beginning."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
    return embed(transformer.cfg, params["embed"], tokens_BxT, positions, None, transformer.dtype)


def run(transformer: Transformer, number: int, layer: Any, x_BxTxD, take: Take | None = None):
    """(the stream after layer `number` with parameters `layer`, what `take` saw in it). Compiled once for all layers of
    a kind, and for each `take`: give a function that lives longer than a call."""
    return _run(transformer, layers(transformer.cfg)[number], take, number, layer, x_BxTxD)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(transformer: Transformer, layer: Layer, take, number, params, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    context = transformer.context(positions, None)
    rope = context.local_rope if layer.local else context.rope
    module = block(layer.cfg, layer.mechanism, transformer.dtype)
    with watch(take) as seen:
        x, _ = module.apply({"params": params}, x, context.replace(layer=number, rope=rope, local_rope=None), None)
    return x, seen
