"""What a training step minimises."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from slm.config import Experiment
from slm.models.transformer import Transformer
from slm.training import precision
from slm.training.loss import cross_entropy


class Objective(NamedTuple):
    """Pure functions; the step does not know which techniques are on."""

    init: Callable[[jax.Array], Any]
    """key -> parameters that only the objective has, such as projections; {} if none. They train beside the model's."""
    apply: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    """(params, learned, batch, teacher, step) -> (sum over weighted tokens (), sums to report, all ()).

    `params` are float32, as the model sees them; `teacher` holds a teacher's parameters, or is None. Among the sums are
    "nats" and "correct"; whoever needs means divides them by the batch's weight."""


def plain_objective(transformer: Transformer, cfg: Experiment) -> Objective:
    """Cross-entropy of the targets, with the z-loss."""
    documents = cfg.data.packing == "documents"

    def apply(params, learned, batch, teacher, step):
        view = precision.cast(params, transformer.dtype)
        hidden, _ = transformer.hidden(
            view, batch["tokens"], segment_ids=batch["segment_ids"] if documents else None, positions=batch["positions"]
        )
        return cross_entropy(
            *transformer.readout(view, hidden),
            batch["targets"],
            batch["weights"],
            z_loss=cfg.train.z_loss,
            logit_softcap=cfg.model.logit_softcap,
            chunk=cfg.train.loss_chunk,
        )

    return Objective(lambda key: {}, apply)
