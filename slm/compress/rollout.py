"""Text that the student writes itself, to learn from the teacher where it really goes (GKD, Agarwal et al. 2024).

Trained on given text alone, a student never sees its own mistakes. On a share of steps (GKD's lambda,
distill.on_policy) the batch keeps the beginning of each row and goes on with samples of the student; the teacher then
judges them. As in GKD, there is no gradient through the sampling.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.config import DistillConfig, Experiment
from slm.errors import ConfigError
from slm.models.transformer import Transformer
from slm.training import precision

STREAM = 0x60D
"""Tells these random choices from others of the same seed."""
Rollout = Callable[[Any, dict, jax.Array], dict]
"""(parameters as the model sees them, batch, step) -> batch."""


def is_on_policy(distill: DistillConfig, seed: int, step: int) -> bool:
    """Whether the student writes the batch of this step: the same on every process and after a restart."""
    return np.random.default_rng((seed, STREAM, step)).random() < distill.on_policy


def make_rollout(cfg: Experiment, transformer: Transformer, ends: Sequence[int], vocab_size: int) -> Rollout:
    """A pure function that rewrites a batch: rows keep their first distill.prompt_tokens tokens, and samples follow.

    Those of row r at `step` are a function of (seed, step, r, parameters), whatever the number of devices. Each row is
    one segment from its first token on. Weights are 1 for sampled tokens up to the first end of text, which is one of
    them, and 0 for all others: the prompt is not the student's. Targets are ~id, below 0, which says that nobody but
    the student wrote them: `distill_objective` leaves them out of the cross-entropy.

    Args:
      cfg: cfg.distill, cfg.seed and cfg.data.sequence_length are read.
      transformer: the student's.
      ends: ids that end a text.
      vocab_size: ids from here on are never drawn.

    Raises ConfigError for a model that cannot generate.
    """
    from slm.evaluation.decoding import is_end, logits_below, read
    from slm.evaluation.sampling import make_sampling, sample

    distill, T, P = cfg.distill, cfg.data.sequence_length, cfg.distill.prompt_tokens
    if not cfg.model.causal or cfg.model.head != "lm":
        raise ConfigError(
            f"distill.on_policy = {distill.on_policy}: model.head = {cfg.model.head} writes no text; set it to 0"
        )
    sampling = make_sampling(distill.sample_temperature)
    ends_E = jnp.array(sorted(ends) or [-1], jnp.int32)

    def rollout(params, batch, step):
        params = precision.cast(params, transformer.dtype)
        prompt_BxP = batch["tokens"][:, :P]
        B = len(prompt_BxP)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), STREAM), step)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))

        def draw(hidden_BxD, at):
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, at)
            return sample(keys, logits_below(transformer, params, hidden_BxD, vocab_size), sampling)

        def advance(carry, at):
            token_B, cache = carry
            hidden, cache = transformer.hidden(params, token_B[:, None], positions=jnp.full((B, 1), at), cache=cache)
            new_B = draw(hidden[:, 0], at + 1)
            return (new_B, cache), new_B

        hidden_BxD, cache = read(transformer, params, prompt_BxP, jnp.full(B, P), T - P, None)
        first_B = draw(hidden_BxD, P)
        _, more_NxB = jax.lax.scan(advance, (first_B, cache), jnp.arange(P, T))
        # T + 1 tokens: the last is a target only.
        text = jnp.concatenate([prompt_BxP, first_B[:, None], more_NxB.T], 1).astype(jnp.int32)
        end = is_end(text[:, P:], ends_E)
        ended = jnp.cumsum(end, 1) > end
        weights = jnp.concatenate([jnp.zeros((B, P - 1)), jnp.where(ended, 0.0, 1.0)], 1)
        at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        return {
            "tokens": text[:, :-1],
            "targets": ~text[:, 1:],
            "weights": weights.astype(jnp.float32),
            "segment_ids": jnp.ones((B, T), jnp.int32),
            "positions": at,
        }

    return rollout
