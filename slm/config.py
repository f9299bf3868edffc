"""Configs: reading, overriding and checking an Experiment, strictly; every error names the field and the fix."""

import dataclasses
import difflib
import json
import re
import runpy
import types
import typing
from pathlib import Path
from typing import Any, Literal

from slm.compression import ConvertConfig, DistillConfig, PruneConfig, QuantizeConfig, ShrinkConfig
from slm.errors import ConfigError
from slm.experiment import (
    HOW_IT_RUNS,
    CheckpointConfig,
    DataConfig,
    Experiment,
    LogConfig,
    MeshConfig,
    MixerConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    TrainConfig,
)
from slm.refusals import check_compression

__all__ = [
    "HOW_IT_RUNS",
    "CheckpointConfig",
    "ConvertConfig",
    "DataConfig",
    "DistillConfig",
    "Experiment",
    "LogConfig",
    "MeshConfig",
    "MixerConfig",
    "ModelConfig",
    "OptimConfig",
    "PruneConfig",
    "QuantizeConfig",
    "RopeConfig",
    "ShrinkConfig",
    "TrainConfig",
    "check",
    "coerce",
    "field_paths",
    "flatten",
    "from_json",
    "load_config",
    "longest_sequence",
    "override",
    "to_json",
    "unknown_field",
]


def field_paths(cls: type = Experiment, prefix: str = "") -> list[str]:
    """All dotted leaf names, e.g. `optim.learning_rate`."""
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            paths += field_paths(hint, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def unknown_field(path: str) -> ConfigError:
    """The error for a field that does not exist, with the nearest names that do."""
    known = field_paths()
    wanted = path.replace("-", "_")
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    leaf = wanted.rsplit(".", 1)[-1]
    by_leaf = {known_path.rsplit(".", 1)[-1]: known_path for known_path in reversed(known)}
    near += [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, n=2, cutoff=0.7) if by_leaf[m] not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else "see `python train.py --help` for all fields"
    return ConfigError(f"unknown field '{path}': {hint}")


def coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint`, converting only where nothing is lost (int to float, list to tuple, one to tuple).

    Raises ConfigError, naming the field, for anything else.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        listed = isinstance(value, (list, tuple))
        return coerce(value, next((a for a in kinds if (typing.get_origin(a) is tuple) == listed), kinds[0]), path)
    if origin is Literal:
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), map(str, args), n=1)
        choices = f"one of {', '.join(map(str, args))}"
        raise ConfigError(f"{path} = {value!r}: must be {choices}" + (f"; did you mean {near[0]}?" if near else ""))
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(coerce(item, args[0], f"{path}[{i}]") for i, item in enumerate(items))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{path} = {value!r}: must be of type {hint.__name__}, not {type(value).__name__}")


def override(cfg: Experiment, changes: dict[str, Any]) -> Experiment:
    """`cfg` with dotted fields replaced, strictly typed: `override(cfg, {"optim.learning_rate": 1e-3})`.

    Raises ConfigError for an unknown field (naming the nearest) or an ill-typed value.
    """
    for path, value in changes.items():
        cfg = _replace(cfg, path.split("."), value, path)
    return cfg


def _replace(node: Any, parts: list[str], value: Any, path: str) -> Any:
    hints = typing.get_type_hints(type(node))
    if parts[0] not in hints:
        raise unknown_field(path)
    hint = hints[parts[0]]
    if dataclasses.is_dataclass(hint):
        if len(parts) == 1 and isinstance(value, hint):
            return dataclasses.replace(node, **{parts[0]: value})
        if len(parts) == 1:
            raise ConfigError(f"{path} is a section: set one of its fields, such as {path}.{field_paths(hint)[0]}")
        return dataclasses.replace(node, **{parts[0]: _replace(getattr(node, parts[0]), parts[1:], value, path)})
    if len(parts) > 1:
        raise unknown_field(path)
    return dataclasses.replace(node, **{parts[0]: coerce(value, hint, path)})


def flatten(cfg: Experiment) -> dict[str, Any]:
    """Dotted leaf name to value, in order of declaration."""
    flat = {}
    for path in field_paths():
        value = cfg
        for part in path.split("."):
            value = getattr(value, part)
        flat[path] = value
    return flat


def to_json(cfg: Experiment) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_json(text: str) -> Experiment:
    """Inverse of to_json. Raises ConfigError for text that is no JSON object, and for unknown or ill-typed fields."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"not a JSON object but a {type(tree).__name__}")
    return override(Experiment(), dict(_leaves(tree, "")))


def _leaves(tree: dict, prefix: str):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def load_config(path: str | Path) -> Experiment:
    """The Experiment named `config` in a Python file, or the one in a run's config.json.

    Raises ConfigError if the file is missing, does not run, or holds no Experiment.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}.py?" if near else ""
        raise ConfigError(f"no config file {path}{hint}")
    if path.suffix == ".json":
        return from_json(path.read_text())
    try:
        cfg = runpy.run_path(str(path)).get("config")
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's file may raise
        if unexpected := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            raise ConfigError(f"{path}: {unknown_field(unexpected[1])}") from error
        raise ConfigError(f"{path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(cfg, Experiment):
        raise ConfigError(f"{path} must assign an slm.Experiment to the name `config`")
    for name, hint in typing.get_type_hints(Experiment).items():
        if dataclasses.is_dataclass(hint) and not isinstance(getattr(cfg, name), hint):
            raise ConfigError(f"{path}: {name} must be an slm.{hint.__name__}, not {type(getattr(cfg, name)).__name__}")
    # Files are plain Python, so their values have not been checked yet.
    return check(override(cfg, flatten(cfg)))


def check(cfg: Experiment) -> Experiment:
    """`cfg` itself, if its fields agree with each other. Raises ConfigError naming the field and the fix."""

    def demand(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    m, d, o, t = cfg.model, cfg.data, cfg.optim, cfg.train
    values = flatten(cfg)
    for path, (low, high) in _RANGES.items():
        value = values[path]
        demand(value is None or low <= value <= high, f"{path} = {value}: must be {_range(low, high)}")
    for path in _POSITIVE:
        demand(values[path] is None or values[path] > 0, f"{path} = {values[path]}: must be above 0")
    demand(
        m.head_dim is not None or m.width % m.heads == 0,
        f"model.width = {m.width} is not divisible by model.heads = {m.heads}: change one, or set model.head_dim",
    )
    demand(m.heads % (m.kv_heads or m.heads) == 0, f"model.kv_heads = {m.kv_heads} must divide model.heads = {m.heads}")
    demand(
        m.position != "rope" or (m.head_dim or m.width // m.heads) % 2 == 0,
        "model.position = rope needs an even head size: change model.heads, model.width or model.head_dim",
    )
    demand(bool(m.attention), "model.attention is empty: name at least one mechanism, such as softmax")
    demand(bool(d.source), "data.source is empty: name at least one source, such as cpython")
    demand(
        len(d.weights) in (0, len(d.source)),
        f"data.weights has {len(d.weights)} values for {len(d.source)} sources: give one each, or none",
    )
    demand(all(w > 0 for w in d.weights), f"data.weights = {d.weights}: each must be above 0")
    demand(
        m.max_length is None or m.position != "learned" or m.max_length >= longest_sequence(d),
        f"model.max_length = {m.max_length} is less than data.sequence_length = {d.sequence_length}"
        + (f" or data.validation_length = {d.validation_length}" if d.validation_length else "")
        + ": positions beyond it could not be told apart",
    )
    demand(
        m.mixer.implementation != "cudnn"
        or (d.packing == "stream" and t.precision != "float32" and not m.mixer.softcap),
        "model.mixer.implementation = cudnn serves half precision without documents or soft cap: set "
        "data.packing = stream, train.precision = bfloat16, model.mixer.softcap = 0; or use auto",
    )
    demand(0 < d.mask_fraction < 1, f"data.mask_fraction = {d.mask_fraction}: must be in (0, 1)")
    demand(0 <= d.validation_fraction < 1, f"data.validation_fraction = {d.validation_fraction}: must be in [0, 1)")
    demand(
        t.batch_size % t.accumulation == 0,
        f"train.batch_size = {t.batch_size} is not divisible by train.accumulation = {t.accumulation}",
    )
    demand(
        len(cfg.log.profile) in (0, 2) and list(cfg.log.profile) == sorted(cfg.log.profile),
        "log.profile takes two numbers, the first and the last step to trace",
    )
    demand(o.ema_decay is None or 0 < o.ema_decay < 1, f"optim.ema_decay = {o.ema_decay}: must be in (0, 1)")
    demand(
        o.ema_decay is None or o.name != "schedule_free_adamw",
        "optim.ema_decay: schedule_free_adamw averages weights itself; leave it unset",
    )
    sizes = [cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor]
    demand(
        all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
        "mesh.data, mesh.fsdp, mesh.tensor: each at least 1, and at most one of them -1",
    )
    check_compression(cfg)
    demand("/" not in cfg.name and cfg.name not in ("", ".", ".."), f"name = {cfg.name!r}: must be a plain folder name")
    return cfg


def longest_sequence(data: DataConfig) -> int:
    """Tokens in the longest sequence that the model sees, in training or in validation."""
    return max(data.sequence_length, data.validation_length or 0)


def _range(low: float, high: float) -> str:
    return f"at least {low}" if high == _INF else f"between {low} and {high}"


_INF = float("inf")
_RANGES = {
    "seed": (0, 2**32 - 1), "model.vocab_size": (0, _INF), "model.layers": (1, _INF), "model.width": (1, _INF),
    "model.heads": (1, _INF), "model.kv_heads": (1, _INF), "model.head_dim": (1, _INF),
    "model.mixer.window": (1, _INF), "model.mixer.rope_fraction": (0, 1), "model.mixer.sinks": (0, _INF),
    "model.mixer.softcap": (0, _INF), "model.mixer.scale": (0, _INF),
    "model.rope.original_length": (0, _INF), "model.rope.query_growth": (0, _INF),
    "model.mixer.gate_rank": (-1, _INF), "model.mixer.conv": (0, 64),
    "model.mixer.groups": (0, _INF), "model.mixer.feature_dim": (1, _INF), "model.mixer.feature_seed": (0, 2**32 - 1),
    "model.mixer.householders": (1, _INF), "model.mixer.rank": (0, _INF), "model.mixer.block_size": (1, _INF),
    "model.mixer.top_k": (1, _INF), "model.mixer.index_heads": (1, _INF), "model.mixer.index_dim": (1, _INF),
    "model.mixer.latent_dim": (0, _INF), "model.mixer.query_latent_dim": (0, _INF), "model.mixer.rope_dim": (0, _INF),
    "model.mixer.chunk": (1, _INF), "model.mixer.horizon": (1, _INF),
    "model.mlp_width": (1, _INF), "model.max_length": (1, _INF),
    "model.embedding_width": (1, _INF), "model.token_types": (0, _INF), "model.labels": (0, _INF),
    "model.bottleneck": (1, _INF), "model.feedforwards": (1, _INF),
    "data.sequence_length": (1, _INF), "data.validation_length": (1, _INF),
    "optim.learning_rate": (0, _INF), "optim.warmup_steps": (0, _INF), "optim.weight_decay": (0, _INF),
    "optim.b1": (0, 1 - 1e-9), "optim.b2": (0, 1 - 1e-9), "optim.momentum": (0, 1 - 1e-9), "train.steps": (1, _INF),
    "train.batch_size": (1, _INF), "train.accumulation": (1, _INF), "train.loss_chunk": (1, _INF),
    "train.z_loss": (0, _INF), "train.evaluate_every": (0, _INF), "train.evaluate_sequences": (0, _INF),
    "train.log_every": (1, _INF), "checkpoint.every": (0, _INF), "checkpoint.keep": (1, _INF),
}  # fmt: skip
_POSITIVE = (
    "model.mixer.expand_k", "model.mixer.expand_v", "model.logit_softcap", "model.rope.theta", "model.rope.local_theta",
    "model.rope.factor", "model.rope.magnitude", "model.residual_scale", "model.embedding_scale", "model.logit_divisor",
    "model.norm_eps", "model.init_std", "optim.eps", "train.max_loss",
)  # fmt: skip
