"""Token mixers: projections, shared switches and one mechanism of slm.attention each.

`MIXERS` names them for `model.attention`: each family's file has a table of rows (mixer, the switches of its paper).
"""

import dataclasses
import difflib
from typing import Any

from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.mixers import softmax
from slm.models.mixers.base import Context, Mixer, Row, configured, head_dim

__all__ = [
    "HYBRIDS",
    "MIXERS",
    "Context",
    "Mixer",
    "Row",
    "check_mechanisms",
    "configured",
    "head_dim",
    "layer_pattern",
]

MIXERS: dict[str, Row] = {**softmax.ROWS}
"""Name in `model.attention` to mechanism."""

HYBRIDS: dict[str, tuple[str, ...]] = {
    # 3:1 or 5:1 window:full
    "gemma3": ("window",) * 5 + ("softmax",),
    "olmo3": ("window",) * 3 + ("softmax",),
    # alternating window:full, both with learned sinks
    "gpt_oss": ("sink_window", "sink_softmax"),
}
"""Name in `model.attention` to the layer pattern of a production model, which it stands for."""


def layer_pattern(cfg: ModelConfig) -> tuple[str, ...]:
    """`cfg.attention` with names of hybrids replaced by their patterns."""
    return sum((HYBRIDS.get(name, (name,)) for name in cfg.attention), ())


def mixer(name: str, cfg: ModelConfig, dtype: Any) -> Mixer:
    """The mixer of one layer, called `mixer` in its block."""
    row = MIXERS[name]
    return row.mixer(configured(row, cfg), dtype, name="mixer")


def check_mechanisms(cfg: ModelConfig) -> None:
    """Raises ConfigError where cfg.attention names no mixer, or a switch is set that no layer has."""
    for name in layer_pattern(cfg):
        if name not in MIXERS:
            names = [*MIXERS, *HYBRIDS]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
            raise ConfigError(f"model.attention: no mechanism {name!r}: {hint}")
    rows = [MIXERS[name].defaults for name in layer_pattern(cfg)]
    for field in dataclasses.fields(MixerConfig):
        if getattr(cfg.mixer, field.name) is not None and all(getattr(row, field.name) is None for row in rows):
            has = [name for name, row in MIXERS.items() if getattr(row.defaults, field.name) is not None]
            raise ConfigError(
                f"model.mixer.{field.name} = {getattr(cfg.mixer, field.name)!r}: no layer of "
                f"{' '.join(cfg.attention)} has this switch; unset it. These have it: {', '.join(has)}"
            )
