"""Half-quadratic quantization (Badri & Shaji 2023): zero points for small errors of weights, without any data.

For fixed scales it looks for the zeros that minimise sum |w - restored|^p, p = 0.7 < 1, so that few weights may be far
off: an auxiliary e takes the large errors (generalised soft-thresholding), and each zero is the mean of what is left.
"""

import functools

import jax
import jax.numpy as jnp

from slm.compress.schemes import Scheme
from slm.errors import ConfigError
from slm.models.quantized import QuantizedMatrix

POWER, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20
"""The authors' (mobiusml/hqq, optimize_weights_proximal)."""


def hqq(w: jax.Array, scheme: Scheme) -> QuantizedMatrix:
    """A matrix (..., in, out) quantized. Raises ConfigError for a scheme without zero points."""
    if scheme.symmetric:
        raise ConfigError("quantize.method = hqq chooses zero points: leave symmetric out or set it False")
    scale, zero = best_zeros(jnp.asarray(w, jnp.float32), scheme)
    return scheme.pack(w, scale, zero)


@functools.partial(jax.jit, static_argnums=1)
def best_zeros(w: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """(scale, zero), as stored; in no group is the sum of |error|^0.7 above that of rounding to nearest."""
    scale, zero = scheme.fit(w)
    groups, size, axis = scale.shape[-2], w.shape[-2], w.ndim - 2

    def of_groups(a, reduce):
        return reduce(a.reshape(*a.shape[:-2], groups, size // groups, a.shape[-1]), axis + 1)

    def step(i, state):
        zero, best, least = state
        codes = scheme.codes(w, scale, zero)
        missing = w - scheme.restore(codes, scale, zero)
        strength = BETA * KAPPA**i
        size_of = jnp.abs(missing)
        shrunk = size_of - size_of ** (POWER - 1) / strength
        large = jnp.sign(missing) * jnp.where(size_of == 0, 0, jnp.maximum(shrunk, 0))
        # The mean of w - e - code x scale over a group is the zero that leaves the least square.
        new = of_groups(w - large - scheme.restore(codes, scale), jnp.mean)
        new = scheme.stored(scale, new)[1]
        rounded = scheme.restore(scheme.codes(w, scale, new), scale, new)
        error = of_groups(jnp.abs(w - rounded) ** POWER, jnp.sum)
        return new, jnp.where(error < least, new, best), jnp.minimum(error, least)

    error = of_groups(jnp.abs(w - scheme.restore(scheme.codes(w, scale, zero), scale, zero)) ** POWER, jnp.sum)
    _, best, _ = jax.lax.fori_loop(0, STEPS, step, (zero, zero, error))
    return scale, best
