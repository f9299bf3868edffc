"""Smaller dense models, cut out of larger ones: channels, groups of heads, layers (LLM-Pruner, Ma et al. 2023;
Minitron, Muralidharan et al. 2024). What comes out is an ordinary model, equal to the one it was cut from with those
parts at zero.

What must go together says slm.compress.groups. Sizes of heads stay, for rotary positions pair their channels.
"""

import dataclasses
from typing import Any

import numpy as np

from slm.compress.calibrate import LENGTH, SEQUENCES, calibration_tokens
from slm.compress.groups import cut_layer, cut_outside, highest, stream_eps
from slm.compress.importance import HEADS, MLP, WIDTH, Scores, block_influence, importance
from slm.config import Experiment, ModelConfig, ShrinkConfig
from slm.errors import ConfigError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.layers import mlp_width as width_of_mlp
from slm.models.mixers import head_dim, layers
from slm.models.mixers.softmax import SoftmaxMixer
from slm.models.paths import flat, nested
from slm.models.quantized import check_float_weights
from slm.models.transformer import Transformer

KNOW_THEIR_DEPTH = ("lightning", "hgrn2", "performer", "differential")
"""Mechanisms whose outputs depend on the number of their layer. Those of RWKV only begin by it."""


def shrink(
    model: LanguageModel,
    *,
    layers: int | None = None,
    keep_layers: tuple[int, ...] = (),
    width: int | None = None,
    mlp_width: int | tuple[int, ...] | None = None,
    kv_heads: int | tuple[int, ...] | None = None,
    criterion: str = "activation",
    calibration: Any = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
) -> LanguageModel:
    """A smaller model: fewer layers first, then narrower ones, measured on what is left.

    Args:
      model: a decoder with float weights.
      layers: how many to keep: those with the largest block influence.
      keep_layers: which to keep, from 0, instead; every second one, say, for a student of half the depth (DistilBERT).
      width: channels of the residual stream to keep.
      mlp_width: channels of each feed-forward to keep, or of each layer's own.
      kv_heads: groups of heads with common keys and values to keep, or of each layer's own; query heads go with them.
      criterion: activation, taylor, weight_norm or random (slm.compress.importance).
      calibration: text, or ids (N, T), to measure on; not needed for weight_norm and random without `layers`.
      sequences, length, seed: how much of it, and what is drawn.

    Raises ConfigError, naming the field, for what cannot be.
    """
    if criterion == "l0":
        raise ConfigError(
            "shrink.criterion = l0 is learned in training: set it in a run's config, or take another here"
        )
    spec = ShrinkConfig(layers, tuple(keep_layers), width, mlp_width, kv_heads, criterion)
    check_float_weights(model.params)
    measures = layers is not None or (criterion in ("activation", "taylor") and (width or mlp_width or kv_heads))
    if measures and calibration is None:
        raise ConfigError("shrink measures what to keep: give calibration, a text or ids (N, T)")
    tokens = None if calibration is None else calibration_tokens(model, calibration, sequences, length, seed)
    return shrink_to(model, spec, tokens, seed)


def shrink_to(model: LanguageModel, spec: ShrinkConfig, tokens: np.ndarray | None, seed: int) -> LanguageModel:
    """`shrink` as a config asks for it: to `shrunk_config(model.config.model, spec)`."""
    cfg = model.config.model
    check_shrinkable(cfg)
    if spec.criterion == "taylor" and cfg.head != "lm":
        raise ConfigError(
            f"shrink.criterion = taylor: model.head = {cfg.head} has no loss of the next token; use activation"
        )
    keep = spec.keep_layers
    if spec.layers is not None and not keep:
        with_layers(cfg, (0,), spec.layers)
        keep = tuple(sorted(np.argsort(-block_influence(model, tokens), kind="stable")[: spec.layers].tolist()))
    model = _with_layers(model, keep)
    if narrowed(model.config.model, spec.width, spec.mlp_width, spec.kv_heads) == model.config.model:
        return model
    return cut(model, spec, importance(model, spec.criterion, tokens, seed))


def cut(model: LanguageModel, spec: ShrinkConfig, scores: Scores, keep: tuple[int, ...] = ()) -> LanguageModel:
    """The layers `keep`, or all of them, with the parts of the highest scores, as many as `spec` says.

    `scores` are those of all layers of `model`; of heads there may be one for each group.
    """
    if keep:
        scores = scores | {name: [scores[name][number] for number in keep] for name in (MLP, HEADS)}
        model = _with_layers(model, keep)
    smaller = narrowed(model.config.model, spec.width, spec.mlp_width, spec.kv_heads)
    return _with(model, smaller, _narrow_params(model, smaller, scores))


def shrunk_config(cfg: ModelConfig, spec: ShrinkConfig) -> ModelConfig:
    """`cfg` after shrinking, from sizes alone. Raises ConfigError for what cannot be."""
    check_shrinkable(cfg)
    if spec.layers is not None and not spec.keep_layers and len({layer.mechanism for layer in layers(cfg)}) > 1:
        raise ConfigError(
            f"shrink.layers = {spec.layers}: layers of {' '.join(cfg.attention)} differ, so their pattern depends on "
            "which go: name those that stay in shrink.keep_layers"
        )
    keep = spec.keep_layers or tuple(range(spec.layers or cfg.layers))
    return narrowed(with_layers(cfg, keep, spec.layers), spec.width, spec.mlp_width, spec.kv_heads)


def shipped_config(cfg: Experiment) -> Experiment:
    """The config of the model that a run of `cfg` makes: of the smaller one, if it learns what goes."""
    if not cfg.shrink.learned:
        return cfg
    return dataclasses.replace(cfg, model=shrunk_config(cfg.model, cfg.shrink), shrink=ShrinkConfig())


def check_shrinkable(cfg: ModelConfig) -> None:
    """Raises ConfigError for a model with parts that shrinking does not know."""
    for field, value in (("shared_layers", False), ("bottleneck", None), ("causal", True)):
        if getattr(cfg, field) != value:
            raise ConfigError(
                f"shrink: model.{field} = {getattr(cfg, field)}: only decoders whose layers have parameters of their "
                "own and no bottleneck can be cut; train a smaller model with distillation instead"
            )


def with_layers(cfg: ModelConfig, keep: tuple[int, ...], wanted: int | None = None) -> ModelConfig:
    """`cfg` with these layers alone. Raises ConfigError."""
    if wanted is not None and not 1 <= wanted <= cfg.layers:
        raise ConfigError(f"shrink.layers = {wanted}: the model has {cfg.layers}")
    if list(keep) != sorted(set(keep)):
        raise ConfigError(f"shrink.keep_layers = {keep}: numbers of layers from 0, each once, in rising order")
    if any(not 0 <= number < cfg.layers for number in keep):
        raise ConfigError(f"shrink.keep_layers = {keep}: the model has layers 0 to {cfg.layers - 1}")
    if len(keep) == cfg.layers:
        return cfg
    every = layers(cfg)
    for number in keep:
        if every[number].mechanism in KNOW_THEIR_DEPTH:
            raise ConfigError(
                f"shrink.layers, shrink.keep_layers: layers of {every[number].mechanism} compute with their number and "
                "that of all, so none can go; shrink mlp_width instead"
            )
    own = {
        name: tuple(values[number] for number in keep)
        for name in ("layer_heads", "layer_kv_heads", "layer_mlp_widths")
        if (values := getattr(cfg, name))
    }
    pattern = _shortest(tuple(every[number].mechanism for number in keep))
    first = cfg.first_norm or keep[0] != 0
    return dataclasses.replace(cfg, layers=len(keep), attention=pattern, first_norm=first, **own)


def narrowed(cfg: ModelConfig, width=None, mlp_width=None, kv_heads=None) -> ModelConfig:
    """`cfg` with narrower parts. Raises ConfigError."""
    changes: dict[str, Any] = {}
    if mlp_width is not None:
        now = [width_of_mlp(layer.cfg) for layer in layers(cfg)]
        changes |= _sizes("mlp_width", "layer_mlp_widths", mlp_width, now)
        if cfg.mlp == "none":
            raise ConfigError(f"shrink.mlp_width = {mlp_width}: the model has no feed-forward (model.mlp = none)")
    if kv_heads is not None:
        check_softmax(cfg, "kv_heads")
        now = [layer.cfg.kv_heads or layer.cfg.heads for layer in layers(cfg)]
        sizes = _sizes("kv_heads", "layer_kv_heads", kv_heads, now)
        ratios = [layer.cfg.heads // n for layer, n in zip(layers(cfg), now)]
        if sizes["layer_kv_heads"] or len(set(ratios)) > 1:
            each = sizes["layer_kv_heads"] or (kv_heads,) * cfg.layers
            changes |= {"layer_kv_heads": each, "layer_heads": tuple(n * r for n, r in zip(each, ratios))}
        else:
            changes |= sizes | {"heads": kv_heads * ratios[0], "layer_heads": ()}
        changes["head_dim"] = head_dim(cfg)
    if width is not None:
        check_softmax(cfg, "width")
        if not 1 <= width <= cfg.width:
            raise ConfigError(f"shrink.width = {width}: the model has {cfg.width} channels")
        for field, ok in (
            ("norm", cfg.norm in ("rmsnorm", "zero_centered_rmsnorm")),
            ("embedding_width", not cfg.embedding_width),
            ("head_activation", cfg.head_activation == "none"),
        ):
            if not ok:
                raise ConfigError(
                    f"shrink.width = {width}: model.{field} = {getattr(cfg, field)}: needs RMSNorm, embeddings of full "
                    "width, and no dense layer in front of the head; leave the width, and shrink layers, mlp_width or "
                    "kv_heads"
                )
        same = {"head_dim": head_dim(cfg)} | ({"mlp_width": width_of_mlp(cfg)} if cfg.mlp != "none" else {})
        changes = {"width": width, "norm_eps": stream_eps(cfg, width)} | same | changes
    return dataclasses.replace(cfg, **changes)


def _sizes(name: str, own: str, wanted, now: list[int]) -> dict[str, Any]:
    """Fields for a size of all layers, or of each."""
    each = (wanted,) * len(now) if isinstance(wanted, int) else tuple(wanted)
    if len(each) != len(now):
        raise ConfigError(f"shrink.{name} = {wanted}: give one number, or one for each of {len(now)} layers")
    for number, (new, old) in enumerate(zip(each, now)):
        if not 1 <= new <= old:
            raise ConfigError(f"shrink.{name} = {new}: layer {number} has {old}")
    return {name: wanted, own: ()} if isinstance(wanted, int) else {own: each}


def check_softmax(cfg: ModelConfig, field: str) -> None:
    """Raises ConfigError, naming the field, unless it is known what goes together in all mixers."""
    for layer in layers(cfg):
        if not issubclass(layer.mixer, SoftmaxMixer):
            raise ConfigError(
                f"shrink.{field}: it is not known what goes together in layers of {layer.mechanism}; leave this size, "
                "and shrink layers or mlp_width"
            )


def _shortest(pattern: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern that repeats to this one."""
    for size in range(1, len(pattern) + 1):
        if all(name == pattern[i % size] for i, name in enumerate(pattern)):
            return pattern[:size]
    return pattern


def _with_layers(model: LanguageModel, keep: tuple[int, ...]) -> LanguageModel:
    """`model` with these layers alone; all of them if none is named."""
    if not keep:
        return model
    chosen, where = with_layers(model.config.model, keep), layerwise.places(model.transformer)
    rows = [layerwise.layer_params(model.params, where[number]) for number in keep]
    return _with(model, chosen, layerwise.assembled(Transformer(chosen), model.params, rows))


def _with(model: LanguageModel, cfg: ModelConfig, params: Any) -> LanguageModel:
    return dataclasses.replace(model, params=params, config=dataclasses.replace(model.config, model=cfg))


def _narrow_params(model: LanguageModel, smaller: ModelConfig, scores) -> dict:
    old = model.config.model
    stream = {WIDTH: highest(scores[WIDTH][0], smaller.width)} if smaller.width < old.width else {}
    rows = []
    for number, (was, now, place) in enumerate(
        zip(layers(old), layers(smaller), layerwise.places(model.transformer), strict=True)
    ):
        kept = dict(stream)
        groups, left = (layer.cfg.kv_heads or layer.cfg.heads for layer in (was, now))
        if left < groups:
            kept[HEADS] = highest(scores[HEADS][number].reshape(groups, -1).sum(1), left)
        if old.mlp != "none" and width_of_mlp(now.cfg) < width_of_mlp(was.cfg):
            kept[MLP] = highest(scores[MLP][number], width_of_mlp(now.cfg))
        rows.append(nested(cut_layer(flat(layerwise.layer_params(model.params, place)), kept, old)))
    outer = {name: part for name, part in model.params.items() if name not in model.transformer.groups}
    return layerwise.assembled(Transformer(smaller), nested(cut_outside(flat(outer), stream, old)), rows)
