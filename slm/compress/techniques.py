"""From a config to what the train step does besides plain training."""

from typing import Any

from slm.compress.masks import mask_transform
from slm.config import Experiment
from slm.training.transforms import Transforms


def transforms_of(cfg: Experiment, params: Any) -> Transforms:
    """The transforms that `cfg` asks for. `params`: parameters or their shapes. Raises ConfigError."""
    transforms: Transforms = {}
    if cfg.prune.on:
        transforms["mask"] = mask_transform(cfg, params)
    return transforms
