"""Cross-entropy over hidden states, in chunks of time, so that (batch, time, vocab) logits never exist in float32.

Losses are sums with their weights beside them; whoever needs a mean divides once.
"""

import functools

import jax
import jax.numpy as jnp

from slm.models.transformer import softcap


def cross_entropy(hidden, unembedding, targets, weights, *, z_loss=0.0, logit_softcap=None, chunk=128):
    """Weighted sum of -log p(target) + z_loss * log(Z)^2 (PaLM, Chowdhery et al. 2022, section 5).

    Under differentiation, the gradients with respect to `hidden` and `unembedding` are computed in the forward sweep,
    chunk by chunk, while the chunk's logits exist: no logits are stored and none are computed twice.

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
    objective, nats, correct = _sums(hidden, unembedding, targets, weights, z_loss, logit_softcap, chunk)
    return objective, jax.lax.stop_gradient({"nats": nats, "correct": correct})


def token_losses(hidden, unembedding, targets, *, logit_softcap=None, chunk=128):
    """Each target's own loss: (nats, correct, log_z), all (B, T) float32; log_z is the log-normaliser."""

    def body(_, part):
        hidden, targets = part
        log_z, picked, correct, _ = _chunk_logits(hidden, unembedding, targets, logit_softcap)
        return None, (log_z - picked, correct, log_z)

    _, losses = jax.lax.scan(body, None, _split((hidden, targets), chunk))
    return tuple(_join(x)[:, : targets.shape[1]] for x in losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(hidden, unembedding, targets, weights, z_loss, logit_softcap, chunk):
    nats, correct, log_z = token_losses(hidden, unembedding, targets, logit_softcap=logit_softcap, chunk=chunk)
    objective = nats + z_loss * log_z**2
    return (objective * weights).sum(), (nats * weights).sum(), (correct * weights).sum()


def _sums_forward(hidden, unembedding, targets, weights, z_loss, logit_softcap, chunk):
    def body(carry, part):
        sums, d_unembedding = carry
        hidden, targets, weights = part
        log_z, picked, correct, logits = _chunk_logits(hidden, unembedding, targets, logit_softcap)
        nats = (log_z - picked) * weights
        objective = nats + z_loss * log_z**2 * weights
        # d objective / d logits = weight * (softmax * (1 + 2 z log Z) - onehot), through tanh where soft-capped.
        probability = jnp.exp(logits - log_z[..., None])
        onehot = targets[..., None] == jnp.arange(logits.shape[-1])
        d_logits = probability * ((1 + 2 * z_loss * log_z) * weights)[..., None] - onehot * weights[..., None]
        if logit_softcap is not None:
            d_logits *= 1 - (logits / logit_softcap) ** 2
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("BTV,DV->BTD", d_logits, unembedding)
        d_unembedding += jnp.einsum("BTD,BTV->DV", hidden, d_logits, preferred_element_type=jnp.float32)
        sums = sums + jnp.stack([objective.sum(), nats.sum(), (correct * weights).sum()])
        return (sums, d_unembedding), d_hidden

    start = jnp.zeros(3, jnp.float32), jnp.zeros(unembedding.shape, jnp.float32)
    (sums, d_unembedding), d_hidden = jax.lax.scan(body, start, _split((hidden, targets, weights), chunk))
    d_hidden = _join(d_hidden)[:, : targets.shape[1]]
    return tuple(sums), (d_hidden, d_unembedding, unembedding)


def _sums_backward(z_loss, logit_softcap, chunk, residuals, cotangents):
    d_hidden, d_unembedding, unembedding = residuals
    # Scaled in float32 and rounded once: the cotangent, 1 / weight or a loss scale, may not fit a half precision.
    scale = cotangents[0]
    d_hidden = (d_hidden.astype(jnp.float32) * scale).astype(d_hidden.dtype)
    return d_hidden, (d_unembedding * scale).astype(unembedding.dtype), None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _chunk_logits(hidden, unembedding, targets, logit_softcap):
    logits = softcap(jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32), logit_softcap)
    log_z = jax.nn.logsumexp(logits, -1)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return log_z, picked, (picked >= logits.max(-1)).astype(jnp.float32), logits


def _split(arrays, chunk):
    """(B, T, ...) -> (ceil(T/chunk), B, chunk, ...), padded with zeros, whose weight is zero."""

    def split(x):
        B, T = x.shape[:2]
        size = min(chunk, T)
        x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, arrays)


def _join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
