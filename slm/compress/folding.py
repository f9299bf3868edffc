"""Which parameter of a layer feeds which matrices, so that factors can be moved from one to the other.

The model stays the same function: what a norm's scale or a matrix's outputs lose, the inputs of their readers gain.
`check_same` compares logits afterwards, so that a layer that uses what it reads in another way than this table says
ends in an error and not in a broken model.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm.config import ModelConfig
from slm.errors import ConfigError
from slm.models.language_model import LanguageModel, logits
from slm.models.layers import GATED
from slm.models.mixers import Layer, head_dim

READERS = ("query", "key", "value", "gate", "gate_down")
"""Matrices of mixers that read the normed stream."""
WRITERS = ("mixer/out", "mlp/down")
"""Matrices that add to the stream."""


class Feed(NamedTuple):
    """A parameter and the matrices that read nothing but what it makes."""

    source: str
    """Path in the layer: a norm, or a matrix whose outputs reach its readers one by one."""
    readers: tuple[str, ...]


def norms(layer: Layer, params: Any) -> list[Feed]:
    """The norms of a layer (its parameters, of one layer or stacked) whose outputs only matrices read."""
    cfg = layer.cfg
    if cfg.residual == "post" or cfg.bottleneck:
        return []  # there the norms stand on the stream itself
    mixer = tuple(f"mixer/{name}" for name in READERS if name in params["mixer"])
    mlp = tuple(f"mlp/{name}" for name in ("up", "gate") if name in params.get("mlp", {}))
    found = []
    if "attention_norm" in params:
        found.append(Feed("attention_norm", mixer + (mlp if cfg.residual == "parallel_shared" else ())))
    if "mlp_norm" in params:
        found.append(Feed("mlp_norm", mlp))
    return found


def feeds(layer: Layer, params: Any) -> list[Feed]:
    """All feeds of a layer: its norms, values of softmax heads, and what a gate multiplies in a feed-forward."""
    found, mixer = norms(layer, params), params["mixer"]
    if layer.mechanism in ("softmax", "window", "nope_softmax") and mixer.keys() & {"gate", "output_norm"} == set():
        found.append(Feed("mixer/value", ("mixer/out",)))
    if layer.cfg.mlp in (*GATED, "relu") and not layer.cfg.bottleneck:
        found.append(Feed("mlp/up", ("mlp/down",)))
    return found


def at(params: Any, path: str) -> Any:
    """The part of a layer's parameters at a path."""
    for key in path.split("/"):
        params = params[key]
    return params


def put(params: Any, path: str, part: Any) -> Any:
    """A layer's parameters with another part at a path."""
    first, _, rest = path.partition("/")
    return params | {first: put(params[first], rest, part) if rest else part}


def fold(layer: Layer, params: Any, feed: Feed, factors: jax.Array) -> Any:
    """One layer's parameters with the rows of the readers' kernels multiplied by factors (inputs,), and their source
    divided by them. Values that several heads read need equal factors for these: see `shared`."""
    for reader in feed.readers:
        part = at(params, reader)
        params = put(params, reader, part | {"kernel": part["kernel"] * factors[:, None]})
    source = at(params, feed.source)
    if "kernel" in source:
        own = _of_source(layer.cfg, factors) if feed.source == "mixer/value" else factors
        source = {name: leaf / own for name, leaf in source.items()}
    elif layer.cfg.norm == "zero_centered_rmsnorm":
        source = {"scale": (1 + source["scale"]) / factors - 1}
    else:
        source = {name: leaf / factors for name, leaf in source.items()}
    return put(params, feed.source, source)


def shared(layer: Layer, feed: Feed, factors: jax.Array) -> jax.Array:
    """Factors (inputs of the readers,) that `fold` can apply: of heads that read the same values, the mean."""
    if feed.source != "mixer/value":
        return factors
    per_group = _grouped(layer.cfg, factors).mean(1, keepdims=True)
    return jnp.broadcast_to(per_group, _grouped(layer.cfg, factors).shape).reshape(-1)


def _of_source(cfg: ModelConfig, factors):
    """One factor for each output of `value`."""
    return _grouped(cfg, factors)[:, 0].reshape(-1)


def _grouped(cfg: ModelConfig, factors):
    """(groups of heads with common values, heads in a group, size of a head)."""
    return factors.reshape(cfg.kv_heads or cfg.heads, -1, head_dim(cfg))


def check_same(method: str, before: LanguageModel, after: LanguageModel, tokens: np.ndarray) -> None:
    """Raises ConfigError, naming the method, if two models that should be the same function are not."""
    want, found = (np.asarray(logits(model, tokens[:2, :64])) for model in (before, after))
    error = np.abs(found - want).max() / np.abs(want).max()
    if not error < 1e-2:
        m = before.config.model
        raise ConfigError(
            f"quantize.method = {method} cannot change layers of {'/'.join(m.attention)} (model.residual = "
            f"{m.residual}) without changing what they say: use gptq or hqq"
        )


def replaced(model: LanguageModel, params: Any, **changes: Any) -> LanguageModel:
    """The model with other parameters and fields of config.model."""
    config = dataclasses.replace(model.config, model=dataclasses.replace(model.config.model, **changes))
    return dataclasses.replace(model, params=params, config=config)
