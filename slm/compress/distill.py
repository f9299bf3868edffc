"""Training on what a teacher says of each token, beside what the text says (Hinton et al. 2015)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from slm.compress.divergences import DIVERGENCES, INFINITE_AT_ZERO, dense_rows, uld
from slm.compress.features import features
from slm.config import DistillConfig, Experiment
from slm.errors import ConfigError
from slm.models.transformer import Transformer
from slm.training import precision
from slm.training.loss import chunk_logits, target_losses, token_sums
from slm.training.objective import Objective

CACHED = ("teacher_ids", "teacher_log_probs", "teacher_log_tail")
"""Entries of a batch that stand for a teacher: (B, T, k) ids, (B, T, k) log-probabilities, (B, T) the rest's."""


def distill_objective(
    cfg: Experiment, transformer: Transformer, teacher: Transformer | None, vocab_size: int | None = None
) -> Objective:
    """alpha * divergence * temperature^2 + (1 - alpha) * cross-entropy, and the features that have a weight.

    Args:
      cfg: cfg.distill, cfg.train and cfg.data are read.
      transformer: the student's.
      teacher: the teacher's; None: the batch holds `CACHED`.
      vocab_size: ids below this one are tokens, and those from here on padding, which the divergence leaves out; None:
        all that both have.

    Its sums are those of `plain_objective`, `divergence` (nats, without the factor), and each feature's. With
    distill.loss = uld the batch holds what slm.compress.translate adds as well, the divergence is 0 where the teacher
    has no token that ends with the student's, and `aligned` counts the others. No more than cfg.train.loss_chunk steps
    have logits at once. The teacher gets no gradient.

    Raises ConfigError where the models or settings do not fit together.
    """
    distill, steps = resolved(cfg.distill), cfg.train.steps
    if teacher is None and distill.loss in INFINITE_AT_ZERO and distill.missing != "uniform":
        raise ConfigError(
            f"distill.loss = {distill.loss} is infinite where the teacher says 0, as distill.missing = "
            f"{distill.missing} does: set distill.missing = uniform"
        )
    foreign = distill.loss == "uld"
    sizes = (transformer.cfg.vocab_size, vocab_size, None if foreign else teacher and teacher.cfg.vocab_size)
    common = min(size for size in sizes if size)
    imitated = None if teacher is None or foreign else features(distill, transformer, teacher)
    take = None if imitated is None else imitated.take
    documents = cfg.data.packing == "documents"

    def inside(model: Transformer, params, batch):
        """(hidden and unembedding for logits, what was seen inside)."""
        segment_ids = batch["segment_ids"] if documents else None
        view = precision.cast(params, model.dtype)
        x, seen = model.watched(view, batch["tokens"], take, segment_ids=segment_ids, positions=batch["positions"])
        return model.readout(view, x), seen

    def of_chunk(logits, arrays, constants):
        alpha, temperature, beta = constants["settings"]
        given = arrays["targets"] >= 0  # not written by the student itself (slm.compress.rollout)
        targets = jnp.where(given, arrays["targets"], ~arrays["targets"])
        cross_entropy, nats, correct = target_losses(logits, targets)
        mine, sums = logits[..., :common] / temperature, {"nats": nats, "correct": correct}
        if teacher is None:
            ids, log_probs, log_tail = (arrays[name] for name in CACHED)
            log_p = dense_rows(ids, log_probs, log_tail, common, temperature, distill.missing)
        else:
            theirs = chunk_logits(arrays["hidden"], constants["unembedding"], teacher.cfg.logit_softcap)
            log_p = jax.nn.log_softmax((theirs if foreign else theirs[..., :common]) / temperature)
        if foreign:
            aligned = arrays["aligned"].astype(jnp.float32)
            apart, sums = uld(mine, log_p) * aligned, sums | {"aligned": aligned}
        else:
            apart = DIVERGENCES[distill.loss](mine, log_p, beta)
        objective = alpha * temperature**2 * apart + (1 - alpha) * jnp.where(given, cross_entropy, 0)
        if cfg.train.z_loss:
            objective += cfg.train.z_loss * jax.nn.logsumexp(logits, -1) ** 2
        return objective, sums | {"divergence": apart}

    def apply(params, learned, batch, teacher_params, step):
        (hidden, unembedding), seen = inside(transformer, params, batch)
        arrays, constants = {"targets": batch["targets"]}, {"settings": settings(distill, step, steps)}
        if teacher is None:
            arrays |= {name: batch[name] for name in CACHED}
        elif foreign:
            own = {
                name: batch[f"teacher_{name}"].reshape(len(batch["tokens"]), -1) for name in ("tokens", "segment_ids")
            }
            own |= {"positions": None}  # from the beginning of each segment
            (theirs, matrix), _ = inside(teacher, jax.lax.stop_gradient(teacher_params), own)
            at = batch["teacher_at"]
            arrays |= {"hidden": jnp.take_along_axis(theirs, jnp.maximum(at, 0)[..., None], 1), "aligned": at >= 0}
            constants["unembedding"] = matrix
        else:
            (theirs, matrix), seen_there = inside(teacher, jax.lax.stop_gradient(teacher_params), batch)
            arrays["hidden"], constants["unembedding"] = theirs, matrix
        objective, sums = token_sums(
            of_chunk, hidden, unembedding, batch["weights"], arrays, constants,
            logit_softcap=transformer.cfg.logit_softcap, chunk=cfg.train.loss_chunk,
        )  # fmt: skip
        if take is not None:
            found = imitated.losses(learned, seen, seen_there, batch["segment_ids"] if documents else None)
            for name, loss in found.items():
                total = (loss * batch["weights"]).sum()
                objective += getattr(distill, name) * total
                sums |= {name: jax.lax.stop_gradient(total)}
        return objective, sums

    return Objective(imitated.init if imitated is not None else lambda key: {}, apply)


def settings(distill: DistillConfig, step: Any, steps: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """alpha, temperature and beta at `step` of a run of `steps`, float32."""
    done = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0, 1)
    if distill.schedule == "cosine":
        done = (1 - jnp.cos(math.pi * done)) / 2

    def at(name):
        first, last = getattr(distill, name), getattr(distill, f"{name}_end")
        return jnp.float32(first) if last is None else first + (last - first) * done

    return at("alpha"), at("temperature"), at("beta")


def resolved(distill: DistillConfig) -> DistillConfig:
    """`distill` with what a beta at the end of its range stands for: jsd there is forward or reverse KL, as GKD has it,
    and skew_kl without skew is KL. Raises ConfigError where a beta says nothing or its schedule reaches an end."""
    if distill.loss not in ("jsd", "skew_kl", "skew_reverse_kl"):
        return distill
    ends = {distill.beta, distill.beta if distill.beta_end is None else distill.beta_end}
    forward, reverse = (dataclasses.replace(distill, loss=f"{way}_kl", beta_end=None) for way in ("forward", "reverse"))
    if distill.loss == "jsd" and ends in ({0}, {1}):
        return forward if ends == {0} else reverse
    if distill.loss != "jsd" and ends == {0}:
        return forward if distill.loss == "skew_kl" else reverse
    if 1 in ends or (distill.loss == "jsd" and 0 in ends):
        raise ConfigError(
            f"distill.beta = {distill.beta}, distill.beta_end = {distill.beta_end}: {distill.loss} vanishes at "
            f"{1 if 1 in ends else 0}, so nothing would be learned there: keep both inside the range"
        )
    return distill
