"""Between the fields of a Hugging Face config.json and those of slm.ModelConfig."""

import math
from typing import Any

from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.errors import ConfigError
from slm.models.layers import GATED, mlp_width
from slm.models.mixers import head_dim, layer_pattern
from slm.models.mixers.base import even_share

# Their names of activations; GELU by tanh goes by three.
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu": "geglu_erf"}
_PLAIN = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf", "relu": "relu",
          "relu2": "relu2"}  # fmt: skip


def need(hf: dict, name: str) -> Any:
    """hf[name]. Raises ConfigError where it is missing."""
    if hf.get(name) is None:
        raise ConfigError(f"config.json has no {name}")
    return hf[name]


def refuse(hf: dict, **unsupported: Any) -> None:
    """Raises ConfigError if a field differs from the value that is supported (or from a missing one)."""
    for name, supported in unsupported.items():
        value = hf.get(name)
        if value is not None and value != supported:
            raise ConfigError(f"config.json: {name} = {value!r} is not supported, only {supported!r}")


def gated(name: str) -> str:
    """model.mlp of a gated feed-forward with their activation."""
    return _activation(_GATED, name)


def plain(name: str) -> str:
    """model.mlp of a plain feed-forward with their activation."""
    return _activation(_PLAIN, name)


def _activation(table: dict[str, str], name: str) -> str:
    if name not in table:
        raise ConfigError(f"config.json: no activation {name!r} here; one of {', '.join(table)}")
    return table[name]


def activation(cfg: ModelConfig) -> str:
    """Their name of the activation of cfg.mlp."""
    return _named(_GATED if cfg.mlp in GATED else _PLAIN, cfg.mlp)


def plain_name(activation: str) -> str:
    """Inverse of `plain`."""
    return _named(_PLAIN, activation)


def _named(table: dict[str, str], name: str) -> str:
    return next(theirs for theirs, ours in table.items() if ours == name)


def read_rope(
    hf: dict, theta: float = 10_000.0, layer_type: str | None = None, growing_queries: bool = False
) -> RopeConfig:
    """Rotary settings in the new layout (rope_parameters) or the old one (rope_theta, rope_scaling).

    `theta`: of a config that has none. `layer_type`: whose settings, where they are given by type of layer.
    `growing_queries`: whether the family knows llama_4_scaling_beta, which others would silently leave out.
    """
    new = hf.get("rope_parameters") or {}
    if layer_type in new:
        new = new[layer_type] or {}
    settings = {"rope_theta": hf.get("rope_theta", theta)} | (hf.get("rope_scaling") or {}) | new
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if settings["rope_theta"] is None:
        settings["rope_theta"] = theta
    base = {"theta": float(settings["rope_theta"])}
    original = hf.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    original = int(original or hf.get("max_position_embeddings") or 0)
    if not growing_queries:
        refuse(settings, llama_4_scaling_beta=0.0)
    elif settings.get("llama_4_scaling_beta"):
        base |= {"query_growth": float(settings["llama_4_scaling_beta"]), "original_length": original}
    if kind == "default":
        return RopeConfig(**base)
    if kind == "longrope" or (kind in ("su", "yarn") and "short_factor" in settings):
        factor = settings.get("factor") or need(hf, "max_position_embeddings") / original
        magnitude = settings.get("attention_factor")
        if magnitude is None:
            magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return RopeConfig(
            **base | {"original_length": original}, scaling="longrope", factor=float(factor),
            magnitude=float(magnitude),
            short_factors=tuple(map(float, need(settings, "short_factor"))),
            long_factors=tuple(map(float, need(settings, "long_factor"))),
        )  # fmt: skip
    factor = float(settings.get("factor") or 1.0)
    if kind == "linear":
        return RopeConfig(**base, scaling="linear", factor=factor)
    if kind == "llama3":
        low, high = (float(need(settings, f"{name}_freq_factor")) for name in ("low", "high"))
        return RopeConfig(**base, scaling="llama3", factor=factor, original_length=original, slow=low, fast=high)
    if kind == "yarn":
        if not settings.get("factor"):
            factor = need(hf, "max_position_embeddings") / original
        return RopeConfig(
            **base | {"original_length": original}, scaling="yarn", factor=factor,
            fast=settings.get("beta_fast") or 32.0, slow=settings.get("beta_slow") or 1.0,
            whole=settings.get("truncate", True),
            magnitude=_yarn_magnitude(settings, factor),
        )  # fmt: skip
    raise ConfigError(f"config.json: rotary positions of type {kind!r} are not supported")


def _yarn_magnitude(settings: dict, factor: float) -> float:
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return magnitude(settings["mscale"]) / magnitude(settings["mscale_all_dim"])
    return magnitude(1.0)


def write_rope(rope: RopeConfig) -> dict:
    """rope_theta and rope_scaling: the layout that old and new readers know."""
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    original = {"original_max_position_embeddings": rope.original_length}
    if rope.scaling == "none":
        scaling = {}
    elif rope.scaling == "llama3":
        scaling |= original | {"low_freq_factor": rope.slow, "high_freq_factor": rope.fast}
    elif rope.scaling == "yarn":
        scaling |= original | {"beta_fast": rope.fast, "beta_slow": rope.slow, "attention_factor": rope.magnitude}
        scaling |= {} if rope.whole else {"truncate": False}
    elif rope.scaling == "longrope":
        scaling |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        scaling |= original | {"attention_factor": rope.magnitude}
    if rope.query_growth:
        scaling = {"rope_type": "default"} | scaling | original | {"llama_4_scaling_beta": rope.query_growth}
    return {"rope_theta": rope.theta, "rope_scaling": scaling or None}


def fraction(value: float) -> float | None:
    """mixer.rope_fraction; None where all of a head rotates, so that layers without rotary positions stay so."""
    return None if value == 1 else float(value)


def rotated_share(cfg: ModelConfig) -> float:
    """Their partial_rotary_factor."""
    value = cfg.mixer.rope_fraction
    return 1.0 if value is None else even_share(cfg, head_dim(cfg)) / head_dim(cfg)


def common(hf: dict, **fields: Any) -> ModelConfig:
    """What nearly all decoders name alike; `fields` add and replace."""
    wanted = {
        "vocab_size": need(hf, "vocab_size"),
        "layers": need(hf, "num_hidden_layers"),
        "width": need(hf, "hidden_size"),
        "heads": need(hf, "num_attention_heads"),
        "kv_heads": hf.get("num_key_value_heads"),
        "head_dim": hf.get("head_dim"),
        "mlp_width": need(hf, "intermediate_size"),
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "mixer": MixerConfig(qk_norm="none"),
    }
    return ModelConfig(**wanted | fields)


def write_common(cfg: ModelConfig) -> dict:
    """Inverse of `common`."""
    return {
        "vocab_size": cfg.vocab_size,
        "num_hidden_layers": cfg.layers,
        "hidden_size": cfg.width,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads or cfg.heads,
        "head_dim": head_dim(cfg),
        "intermediate_size": mlp_width(cfg),
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": cfg.init_std,
    }


SLIDING, FULL = "sliding_attention", "full_attention"


def shortest(names: list[str]) -> tuple[str, ...]:
    """The shortest pattern that gives `names` when repeated over the depth."""
    period = next(p for p in range(1, len(names) + 1) if all(x == names[i % p] for i, x in enumerate(names)))
    return tuple(names[:period])


def windows(types: list[str]) -> tuple[str, ...]:
    """model.attention of their layer_types."""
    ours = {SLIDING: "window", FULL: "softmax"}
    for name in types:
        if name not in ours:
            raise ConfigError(f"config.json: layer type {name!r} is not supported, only {', '.join(ours)}")
    return shortest([ours[name] for name in types])


def layer_types(cfg: ModelConfig) -> list[str]:
    """Inverse of `windows`."""
    pattern = layer_pattern(cfg)
    return [SLIDING if pattern[i % len(pattern)] == "window" else FULL for i in range(cfg.layers)]
