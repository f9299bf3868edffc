"""Token mixers: projections, shared switches and one mechanism of slm.attention each.

`MIXERS` names them for `model.attention`: each family's file has a table of rows (mixer, the switches of its paper).
"""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.mixers import (
    conv,
    decay,
    delta,
    differential,
    forgetting,
    latent,
    linear,
    mamba,
    rglru,
    rwkv,
    selection,
    softmax,
    sparse,
)
from slm.models.mixers.base import Context, Mixer, Row, configured, head_dim

__all__ = [
    "HYBRIDS",
    "MIXERS",
    "SHIPPED",
    "Context",
    "Layer",
    "Mixer",
    "Row",
    "check_mechanisms",
    "configured",
    "head_dim",
    "layer_pattern",
    "layers",
]

MIXERS: dict[str, Row] = {
    **softmax.ROWS,
    **decay.ROWS,
    **delta.ROWS,
    **rwkv.ROWS,
    **mamba.ROWS,
    **rglru.ROWS,
    **linear.ROWS,
    **conv.ROWS,
    **latent.ROWS,
    **forgetting.ROWS,
    **differential.ROWS,
    **selection.ROWS,
    **sparse.ROWS,
}
"""Name in `model.attention` to mechanism. A program adds its own: MIXERS["mine"] = Row(MyMixer, MixerConfig(...))."""

SHIPPED: Mapping[str, Row] = types.MappingProxyType(dict(MIXERS))
"""The rows of this package, which every process knows."""

HYBRIDS: dict[str, tuple[str, ...]] = {
    # 3:1 or 5:1 window:full
    "gemma3": ("window",) * 5 + ("softmax",),
    "olmo3": ("window",) * 3 + ("softmax",),
    # 3:1 chunks:full without positions
    "llama4": ("chunked_local",) * 3 + ("nope_softmax",),
    # alternating window:full, both with learned sinks
    "gpt_oss": ("sink_window", "sink_softmax"),
    # 3:1 Kimi Delta Attention:latent attention without positions
    "kimi_linear": ("kda",) * 3 + ("nope_mla",),
    # 2:1 RG-LRU:window
    "recurrent_gemma": ("rglru", "rglru", "window"),
    # 3:1 Gated DeltaNet:gated softmax
    "qwen3_next": ("gated_delta",) * 3 + ("gated_softmax",),
    # 3:1 Gated DeltaNet with negative eigenvalues:softmax
    "olmo_hybrid": ("gated_delta_negative",) * 3 + ("softmax",),
}
"""Name in `model.attention` to the layer pattern of a production model, which it stands for."""

BIDIRECTIONAL = ("linformer", "nystrom")
"""Mechanisms of slm.attention that see the future, so that no decoder can use them."""


def layer_pattern(cfg: ModelConfig) -> tuple[str, ...]:
    """`cfg.attention` with names of hybrids replaced by their patterns."""
    return sum((HYBRIDS.get(name, (name,)) for name in cfg.attention), ())


class Layer(NamedTuple):
    """What tells one layer from another."""

    mechanism: str
    cfg: ModelConfig
    """With this layer's own sizes, before `configured`."""

    @property
    def configured(self) -> ModelConfig:
        return configured(MIXERS[self.mechanism], self.cfg)

    @property
    def mixer(self) -> type[Mixer]:
        return MIXERS[self.mechanism].mixer

    @property
    def local(self) -> bool:
        """Whether rope.local_theta holds for it."""
        return self.cfg.rope.local_theta is not None and bool(self.configured.mixer.window)


def layers(cfg: ModelConfig) -> list[Layer]:
    """All layers in order of depth. Raises ConfigError where sizes are not given for each of them."""
    own = {"heads": cfg.layer_heads, "kv_heads": cfg.layer_kv_heads, "mlp_width": cfg.layer_mlp_widths}
    for field, values in own.items():
        if values and len(values) != cfg.layers:
            raise ConfigError(
                f"model.layer_{field.rstrip('s')}s has {len(values)} values: give model.layers = {cfg.layers}"
            )
    # A head keeps its size where their number changes.
    whole = dataclasses.replace(cfg, head_dim=head_dim(cfg)) if cfg.layer_heads else cfg
    pattern = layer_pattern(cfg)
    return [
        Layer(
            pattern[i % len(pattern)],
            dataclasses.replace(
                whole,
                first_norm=whole.first_norm or i > 0,
                **{field: values[i] for field, values in own.items() if values},
            ),
        )
        for i in range(cfg.layers)
    ]


def mixer(name: str, cfg: ModelConfig, dtype: Any) -> Mixer:
    """The mixer of one layer, called `mixer` in its block."""
    row = MIXERS[name]
    return row.mixer(configured(row, cfg), dtype, name="mixer")


def check_mechanisms(cfg: ModelConfig) -> None:
    """Raises ConfigError where cfg.attention names no mixer, a switch is set that no layer has, or layers cannot be
    joined as the config asks."""
    for name in layer_pattern(cfg):
        if name in BIDIRECTIONAL:
            raise ConfigError(
                f"model.attention: {name} sees the future, which a decoder must not: use slm.attention.{name}_attention"
            )
        if name not in MIXERS:
            names = [*MIXERS, *HYBRIDS]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
            raise ConfigError(f"model.attention: no mechanism {name!r}: {hint}")
        if not cfg.causal and not MIXERS[name].mixer.bidirectional:
            both = [other for other, row in MIXERS.items() if row.mixer.bidirectional]
            raise ConfigError(f"model.causal = false: layers of {name} see only the past; use {', '.join(both)}")
    if not cfg.first_norm and cfg.residual == "post":
        raise ConfigError("model.first_norm = false: no layer of model.residual = post has such a norm; leave it true")
    other = [name for name in layer_pattern(cfg) if not issubclass(MIXERS[name].mixer, softmax.SoftmaxMixer)]
    if cfg.bottleneck and (cfg.residual != "post" or other or cfg.mlp == "none"):
        raise ConfigError(
            f"model.bottleneck = {cfg.bottleneck} needs model.residual = post, a feed-forward, and softmax mixers"
        )
    if cfg.feedforwards > 1 and not cfg.bottleneck:
        raise ConfigError(f"model.feedforwards = {cfg.feedforwards}: only blocks with model.bottleneck have several")
    period = len(layer_pattern(cfg))
    if cfg.shared_layers and (not cfg.first_norm or cfg.layers % period or len(set(layers(cfg))) > period):
        raise ConfigError(
            f"model.shared_layers: model.layers = {cfg.layers} must be a multiple of the {period} of model.attention, "
            "and all repeats of equal sizes, with a norm in the first layer"
        )
    rows = [MIXERS[name].defaults for name in layer_pattern(cfg)]
    for field in dataclasses.fields(MixerConfig):
        if getattr(cfg.mixer, field.name) is not None and all(getattr(row, field.name) is None for row in rows):
            has = [name for name, row in MIXERS.items() if getattr(row.defaults, field.name) is not None]
            raise ConfigError(
                f"model.mixer.{field.name} = {getattr(cfg.mixer, field.name)!r}: no layer of "
                f"{' '.join(cfg.attention)} has this switch; unset it. These have it: {', '.join(has)}"
            )
