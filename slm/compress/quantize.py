"""Weights in fewer bits, after training: slm.quantize."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slm.compress.calibrate import LENGTH, SEQUENCES, calibration_tokens
from slm.compress.schemes import Scheme
from slm.compress.targets import matrices
from slm.errors import ConfigError
from slm.models.heads import check_next_token
from slm.models.language_model import LanguageModel
from slm.models.paths import flat
from slm.models.quantized import QuantizedMatrix, check_float_weights, dequantized
from slm.training.transforms import replaced

APART = ("key_up", "value_up", "forget")
"""Parts of names of matrices that layers do more with than multiply by them, or in higher precision."""
TABLES = {"embed/embedding": -1, "head/kernel": -2}
"""Matrices outside of layers, which get 8 bits at least, to the axis of their inputs."""
PREPARE, FINISH = ("awq", "smoothquant", "rotate"), ("rtn", "clip", "gptq", "hqq")
"""Methods that change a model into an equal one that loses less, and those that choose codes."""
NEED_TEXT = ("awq", "smoothquant", "clip", "gptq")
PRUNED = 0.15
"""Share of zeros from which on a matrix counts as pruned; rounding to 4 bits leaves some 10 %."""


def quantize(
    model: LanguageModel,
    scheme: str | None = None,
    *,
    method: str = "rtn",
    group_size: int | None = None,
    symmetric: bool | None = None,
    activations: str = "none",
    embedding: bool | None = None,
    skip: tuple[str, ...] = (),
    calibration: Any = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    damping: float = 0.01,
    act_order: bool = False,
    migration: float = 0.5,
    budget_bits: float | None = None,
    budget_by: str = "matrix",
    fill_zeros: bool = False,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> LanguageModel:
    """The model with the matrices of its layers in fewer bits. It runs, is saved by slm.save, and cannot be trained.

    Args:
      model: one that predicts the next token, with float weights.
      scheme: int8, int4, int3 (stored in 4 bits), int2, nf4, ternary or fp8: see slm.compress.schemes. None: what
        budget_bits allows.
      method: `rtn`, rounding to nearest; `clip`, the same in narrower ranges where outputs err less; `gptq`, column by
        column, later ones making up for earlier ones; `hqq`, zero points for small errors, without data; or, before one
        of these (`rotate+gptq`), a change of the model into an equal one: `awq`, larger scales for channels of large
        inputs (alone: before clip, as by its authors; `awq+rtn`: without); `smoothquant`, smaller inputs and larger
        weights, for activations = int8 (alone: before rtn); `rotate`, a rotated residual stream, without outliers
        (before rtn).
      group_size: inputs that share a scale; None: all of an output.
      symmetric: integers around zero; False: from a float zero point. None: False for hqq, else True.
      activations: `int8`: inputs of matrices are rounded too, each token by itself, and products are of integers.
      embedding: also the embedding and the head, in int8 (of the same group_size); None: as for int8 matrices, and
        refused for others where embedding and head are one, since it is most of what is left and read twice.
      skip: matrices that stay float: regular expressions of whole names, such as `.*/mlp/down/kernel`.
      calibration: text, or ids (N, T), for awq, smoothquant, clip and gptq.
      sequences, length, seed: how much of it.
      damping, act_order: of gptq (slm.compress.gptq). migration: of smoothquant, alpha in its paper.
      budget_bits: most bits a weight in layers, scales included, instead of a scheme: each matrix gets int2, int4 or
        int8 by what it is measured to lose (slm.compress.mixed). Needs calibration.
      budget_by: `matrix`: all layers of a stack have the same; `layer`: each layer by itself, which takes the stack
        apart, so that the model takes longer to compile.
      fill_zeros: allow what fills a pruned model's zeros: grids without a zero (symmetric False, hqq), and rotate.
      progress: called with (layers done, layers), for each sweep over the layers.

    Raises ConfigError, naming the field, for what cannot be, and DataError for too short a text.
    """
    check_next_token(model.config.model)
    check_float_weights(model.params)
    before, last = parse_method(method)
    symmetric = (last != "hqq") if symmetric is None else symmetric
    if (scheme is None) == (budget_bits is None) or budget_by not in ("matrix", "layer"):
        raise ConfigError(
            f"quantize.scheme = {scheme}, budget_bits = {budget_bits}, budget_by = {budget_by}: give a scheme, or bits "
            "and by what, matrix or layer, they are dealt out"
        )
    one = Scheme(scheme or "int2", group_size, symmetric, activations)
    if embedding is None:
        if one.bits < 8 and model.config.model.tied:
            raise ConfigError(
                f"quantize.embedding: {scheme or 'few bits'} with an embedding that is the head too: say True, for 8 "
                "bits, or False"
            )
        embedding = one.bits == 8
    schemes = dict.fromkeys(quantizable(model.params, skip), one)
    check_sizes(model.params, schemes)
    if not fill_zeros:
        check_zeros(model.params, schemes, "rotate" in before)
    tokens = None
    needing = [f"method = {part}" for part in (*before, last) if part in NEED_TEXT]
    if needing := needing + ["budget_bits"] * (budget_bits is not None):
        if calibration is None:
            raise ConfigError(f"quantize.{needing[0]} needs calibration: give a text, or ids (N, T)")
        tokens = calibration_tokens(model, calibration, sequences, length, seed)
    if budget_bits is not None:
        from slm.compress import mixed

        model = mixed.unrolled(model) if budget_by == "layer" else model
        schemes = mixed.choose(model, quantizable(model.params, skip), one, budget_bits, budget_by, tokens)
    for part in before:
        model = _prepared(part, model, one, schemes, tokens, migration, seed, progress)
    quantized = _finished(last, model, schemes, tokens, damping, act_order, progress)
    if embedding:
        quantized |= tables(model.params, group_size)
    return with_matrices(model, quantized)


def parse_method(method: str) -> tuple[tuple[str, ...], str]:
    """(changes of the model, in order; the choice of codes) of `awq+gptq` and the like. Raises ConfigError."""
    parts = method.split("+")
    last = parts.pop() if parts[-1] in FINISH else "clip" if parts[-1] == "awq" else "rtn"
    if not set(parts) <= set(PREPARE):
        raise ConfigError(
            f"quantize.method = {method!r}: one of {', '.join(FINISH)}, with {', '.join(PREPARE)} before it and a +"
        )
    return tuple(parts), last


def quantizable(params: Any, skip: tuple[str, ...] = ()) -> list[str]:
    """Names of the matrices inside layers that can be quantized, but for those that `skip` matches whole.

    Raises ConfigError as slm.compress.targets.matrices does.
    """
    found = matrices(params, skip, "quantize.skip")
    return [name for name in found if not any(part in name.split("/")[-2] for part in APART)]


def check_sizes(params: Any, schemes: dict[str, Scheme]) -> None:
    """Raises ConfigError if groups do not divide a matrix."""
    found = flat(params)
    for name, scheme in schemes.items():
        scheme.check(name, found[name].shape[-2])


def check_zeros(params: Any, schemes: dict[str, Scheme], rotated: bool) -> None:
    """Raises ConfigError if a grid without a zero, or a rotation, would fill those of a pruned matrix."""
    found = flat(params)
    for name, scheme in schemes.items():
        if (rotated or not scheme.symmetric) and (share := float((found[name] == 0).mean())) >= PRUNED:
            what, fix = "symmetric = false", "symmetric=True (with gptq instead of hqq)"
            if rotated:
                what, fix = "method = rotate", "another method, such as gptq"
            raise ConfigError(
                f"quantize.{what}, {scheme.name}: {share:.0%} of {name} is zero, and would not be afterwards: take "
                f"{fix}, which keeps a pruned model's zeros, or fill_zeros=True if they may go"
            )


def tables(params: Any, group_size: int | None = None) -> dict[str, QuantizedMatrix]:
    """The embedding and, if there is one, the head's matrix, in int8. Raises ConfigError if groups do not divide it."""
    found, scheme = flat(params), Scheme("int8", group_size)
    for name in TABLES.keys() & found.keys():
        scheme.check(name, found[name].shape[TABLES[name]])
    return {name: scheme.pack(found[name], inputs=axis) for name, axis in TABLES.items() if name in found}


def dequantize(model: LanguageModel) -> LanguageModel:
    """The model with float weights: those that its quantized ones stand for. It can be trained and changed again."""
    return dataclasses.replace(model, params=dequantized(model.params))


def with_matrices(model: LanguageModel, quantized: dict[str, QuantizedMatrix]) -> LanguageModel:
    """The model with quantized matrices in place of float ones."""

    return dataclasses.replace(model, params=replaced(model.params, quantized))


def _prepared(part, model, scheme, schemes, tokens, migration, seed, progress):
    if part == "rotate":
        from slm.compress.rotate import rotate

        return rotate(model, seed)
    from slm.compress import scaling

    if part == "awq":
        return scaling.awq(model, schemes, tokens, progress)
    return scaling.smoothquant(model, schemes, tokens, migration, progress)


def _finished(last, model, schemes, tokens, damping, act_order, progress) -> dict[str, QuantizedMatrix]:
    if last == "clip":
        from slm.compress.clipping import clipped_matrices

        return clipped_matrices(model, schemes, tokens, progress)
    if last == "gptq":
        from slm.compress.gptq import gptq_matrices

        return gptq_matrices(model, schemes, tokens, damping, act_order, progress)
    found = flat(model.params)
    if last == "hqq":
        from slm.compress.hqq import hqq

        return {name: hqq(found[name], scheme) for name, scheme in schemes.items()}
    return {name: jax.jit(scheme.pack)(jnp.asarray(found[name])) for name, scheme in schemes.items()}
