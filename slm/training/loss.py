"""Losses of logits over hidden states, in chunks of time, so that (batch, time, vocab) logits never exist.

Losses are sums with their weights beside them; whoever needs a mean divides once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slm.models.transformer import softcap

OfChunk = Callable[[jax.Array, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
"""(logits (B, C, V) float32, arrays (B, C, ...), constants) -> (objective (B, C), {name: (B, C)} to sum up)."""


def token_sums(
    of_chunk: OfChunk, hidden, unembedding, weights, arrays, constants=(), *, logit_softcap=None, chunk=128
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sums over all tokens of what `of_chunk` makes of their logits.

    Under differentiation, the gradients with respect to `hidden` and `unembedding` are computed in the forward sweep,
    chunk by chunk, while the chunk's logits exist: no logits are stored and none are computed twice. Nothing else has a
    gradient.

    Args:
      of_chunk: differentiable in the logits. What it needs of traced values must come as `arrays` or `constants`.
      hidden: (B, T, D), compute dtype.
      unembedding: (D, V), compute dtype.
      weights: (B, T) float32; 0 leaves a token out.
      arrays: a tree of (B, T, ...), cut into chunks.
      constants: a tree of anything else, such as a teacher's unembedding.
      logit_softcap: c: logits become c tanh(logits / c).
      chunk: C, time steps whose logits exist at once.

    Returns:
      (objective (), {name: ()}), float32.
    """
    objective, sums = _sums(hidden, unembedding, weights, arrays, constants, of_chunk, logit_softcap, chunk)
    return objective, jax.lax.stop_gradient(sums)


def cross_entropy(hidden, unembedding, targets, weights, *, z_loss=0.0, logit_softcap=None, chunk=128):
    """Weighted sum of -log p(target) + z_loss * log(Z)^2 (PaLM, Chowdhery et al. 2022, section 5).

    See `token_sums` for when its gradients are computed.

    Args:
      hidden: (B, T, D), compute dtype.
      unembedding: (D, V), compute dtype.
      targets: (B, T) int32.
      weights: (B, T) float32; 0 leaves a target out.
      z_loss: weight of the squared log-normaliser.
      logit_softcap: c: logits become c tanh(logits / c).
      chunk: time steps whose logits exist at once.

    Returns:
      (objective (), {"nats": (), "correct": ()}), float32 sums over weighted targets; `nats` is the cross-entropy
      without the z-loss, `correct` counts targets that have the largest logit. Only the objective has a gradient.
    """

    def of_chunk(logits, targets, constants):
        objective, nats, correct = target_losses(logits, targets, z_loss)
        return objective, {"nats": nats, "correct": correct}

    return token_sums(of_chunk, hidden, unembedding, weights, targets, logit_softcap=logit_softcap, chunk=chunk)


def token_losses(hidden, unembedding, targets, *, logit_softcap=None, chunk=128):
    """Each target's own loss: (nats, correct, log_z), all (B, T) float32; log_z is the log-normaliser."""

    def body(_, part):
        hidden, targets = part
        log_z, picked, correct = _of_targets(chunk_logits(hidden, unembedding, logit_softcap), targets)
        return None, (log_z - picked, correct, log_z)

    _, losses = jax.lax.scan(body, None, split_time((hidden, targets), chunk))
    return tuple(join_time(x)[:, : targets.shape[1]] for x in losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def target_losses(logits, targets, z_loss=0.0):
    """(nats + z_loss * log(Z)^2, nats, correct), all (B, C) float32, of logits (B, C, V) and targets (B, C). Only the
    first has a gradient."""
    log_z, picked, correct = _of_targets(logits, targets)
    nats = log_z - picked
    return nats + z_loss * log_z**2, nats, correct


def _target_losses_forward(logits, targets, z_loss):
    log_z, picked, correct = _of_targets(logits, targets)
    nats = log_z - picked
    return (nats + z_loss * log_z**2, nats, correct), (logits, targets, log_z)


def _target_losses_backward(z_loss, residuals, cotangents):
    # d objective / d logits = softmax * (1 + 2 z log Z) - onehot, where autodiff would scatter.
    (logits, targets, log_z), weights = residuals, cotangents[0]
    probability = jnp.exp(logits - log_z[..., None])
    onehot = targets[..., None] == jnp.arange(logits.shape[-1])
    return probability * ((1 + 2 * z_loss * log_z) * weights)[..., None] - onehot * weights[..., None], None


target_losses.defvjp(_target_losses_forward, _target_losses_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _sums(hidden, unembedding, weights, arrays, constants, of_chunk, logit_softcap, chunk):
    def body(total, part):
        hidden, weights, arrays = part
        objective, sums = of_chunk(chunk_logits(hidden, unembedding, logit_softcap), arrays, constants)
        return _added(total, objective, sums, weights), None

    parts = split_time((hidden, weights, arrays), chunk)
    return jax.lax.scan(body, _nothing(body, parts), parts)[0]


def _sums_forward(hidden, unembedding, weights, arrays, constants, of_chunk, logit_softcap, chunk):
    def body(carry, part):
        total, d_unembedding = carry
        hidden, weights, arrays = part
        logits = chunk_logits(hidden, unembedding, logit_softcap)
        objective, pull_back, sums = jax.vjp(lambda x: of_chunk(x, arrays, constants), logits, has_aux=True)
        (d_logits,) = pull_back(weights)
        if logit_softcap is not None:
            d_logits *= 1 - (logits / logit_softcap) ** 2
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("BTV,DV->BTD", d_logits, unembedding)
        d_unembedding += jnp.einsum("BTD,BTV->DV", hidden, d_logits, preferred_element_type=jnp.float32)
        return (_added(total, objective, sums, weights), d_unembedding), d_hidden

    parts = split_time((hidden, weights, arrays), chunk)
    # The sums' names are known only to of_chunk.
    d_unembedding = jnp.zeros(unembedding.shape, jnp.float32)
    start = _nothing(lambda total, part: (body((total, d_unembedding), part)[0][0], None), parts)
    (total, d_unembedding), d_hidden = jax.lax.scan(body, (start, d_unembedding), parts)
    d_hidden = join_time(d_hidden)[:, : weights.shape[1]]
    return total, (d_hidden, d_unembedding, unembedding)


def _sums_backward(of_chunk, logit_softcap, chunk, residuals, cotangents):
    d_hidden, d_unembedding, unembedding = residuals
    # Scaled in float32 and rounded once: the cotangent, 1 / weight or a loss scale, may not fit a half precision.
    scale = cotangents[0]
    d_hidden = (d_hidden.astype(jnp.float32) * scale).astype(d_hidden.dtype)
    return d_hidden, (d_unembedding * scale).astype(unembedding.dtype), None, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _added(total, objective, sums, weights):
    """total + the weighted sums; total None: these."""
    here = jax.tree.map(lambda x: (x * weights).sum(), (objective, sums))
    return here if total is None else jax.tree.map(jnp.add, total, here)


def _nothing(body, parts):
    """Zeros like what `body` sums up."""
    shapes, _ = jax.eval_shape(lambda parts: body(None, parts), jax.tree.map(lambda x: x[0], parts))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def chunk_logits(hidden, unembedding, logit_softcap=None):
    """float32 (B, C, V) of hidden (B, C, D)."""
    return softcap(jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32), logit_softcap)


def _of_targets(logits, targets):
    log_z = jax.nn.logsumexp(logits, -1)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return log_z, picked, (picked >= logits.max(-1)).astype(jnp.float32)


def split_time(arrays, chunk):
    """A tree of (B, T, ...) -> (ceil(T/chunk), B, chunk, ...), padded with zeros, whose weight is zero."""

    def split(x):
        B, T = x.shape[:2]
        size = min(chunk, T)
        x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, arrays)


def join_time(x):
    """(N, B, chunk, ...) -> (B, N * chunk, ...): the inverse of `split_time`, but for its padding."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
