"""From a config to what the train step does besides plain training, and from a run to the model that it made."""

from typing import Any

from slm.compress.masks import mask_transform
from slm.config import Experiment
from slm.models.counts import abstract_parameters
from slm.training import transforms
from slm.training.step import Techniques
from slm.training.transforms import Transforms


def techniques_of(cfg: Experiment) -> Techniques:
    """What `cfg` asks for. cfg.model must be filled in. Raises ConfigError where it does not fit the model."""
    return Techniques(transforms_of(cfg))


def transforms_of(cfg: Experiment) -> Transforms:
    """The transforms among them."""
    shapes, found = abstract_parameters(cfg.model), {}
    if cfg.prune.on:
        found["mask"] = mask_transform(cfg, shapes)
    return found


def shipped(cfg: Experiment, params: Any, extra: dict[str, Any], step: Any) -> Any:
    """The parameters of the model that a run has made: pruned weights are zeros, rounded ones are integers.

    Args:
      cfg: of the run.
      params: those that it trained, or their average.
      extra: of its state: {"learned", "transforms"}, by name.
      step: steps done.
    """
    return transforms.apply(transforms_of(cfg), params, extra["learned"], extra["transforms"], step)
