"""Transforms of parameters: what makes of the parameters that train those that the model sees.

The analogue of optax's gradient transformations: pruning masks, fake quantization and adapters are values of this type.
They stand in a fixed order, whatever the order in which they were asked for: an adapter's change must be masked, or the
merged model would be dense again; rounding must see zeros, and come last, so that what it rounds is float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm.models.paths import flat

ORDER = ("adapter", "gate", "mask", "quantize")
"""Names of transforms, in the order in which they are applied."""


class Moving(NamedTuple):
    """What an update has just made, which a transform may correct."""

    step: jax.Array
    """int32 (): steps done, this one included."""
    params: Any
    opt_state: Any
    view_grads: Any
    """Gradients with respect to the parameters that the model saw: those of pruned weights too."""
    seed: int
    """Of the run, for random choices, which are functions of it and of the step."""


class ParamTransform(NamedTuple):
    """Pure functions; see the module."""

    init: Callable[[Any], Any]
    """params -> state: what moves with training without a gradient, such as masks. Saved with the run."""
    apply: Callable[[Any, Any, Any, jax.Array], Any]
    """(params, learned, state, step) -> params: differentiable in the first two, applied once a step."""
    update: Callable[[Any, Moving], tuple[Any, Moving]] = lambda state, moving: (state, moving)
    """(state, moving) -> the same after a step: new masks, pruned weights and their moments back at zero."""
    learn: Callable[[Any], Any] = lambda params: {}
    """params -> `learned`: parameters of the transform itself, which are trained beside the model's."""
    freezes: bool = False
    """Only `learned` trains, and the model's own parameters stay as they are (adapters)."""
    draw: Callable[[Any, jax.Array], Any] = lambda state, step: state
    """(state, step) -> the state as a training step applies it, with this step's noise. Evaluation has none."""
    penalty: Callable[[Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]] | None = None
    """(learned, step) -> (what is added to the loss of a token, metrics): a constraint on `learned` alone."""
    rate: Callable[[jax.Array], jax.Array] | None = None
    """step -> learning rate of `learned` as a multiple of the run's own; None: 1."""


Transforms = dict[str, ParamTransform]
"""By name, in any order."""


def ordered(transforms: Transforms) -> list[tuple[str, ParamTransform]]:
    """Raises KeyError for a name that has no place in ORDER."""
    return sorted(transforms.items(), key=lambda item: {name: i for i, name in enumerate(ORDER)}[item[0]])


def apply(transforms: Transforms, params: Any, learned: dict, states: dict, step: jax.Array) -> Any:
    """What the model sees of `params`, float32."""
    for name, transform in ordered(transforms):
        params = transform.apply(params, learned[name], states[name], step)
    return params


def update(transforms: Transforms, states: dict, moving: Moving) -> tuple[dict, Moving]:
    """States and what moves after a step."""
    states = dict(states)
    for name, transform in ordered(transforms):
        states[name], moving = transform.update(states[name], moving)
    return states, moving


def drawn(transforms: Transforms, states: dict, step: jax.Array) -> dict:
    """States as a training step applies them."""
    return states | {name: transform.draw(states[name], step) for name, transform in ordered(transforms)}


def penalised(transforms: Transforms, learned: dict, grads: dict, step: jax.Array) -> tuple[dict, dict]:
    """Gradients of `learned` with those of the penalties, and what these report. Penalties do not come from a batch:
    add them behind what scales and clips its gradients."""
    grads, reported = dict(grads), {}
    for name, transform in ordered(transforms):
        if transform.penalty is not None:
            more, metrics = jax.grad(transform.penalty, has_aux=True)(learned[name], step)
            grads[name] = jax.tree.map(jnp.add, grads[name], more)
            reported |= metrics
    return grads, reported


def rated(transforms: Transforms, updates: dict, step: jax.Array) -> dict:
    """Updates of `learned`, made at the run's learning rate, at each transform's own."""
    own = {name: transform.rate(step) for name, transform in ordered(transforms) if transform.rate is not None}
    return updates | {name: jax.tree.map(lambda u, r=rate: u * r, updates[name]) for name, rate in own.items()}


def belonging(tree: Any, params: Any) -> list[str | None]:
    """For each leaf of `tree` (an optimizer's state, say) the name of the parameter that it follows: whose name its own
    ends with, and whose shape it has. None: of no single parameter."""
    shapes = {name: leaf.shape for name, leaf in flat(params).items()}

    def owner(name, leaf):
        parts = name.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((end for end in ends if shapes.get(end) == leaf.shape), None)

    return [owner(name, leaf) for name, leaf in flat(tree).items()]


def replaced(params: Any, leaves: dict[str, Any]) -> Any:
    """`params` with some leaves, by name, replaced."""
    return jax.tree.unflatten(jax.tree.structure(params), list((flat(params) | leaves).values()))


@jax.custom_vjp
def straight_through(value: jax.Array, shown: jax.Array) -> jax.Array:
    """`shown`, to the bit; backwards, what `value` itself would give (Bengio et al. 2013)."""
    return shown


straight_through.defvjp(lambda value, shown: (shown, None), lambda _, gradient: (gradient, None))


def where_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new`, or `old` after an overflow, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
