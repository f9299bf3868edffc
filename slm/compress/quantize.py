"""Weights in fewer bits."""

import dataclasses
from typing import Any

import jax

from slm.models.heads import check_next_token
from slm.models.int8 import check_float_weights, to_int8
from slm.models.language_model import LanguageModel

APART = ("key_up", "value_up", "conv", "forget")
"""Parts of names of matrices that layers do more with than multiply by them, or in higher precision."""


def int8_weights(model: LanguageModel) -> LanguageModel:
    """The model with 8-bit matrices and embeddings, rounded to nearest, one scale an output; all else as it is.

    For running it: such parameters cannot be trained or saved. Half the size of bfloat16; on a CPU, texts of one prompt
    at a time are written faster than in float32 (benchmarks/README.md).
    Raises ConfigError for a model that does not predict the next token, or has such weights already.
    """
    check_next_token(model.config.model)
    check_float_weights(model.params)
    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(_int8, model.params))


def _int8(path: tuple, leaf: Any) -> Any:
    names = [key.key for key in path]
    if names == ["embed", "embedding"]:
        return to_int8(leaf, inputs=-1)
    matrix = names[-1] == "kernel" and (names[0] in ("first", "blocks", "tail") or names == ["head", "kernel"])
    if not matrix or leaf.ndim != (2 if names[0] == "head" else 3) or any(part in names[-2] for part in APART):
        return leaf
    return to_int8(leaf, inputs=-2)
