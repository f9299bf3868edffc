"""Ranges of a grid that leave out the largest weights: AWQ's second search (Lin et al. 2023, 2306.00978).

A few weights far out make the steps of all others in their group coarse. For each output and group the range is tried
shrunken, down to 0.55 of what `Scheme.fit` takes, and that of the least error of the layer's outputs is taken: the
steps and the limit of the authors' code (llm-awq, auto_clip_layer). Theirs counts what a group does to the output by
itself; here groups are taken in turn, each with the errors of all others as they are, so that the error of the output
never grows, and errors of two groups may cancel.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from slm.compress.gptq import by_layers
from slm.compress.schemes import Scheme
from slm.models.language_model import LanguageModel
from slm.models.quantized import QuantizedMatrix

GRID, SHRINK = 20, 0.5
"""Steps between nothing and the whole range, and the share of them that is tried (the authors' n_grid, max_shrink)."""
WHOLE = ("query", "key")
"""Matrices whose outputs are multiplied with each other: their own error says little (the authors skip them)."""


def clipped_matrices(
    model: LanguageModel,
    schemes: dict[str, Scheme],
    tokens: np.ndarray,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> dict[str, QuantizedMatrix]:
    """The matrices of `schemes` rounded to nearest in clipped ranges, measured as slm.compress.gptq.by_layers does.

    Args:
      schemes: names of matrices, (layers, in, out), to how they are quantized.
      tokens: (N, T) ids.
    """

    def choose(kernel, gram, scheme, name):
        # All of a ternary matrix may share one scale, which is a mean and no range.
        whole = name.split("/")[-2] in WHOLE or scheme.name == "ternary"
        scale, zero = scheme.fit(kernel) if whole else clipped(kernel, gram, scheme)
        return scheme.fake(kernel, scale, zero), scale, zero

    return by_layers(model, schemes, tokens, choose, progress)


@functools.partial(jax.jit, static_argnums=2)
def clipped(kernel_IxO: jax.Array, gram_IxI: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array | None]:
    """(scale, zero), as stored, (groups, O): of no output is |X dW|^2 above that of rounding in whole ranges.

    Args:
      kernel_IxO: weights.
      gram_IxI: X^T X of their inputs.
      scheme: the grid; not a ternary one.
    """
    w, gram = kernel_IxO.astype(jnp.float32), gram_IxI.astype(jnp.float32)
    size = scheme.group_size or len(w)

    def group(pull, start):
        """`pull` is X^T X dW (I, O) of what has been chosen so far."""
        rows, across = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (w, gram))
        own = jax.lax.dynamic_slice_in_dim(across, start, size, 1)
        before = scheme.fake(rows) - rows
        others = jax.lax.dynamic_slice_in_dim(pull, start, size) - own @ before

        def loss(error):
            return ((own @ error + 2 * others) * error).sum(0)

        def attempt(n, best):
            share, least = best
            tried = 1 - n / GRID
            found = loss(scheme.fake(rows, *shrunk(rows, tried, scheme)) - rows)
            return jnp.where(found < least, tried, share), jnp.minimum(found, least)

        share = jnp.ones(rows.shape[1])
        share, _ = jax.lax.fori_loop(1, int(SHRINK * GRID), attempt, (share, loss(before)))
        scale, zero = shrunk(rows, share, scheme)
        after = scheme.fake(rows, scale, zero) - rows
        return pull + across.T @ (after - before), (scale[0], None if zero is None else zero[0])

    _, grids = jax.lax.scan(group, gram @ (scheme.fake(w) - w), jnp.arange(0, len(w), size))
    return grids


def shrunk(rows: jax.Array, share, scheme: Scheme) -> tuple[jax.Array, jax.Array | None]:
    """(scale, zero) (1, O) of one group (inputs, O) for `share` (O,) or () of its largest weight."""
    if scheme.symmetric:
        scale, _ = scheme.fit(rows)
        return scheme.stored(scale * share)
    limit = jnp.abs(rows).max(0) * share
    return scheme.fit(jnp.clip(rows, -limit, limit))
