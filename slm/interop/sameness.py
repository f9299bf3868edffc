"""Whether two configs describe the same function of the same parameters."""

import dataclasses
from typing import Any

from slm.config import MixerConfig, ModelConfig
from slm.models.layers import mlp_width
from slm.models.mixers import head_dim, layers


def same_model(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configs describe the same function of the same parameters."""
    return _essence(a) == _essence(b)


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields, such as `model.mixer.scale`, in which two models differ that same_model tells apart; else empty."""
    if a.layers != b.layers:
        return ["model.layers"]
    (layers_a, whole_a), (layers_b, whole_b) = _essence(a), _essence(b)
    found: dict[str, None] = {}
    for (mixer_a, one_a), (mixer_b, one_b) in zip(layers_a, layers_b, strict=True):
        found |= {} if mixer_a is mixer_b else {"model.attention": None}
        found |= dict.fromkeys(_differing(one_a, one_b, "model."))
    return [*found, *(name for name in _differing(whole_a, whole_b, "model.") if name not in found)]


def _differing(a: Any, b: Any, path: str) -> list[str]:
    found = []
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x):
            found += _differing(x, y, f"{path}{field.name}.")
        elif x != y:
            found.append(path + field.name)
    return found


def _essence(cfg: ModelConfig):
    free = {"scan": True, "remat": "dots", "init_std": 0.02, "init_from": None, "attention": (), "layer_heads": (),
            "layer_kv_heads": (), "layer_mlp_widths": ()}  # fmt: skip

    def plain(one: ModelConfig, mixer: MixerConfig) -> ModelConfig:
        sizes = {"head_dim": head_dim(one), "kv_heads": one.kv_heads or one.heads, "mlp_width": mlp_width(one)}
        return dataclasses.replace(one, mixer=mixer, **free, **sizes)

    every = []
    for layer in layers(cfg):
        mixer = dataclasses.replace(layer.configured.mixer, implementation=None, chunk=None)
        every.append((layer.mixer, plain(layer.configured, mixer)))
    return every, plain(cfg, MixerConfig())
