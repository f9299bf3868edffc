"""GPTQ (Frantar et al. 2022, 2210.17323): weights rounded input by input; those to come make up for errors.

With H = X^T X of a matrix's inputs X and H^-1 = U^T U, U upper triangular, rounding the weights w_i of input i to q_i
moves the later ones by -(w_i - q_i) / U_ii U_ij (its algorithm 1). The moves of a block of inputs are applied to the
inputs after it at once. Scales of a group are fitted when the first of its inputs is reached, to weights as they then
are; with `act_order`, inputs of large squares come first, and scales are fitted before.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.compress.calibrate import gram, sweep
from slm.compress.folding import at, put
from slm.compress.schemes import Scheme
from slm.errors import DataError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.quantized import QuantizedMatrix, spread

BLOCK = 128


def gptq_matrices(
    model: LanguageModel,
    schemes: dict[str, Scheme],
    tokens: np.ndarray,
    damping: float = 0.01,
    act_order: bool = False,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> dict[str, QuantizedMatrix]:
    """The matrices of `schemes`, quantized layer by layer on what the quantized layers before say.

    Args:
      schemes: names of matrices, (layers, in, out), to how they are quantized.
      tokens: (N, T) ids. Raises DataError if no damping up to 100 times the given one makes H invertible.
    """
    where = layerwise.places(model.transformer)
    scales: dict[str, dict[int, Any]] = {name: {} for name in schemes}

    def change(number, layer, stats):
        place = where[number]
        for path, h in stats.items():
            name = f"{place.group}/{place.number}/{path}/kernel"
            # Layers that share parameters come by again and again: they are rounded the first time.
            if name not in schemes or place.index in scales[name]:
                continue
            node = at(layer, path)
            rounded, scale, zero = robust(gptq, node["kernel"], h, schemes[name], damping, act_order, name)
            scales[name][place.index] = (scale, zero)
            layer = put(layer, path, node | {"kernel": rounded})
        return layer

    params = sweep(model, tokens, gram, change, progress)
    found = {}
    for name, scheme in schemes.items():
        group, number, *path, _ = name.split("/")
        kernel = at(params[group][number], "/".join(path))["kernel"]
        stacked = [scales[name][i] for i in range(len(kernel))]
        scale = jnp.stack([s for s, _ in stacked])
        zero = None if scheme.symmetric else jnp.stack([z for _, z in stacked])
        found[name] = scheme.pack(kernel, scale, zero)
    return found


def robust(method: Callable, w, h, scheme: Scheme, damping: float, act_order: bool, name: str):
    """`method` with ten times the damping, and again, where H is too close to singular for its Cholesky factor."""
    for more in (1, 10, 100):
        found = method(w, h, scheme, damping * more, act_order)
        if np.isfinite(np.asarray(found[0])).all():
            return found
    raise DataError(f"calibration: the inputs of {name} are not finite, or H cannot be inverted: give more text")


@functools.partial(jax.jit, static_argnames=("scheme", "act_order"))
def gptq(w: jax.Array, h: jax.Array, scheme: Scheme, damping=0.01, act_order: bool = False):
    """(w on its grid (in, out) float32, scale, zero) of one matrix.

    Args:
      w: (in, out).
      h: (in, in), X^T X of its inputs (rows of X are tokens).
      damping: share of the mean of H's diagonal that is added to it.
      act_order: take inputs in descending order of H's diagonal.
    """
    w, size = w.astype(jnp.float32), len(w)
    order = jnp.argsort(-jnp.diag(h)) if act_order else jnp.arange(size)
    u = inverse_factor(h[order][:, order], damping)
    fixed = act_order or scheme.group_size is None
    scale, zero = scheme.fit(w)
    group = scheme.group_size or size
    # A block is a group, or a part of one.
    block = BLOCK if fixed else group if group <= 2 * BLOCK else max(b for b in range(1, BLOCK + 1) if group % b == 0)
    filler = -size % block
    w = jnp.pad(w[order], ((0, filler), (0, 0)))
    u = jnp.pad(u, ((0, filler), (0, filler))) + jnp.diag(jnp.arange(size + filler) >= size)
    # Scales of single inputs, in order.
    per_row = [None if a is None else jnp.broadcast_to(spread(a, size), (size, w.shape[1])) for a in (scale, zero)]
    per_row = tuple(None if a is None else jnp.pad(a[order], ((0, filler), (0, 0))) for a in per_row)

    def one_block(number, state):
        w, per_row = state
        start = number * block
        rows = jax.lax.dynamic_slice_in_dim(u, start, block)
        inner = jax.lax.dynamic_slice_in_dim(rows, start, block, 1)
        part = jax.lax.dynamic_slice_in_dim(w, start, block)
        if not fixed:
            refit = functools.partial(_refit, scheme, start, group)
            per_row = jax.lax.cond(start % group == 0, refit, lambda w, old: old, w, per_row)
        scales = tuple(None if a is None else jax.lax.dynamic_slice_in_dim(a, start, block) for a in per_row)

        def one_input(i, state):
            part, errors = state
            row = part[i]
            step = [None if a is None else a[i][None] for a in scales]
            rounded = scheme.restore(scheme.codes(row[None], *step), *step)[0]
            error = (row - rounded) / inner[i, i]
            # U is upper triangular: earlier inputs do not move.
            later = jnp.where(jnp.arange(block) > i, inner[i], 0)
            return (part - later[:, None] * error).at[i].set(rounded), errors.at[i].set(error)

        part, errors = jax.lax.fori_loop(0, block, one_input, (part, jnp.zeros_like(part)))
        after = jnp.where(jnp.arange(size + filler) >= start + block, rows, 0)
        return jax.lax.dynamic_update_slice_in_dim(w - after.T @ errors, part, start, 0), per_row

    w, per_row = jax.lax.fori_loop(0, (size + filler) // block, one_block, (w, per_row))
    if not fixed:
        scale, zero = (None if a is None else a[:size:group] for a in per_row)
    return w[jnp.argsort(order)] if act_order else w[:size], scale, zero


def _refit(scheme, start, group, w, per_row):
    """Scales of single inputs, with those of the group that begins at `start` fitted to w."""
    fitted = scheme.fit(jax.lax.dynamic_slice_in_dim(w, start, group))
    update = jax.lax.dynamic_update_slice_in_dim
    return tuple(
        None if old is None else update(old, jnp.broadcast_to(new, (group, w.shape[1])), start, 0)
        for old, new in zip(per_row, fitted)
    )


def inverse_factor(h: jax.Array, damping) -> jax.Array:
    """Upper triangular U with U^T U = (H + damping mean(diag H) I)^-1; not finite if H is not positive.

    From the Cholesky factor of H read backwards, so that no inverse is formed and factored again. Inputs that are
    always zero count as ones that nothing else depends on.
    """
    diagonal = jnp.diag(h)
    h = h + jnp.diag(jnp.where(diagonal == 0, 1, 0) + damping * diagonal.mean())
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(h)), lower=True)
    return inverse[::-1, ::-1]
