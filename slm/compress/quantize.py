"""Weights in fewer bits, after training."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from slm.compress.calibrate import LENGTH, SEQUENCES, calibration_tokens
from slm.compress.schemes import Scheme
from slm.compress.targets import quantizable
from slm.errors import ConfigError
from slm.models.heads import check_next_token
from slm.models.language_model import LanguageModel
from slm.models.quantized import check_float_weights, dequantized
from slm.training.transforms import flat, replaced

EMBEDDING, HEAD = "embed/embedding", "head/kernel"
Schemes = dict[str, Scheme]
"""By name of a matrix."""


class Rounded(NamedTuple):
    """What a method has found."""

    model: LanguageModel
    """Whose matrices are to be packed: changed, or as they were."""
    grids: dict[str, tuple[jax.Array, jax.Array | None]]
    """Name of a matrix to (scale, zero), where they are not those of `Scheme.fit`."""


Method = Callable[..., Rounded]
"""(model, schemes, tokens or None, **settings) -> Rounded."""


def nearest(model: LanguageModel, schemes: Schemes, tokens: Any = None) -> Rounded:
    """Round to nearest (RTN): each weight by itself."""
    return Rounded(model, {})


METHODS: dict[str, tuple[Method, bool]] = {"rtn": (nearest, False)}
"""Name in slm.quantize to (method, whether it needs calibration)."""


def quantize(
    model: LanguageModel,
    scheme: str,
    *,
    method: str = "rtn",
    group_size: int | None = None,
    symmetric: bool = True,
    activations: str | None = None,
    embedding: str | None = None,
    skip: tuple[str, ...] = (),
    calibration: Any = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    **settings: Any,
) -> LanguageModel:
    """The model with the matrices of its layers on a grid of few bits; norms, biases and the like stay as they are.

    For running it, saving it (slm.save) or exporting it; `slm.dequantize` makes floats of it again.

    Args:
      model: one that predicts the next token, with float weights.
      scheme: int8, int4, int3, int2, nf4, ternary or fp8 (slm.compress.schemes).
      method: a name in METHODS: how the grid and the weights on it are chosen.
      group_size: inputs that share a scale; None: all of an output.
      symmetric: False: with a float zero point.
      activations: int8: products of integers, each token's activations rounded by themselves (W8A8).
      embedding: `int8` or `float`: what the embedding and the output projection become; None: int8 for 8-bit schemes;
        with fewer bits it must be said, for they are a large part of a small model.
      skip: matrices that stay as they are: regular expressions of whole names.
      calibration: a text, or (N, T) ids, for methods that measure what matrices are given.
      sequences, length: how much of it.
      seed: of what is drawn from it.
      settings: of the method.

    Raises ConfigError, naming the field, for what cannot be.
    """
    check_next_token(model.config.model)
    check_float_weights(model.params)
    if method not in METHODS:
        raise ConfigError(f"method = {method!r}: one of {', '.join(METHODS)}")
    grid = Scheme(scheme, group_size, symmetric, activations)
    function, calibrates = METHODS[method]
    if calibrates and calibration is None:
        raise ConfigError(f"method = {method} measures what matrices are given: pass calibration, a text or token ids")
    if embedding not in (None, "int8", "float"):
        raise ConfigError(f"embedding = {embedding!r}: int8 or float")
    if embedding is None and grid.bits < 8:
        raise ConfigError(
            f"scheme = {scheme}: say what becomes of the embedding and the output projection: embedding = int8 or float"
        )
    schemes = layer_schemes(model.params, grid, skip)
    tokens = None if calibration is None else calibration_tokens(model, calibration, sequences, length, seed)
    found = function(model, schemes, *([tokens] if calibrates else []), **settings)
    if embedding != "float":
        schemes = schemes | outer_schemes(found.model.params)
    return dataclasses.replace(found.model, params=packed(found.model.params, schemes, found.grids))


def quantize_by_name(model: LanguageModel, spec: str) -> LanguageModel:
    """`quantize` by SCHEME or SCHEME:GROUP, to nearest, with an embedding of 8 bits: what command lines take."""
    scheme, _, group = spec.partition(":")
    if group and not group.isdecimal():
        raise ConfigError(f"--quantize {spec}: must be SCHEME or SCHEME:GROUP, such as int4:32")
    return quantize(model, scheme, group_size=int(group) if group else None, embedding="int8")


def dequantize(model: LanguageModel) -> LanguageModel:
    """The model with float weights: those that its quantized ones stand for. It can be trained and changed again."""
    return dataclasses.replace(model, params=dequantized(model.params))


def layer_schemes(params: Any, scheme: Scheme, skip: tuple[str, ...] = (), field: str = "skip") -> Schemes:
    """`scheme` for every matrix of layers.

    Raises ConfigError for patterns that match none, or groups that do not divide a matrix.
    """
    names, leaves = quantizable(params, skip, field), flat(params)
    for name in names:
        scheme.groups(leaves[name].shape[-2], name)
    return dict.fromkeys(names, scheme)


def outer_schemes(params: Any) -> Schemes:
    """8 bits for what stands outside of layers: the embedding, and the output projection where it is one of its own."""
    return {EMBEDDING: Scheme("int8", axis=-1)} | ({HEAD: Scheme("int8")} if HEAD in flat(params) else {})


def packed(params: Any, schemes: Schemes, grids: dict[str, tuple] | None = None) -> Any:
    """Parameters with matrices as they are stored."""
    leaves, grids = flat(params), grids or {}
    return replaced(params, {name: s.pack(leaves[name], *grids.get(name, ())) for name, s in schemes.items()})
