"""From a config to what the train step does besides plain training, and from a run to the model that it made."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from slm.compress.fake_quant import packed_params, quantize_transform
from slm.compress.gates import cut_by_gates, gate_transform
from slm.compress.masks import mask_transform
from slm.compress.teacher import Teaching, planned_teaching, teaching
from slm.config import Experiment
from slm.models.counts import abstract_parameters
from slm.training import transforms
from slm.training.step import Techniques, make_transformer
from slm.training.transforms import ORDER, Transforms


def techniques_of(cfg: Experiment, teaching: Teaching | None = None) -> Techniques:
    """What `cfg` asks for. cfg.model must be filled in; `teaching` is its `teaching_of`. Raises ConfigError where it
    does not fit the model."""
    if teaching is None:
        return Techniques(transforms_of(cfg))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), teaching.params)
    return Techniques(transforms_of(cfg), teaching.objective(cfg), abstract, teaching.extra_batch)


def teaching_of(cfg: Experiment, mesh: Mesh, data: Any) -> Teaching | None:
    """The teacher of a run, opened; None without one. `data`: slm.data.pipeline.Data. Raises ConfigError, DataError,
    CheckpointError."""
    return teaching(cfg, make_transformer(cfg, mesh), data) if cfg.distill.on else None


def planned_teaching_of(cfg: Experiment, mesh: Mesh) -> Teaching | None:
    """`teaching_of` without a parameter or data: enough to plan a run. Raises ConfigError."""
    return planned_teaching(cfg, make_transformer(cfg, mesh)) if cfg.distill.on else None


def transforms_of(cfg: Experiment) -> Transforms:
    """The transforms among them."""
    shapes, found = abstract_parameters(cfg.model), {}
    if cfg.shrink.learned:
        found["gate"] = gate_transform(cfg)
    if cfg.prune.on:
        found["mask"] = mask_transform(cfg, shapes)
    if cfg.quantize.on:
        found["quantize"] = quantize_transform(cfg, shapes)
    return found


def shipped(cfg: Experiment, params: Any, extra: dict[str, Any], step: Any) -> tuple[Experiment, Any]:
    """The model that a run has made, its config and parameters: pruned weights are zeros, rounded ones are integers,
    and parts whose gates are shut are gone.

    Args:
      cfg: of the run.
      params: those that it trained, or their average.
      extra: of its state: {"learned", "transforms"}, by name.
      step: steps done.
    """
    before = {name: transform for name, transform in transforms_of(cfg).items() if name != "quantize"}
    params = jax.tree.map(jnp.asarray, params)
    # A transform without state or parameters leaves nothing in a checkpoint.
    learned, states = ({name: extra[part].get(name, {}) for name in ORDER} for part in ("learned", "transforms"))
    if cfg.shrink.learned:
        return cut_by_gates(cfg, params, learned["gate"])
    params = transforms.apply(before, params, learned, states, step)
    if cfg.quantize.on and step >= cfg.quantize.begin_step:
        params = packed_params(cfg, params, learned["quantize"], states["quantize"])
    return cfg, params
