"""Pruning while training: masks as a transform of parameters, changed on a schedule inside the one jitted step.

A mask multiplies a matrix in the forward pass. Where the mask is hard, what it hides is set to zero, its moments too,
so that no momentum brings it back; where it is straight-through (`ste`), hidden weights go on learning and may return.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from slm.compress.sparsity import full_sparsity, keep_masks, random_scores
from slm.compress.targets import matrices
from slm.compression import prune_end
from slm.config import Experiment, PruneConfig
from slm.models.paths import flat, nested
from slm.training.transforms import Moving, ParamTransform, belonging, replaced, straight_through

MEMORY = 0.9
"""Decay of taylor's running mean of |gradient x weight|."""
SPARSE_FROM_THE_START = ("set", "rigl")


def mask_transform(cfg: Experiment, params: Any) -> ParamTransform:
    """The transform of cfg.prune.

    Its state is {"masks": bool, like the matrices, "scores": float32 likewise, of movement and taylor, "step": int32
    (), of the last update}: a step that float16 skips leaves it behind, and the next one makes up for that.

    Args:
      cfg: of the run.
      params: parameters or their shapes.

    Raises ConfigError for patterns that match no matrix or do not divide one.
    """
    prune, end, seed = cfg.prune, prune_end(cfg), cfg.seed
    names = matrices(params, prune.skip, "prune.skip")
    hard = prune.schedule != "ste"
    shapes = {name: leaf for name, leaf in flat(params).items() if name in names}
    jax.eval_shape(lambda scores: keep_masks(scores, 0.5, prune.scope, prune.pattern), shapes)
    whole = full_sparsity(prune.sparsity, prune.pattern)
    learns_scores = prune.criterion in ("movement", "taylor")

    def chosen(params):
        leaves = flat(params)
        return {name: leaves[name] for name in names}

    def init(params):
        weights = chosen(params)
        masks = {name: jnp.ones(w.shape, bool) for name, w in weights.items()}
        if prune.criterion in ("wanda", "sparsegpt"):
            masks = {name: w != 0 for name, w in weights.items()}  # pruned before training began
        elif prune.schedule in SPARSE_FROM_THE_START:
            masks = keep_masks(random_scores(weights, seed), whole, prune.scope, prune.pattern)
        elif prune.schedule == "one_shot" and prune.begin_step == 0:
            masks = keep_masks(_scores(prune, weights, None, seed), whole, prune.scope, prune.pattern)
        scores = {name: jnp.zeros(w.shape, jnp.float32) for name, w in weights.items()} if learns_scores else {}
        return {"masks": nested(masks), "scores": nested(scores), "step": jnp.int32(0)}

    def apply(params, learned, state, step):
        masks, weights = flat(state["masks"]), chosen(params)
        hidden = {name: jnp.where(masks[name], w, 0) for name, w in weights.items()}
        if not hard:
            hidden = {name: straight_through(weights[name], w) for name, w in hidden.items()}
        return replaced(params, hidden)

    def update(state, moving: Moving):
        weights, masks, scores = chosen(moving.params), flat(state["masks"]), flat(state["scores"])
        seen = flat(moving.view_grads)
        grads = {name: seen.get(name, seen.get(f"{name}/kernel")) for name in names}  # of RoundedInputs
        if learns_scores:
            scores = {name: _learned_score(prune, scores[name], weights[name], grads[name]) for name in names}
        changes = _due(prune, end, state["step"], moving.step)
        if changes is not None:
            make = functools.partial(_new_masks, prune, end, seed, moving.step)
            masks = jax.lax.cond(changes, make, lambda masks, *_: masks, masks, weights, grads, scores)
        state = {"masks": nested(masks), "scores": nested(scores), "step": moving.step}
        return state, _without(moving, masks) if hard else moving

    return ParamTransform(init, apply, update)


def sparsity_at(prune: PruneConfig, end: int, step: jax.Array) -> jax.Array:
    """Share of zeros that the schedule asks for after `step` steps: s (1 - (1 - t)^3) (Zhu & Gupta 2018, equation 1),
    or s t, with t from 0 at begin_step to 1 at end_step. So N:M patterns too come by one weight of a group after the
    other (structure decay, Kao et al. 2022)."""
    whole = full_sparsity(prune.sparsity, prune.pattern)
    if prune.schedule == "one_shot" or prune.schedule in SPARSE_FROM_THE_START:
        return jnp.where(step >= prune.begin_step, whole, 0.0)
    t = jnp.clip((step - prune.begin_step) / (end - prune.begin_step), 0, 1)
    return whole * (t if prune.schedule == "iterative" else 1 - (1 - t) ** 3)


def _due(prune: PruneConfig, end: int, before: jax.Array, step: jax.Array) -> jax.Array | None:
    """Whether masks change in one of the steps behind `before`, up to `step`; None: never again."""
    begin, every = prune.begin_step, prune.every
    if prune.schedule == "one_shot":
        return None if begin == 0 else (before < begin) & (begin <= step)

    def changes(at):
        """How many have been due after `at` steps."""
        count = jnp.where(at < begin, 0, (jnp.minimum(at, end) - begin) // every + 1)
        if prune.schedule in SPARSE_FROM_THE_START:
            return count
        # The last is at the end of the schedule whether or not `every` divides it. Straight-through masks follow the
        # weights as long as they learn.
        rest = jnp.maximum(at - end, 0) // every if prune.schedule == "ste" else 0
        return count + (at >= end) + rest

    return changes(step) > changes(before)


def _new_masks(prune, end, seed, step, masks, weights, grads, scores):
    if prune.schedule in SPARSE_FROM_THE_START:
        return _moved(prune, end, seed, step, masks, weights, grads)
    return keep_masks(_scores(prune, weights, scores, seed), sparsity_at(prune, end, step), prune.scope, prune.pattern)


def _moved(prune, end, seed, step, masks, weights, grads):
    """Some of the smallest weights make room for as many others: where gradients are large, or anywhere.

    RigL (Evci et al. 2020), algorithm 1; SET (Mocanu et al. 2018). The share that moves falls by a cosine.
    """
    share = prune.regrow / 2 * (1 + jnp.cos(jnp.pi * jnp.clip(step / end, 0, 1)))
    large = {name: jnp.where(masks[name], jnp.abs(w), -1) for name, w in weights.items()}
    kept = keep_masks(large, 1 - (1 - prune.sparsity) * (1 - share), prune.scope, prune.pattern)
    wanted = (
        random_scores(weights, seed + step) if prune.schedule == "set" else {n: jnp.abs(g) for n, g in grads.items()}
    )
    grown = {name: jnp.where(kept[name], jnp.inf, score) for name, score in wanted.items()}
    return keep_masks(grown, prune.sparsity, prune.scope, prune.pattern)


def _scores(prune: PruneConfig, weights, scores, seed):
    """What is kept is what scores high."""
    if prune.criterion == "random":
        return random_scores(weights, seed)
    if prune.criterion in ("movement", "taylor"):
        return scores
    return {name: jnp.abs(w) for name, w in weights.items()}


def _learned_score(prune, score, weight, grad):
    if prune.criterion == "movement":
        return score - weight * grad  # Sanh et al. 2020, equation 3: weights that move away from zero
    return MEMORY * score + (1 - MEMORY) * jnp.abs(weight * grad)  # Molchanov et al. 2019, equation 8


def _without(moving: Moving, masks) -> Moving:
    """Hidden weights and whatever the optimizer remembers of them become zero."""

    def hide(tree):
        leaves, structure = jax.tree.flatten(tree)
        owners = belonging(tree, moving.params)
        return jax.tree.unflatten(
            structure, [jnp.where(masks[o], leaf, 0) if o in masks else leaf for leaf, o in zip(leaves, owners)]
        )

    return moving._replace(params=hide(moving.params), opt_state=hide(moving.opt_state))
