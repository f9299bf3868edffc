"""What goes together when a model gets narrower: for each parameter, what its axes count, and how to cut along them.

A channel of a feed-forward is a column of `up` and `gate` with its bias, and a row of `down`. A group of heads with
common keys and values is its columns of `query`, `key`, `value` and `gate` with their biases, its sinks, and its rows
of `out`. A channel of the residual stream is one entry of whatever reads it, writes to it or norms it.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from slm.compress.importance import HEADS, MLP, WIDTH
from slm.config import ModelConfig
from slm.errors import ConfigError

Axes = tuple[str | None, ...]
"""What each axis of a parameter counts: WIDTH, HEADS (in order of groups), MLP, or None: something that stays."""
LAYER: dict[str, Axes] = {
    "attention_norm/scale": (WIDTH,),
    "attention_post_norm/scale": (WIDTH,),
    "mixer/query/kernel": (WIDTH, HEADS),
    "mixer/query/bias": (HEADS,),
    "mixer/query_norm/scale": (None,),
    "mixer/key/kernel": (WIDTH, HEADS),
    "mixer/key/bias": (HEADS,),
    "mixer/key_norm/scale": (None,),
    "mixer/value/kernel": (WIDTH, HEADS),
    "mixer/value/bias": (HEADS,),
    "mixer/sink": (HEADS,),
    "mixer/gate_down/kernel": (WIDTH, None),
    "mixer/gate_down/bias": (None,),
    "mixer/gate/kernel": (WIDTH, HEADS),
    "mixer/gate/bias": (HEADS,),
    "mixer/out/kernel": (HEADS, WIDTH),
    "mixer/out/bias": (WIDTH,),
    "mlp_norm/scale": (WIDTH,),
    "mlp_post_norm/scale": (WIDTH,),
    "mlp/up/kernel": (WIDTH, MLP),
    "mlp/up/bias": (MLP,),
    "mlp/gate/kernel": (WIDTH, MLP),
    "mlp/gate/bias": (MLP,),
    "mlp/down/kernel": (MLP, WIDTH),
    "mlp/down/bias": (WIDTH,),
}
"""Parameters of a layer with a softmax mixer; of other mixers' layers those outside of the mixer."""
LOW_RANK_GATE: dict[str, Axes] = {"mixer/gate/kernel": (None, HEADS)}
"""Behind a `gate_down`, which reads the stream in its place."""
OUTSIDE: dict[str, Axes] = {
    "embed/embedding": (None, WIDTH),
    "embed/position": (None, WIDTH),
    "embed/token_type": (None, WIDTH),
    "embed/norm/scale": (WIDTH,),
    "final_norm/scale": (WIDTH,),
    "head/kernel": (WIDTH, None),
    "head/bias": (None,),
    "head/classifier/kernel": (WIDTH, None),
    "head/classifier/bias": (None,),
}
"""Parameters outside of layers, of models without a dense layer in front of the head."""


def reads(axes: Axes, kind: str) -> bool:
    """Whether a parameter with these axes is the matrix that reads parts of this kind, MLP or HEADS: where its rows are
    zero, those parts might as well not be."""
    return len(axes) == 2 and axes[0] == kind


def writes_to_the_stream(name: str, axes: Axes) -> bool:
    """Whether channels of the stream are sums of what this parameter says. Norms only scale what is there."""
    return axes[-1] == WIDTH and not name.endswith("/scale")


class Kept(NamedTuple):
    """What stays of `count` parts."""

    count: int
    numbers: np.ndarray
    """In rising order."""


def highest(scores: np.ndarray, count: int) -> Kept:
    """The `count` parts of the highest scores; of equals the first."""
    return Kept(len(scores), np.sort(np.argsort(-scores, kind="stable")[:count]))


def cut_layer(leaves: dict[str, Any], kept: Mapping[str, Kept], cfg: ModelConfig) -> dict[str, Any]:
    """One layer's parameters, by name, with only these parts of WIDTH, HEADS (groups) and MLP.

    Raises ConfigError, naming the parameter, where it is not known what of it belongs to a channel of the stream or to
    a head.
    """
    table = LAYER | LOW_RANK_GATE if "mixer/gate_down/kernel" in leaves else LAYER
    found = _cut(leaves, table, kept, cfg)
    if WIDTH in kept:
        # model.norm_eps grows with the norms of the stream in mind (`stream_eps`); queries and keys grow with it, so
        # that their own norms, whose channels all stay, say what they said.
        for part in ("query", "key"):
            for name in (f"mixer/{part}/kernel", f"mixer/{part}/bias"):
                if f"mixer/{part}_norm/scale" in leaves and name in leaves:
                    found[name] = found[name] * _fewer(kept)
    return found


def cut_outside(leaves: dict[str, Any], kept: Mapping[str, Kept], cfg: ModelConfig) -> dict[str, Any]:
    """Parameters outside of layers, by name, with only these channels of WIDTH. Raises ConfigError as `cut_layer`."""
    return _cut(leaves, OUTSIDE, kept, cfg)


def stream_eps(cfg: ModelConfig, width: int) -> float:
    """norm_eps of the smaller model. Its means of squares are over fewer channels, and so larger by a factor: with an
    epsilon that is larger by the same, and scales by its root, norms say what they said."""
    return cfg.norm_eps * cfg.width / width


def _cut(leaves, table: Mapping[str, Axes], kept: Mapping[str, Kept], cfg: ModelConfig) -> dict[str, Any]:
    found = {}
    for name, leaf in leaves.items():
        axes = table.get(name)
        if axes is None and (WIDTH in kept or (HEADS in kept and name.startswith("mixer/"))):
            field = "width" if WIDTH in kept else "kv_heads"
            raise ConfigError(
                f"shrink.{field}: it is not known what goes together in the parameter {name}; leave this size, and "
                "shrink layers or mlp_width"
            )
        for axis, kind in enumerate(axes or ()):
            if kind in kept:
                leaf = _taken(leaf, axis, kept[kind])
        if axes == (WIDTH,) and WIDTH in kept and name.endswith("/scale"):
            shift = 1 if cfg.norm == "zero_centered_rmsnorm" else 0
            leaf = (leaf + shift) * _fewer(kept) - shift
        found[name] = leaf
    return found


def _fewer(kept: Mapping[str, Kept]) -> float:
    """Root of the number of channels of the stream before by that after."""
    return math.sqrt(kept[WIDTH].count / len(kept[WIDTH].numbers))


def _taken(leaf, axis: int, kept: Kept):
    """`leaf` with these of the equal parts that an axis consists of."""
    before, after = leaf.shape[:axis], leaf.shape[axis + 1 :]
    parts = leaf.reshape(*before, kept.count, -1, *after)
    return parts.take(kept.numbers, axis).reshape(*before, -1, *after)
