"""Quantized matrices as blocks of GGUF, code by code: nothing is rounded again.

A block is 32 weights that follow each other along the inputs: Q4_0 and Q8_0 a float16 scale and codes, Q4_1 a float16
smallest weight too (ggml-common.h). So a matrix fits if its groups are of 32, 64, 96 ... inputs.
"""

import numpy as np

from slm.errors import ConfigError
from slm.interop.parameters import Bound, tensor_of
from slm.models.quantized import QuantizedMatrix, is_quantized, spread

BLOCK = 32
KINDS = {("int8", True): "Q8_0", ("int4", True): "Q4_0", ("int4", False): "Q4_1",
         ("int3", True): "Q4_0", ("int3", False): "Q4_1"}  # fmt: skip
"""(scheme, whether it is symmetric) to the type whose codes hold its own."""


def block_kind(flat: dict, one: Bound) -> str | None:
    """The type that holds a tensor made of quantized matrices; None if it is made of floats.

    Raises ConfigError if no type does, naming the matrix and what would fit.
    """
    kinds = {_kind(spot.path, flat[spot.path]) for spot in one.places}
    if len(kinds) > 1:
        raise ConfigError(
            f"GGUF keeps {', '.join(spot.path for spot in one.places)} as one tensor: quantize all of them alike"
        )
    return kinds.pop()


def blocks_of(flat: dict, one: Bound, kind: str, change) -> np.ndarray:
    """(rows, bytes) uint8 of a tensor of `kind`.

    Args:
      flat: parameters by name.
      one: the tensor's link.
      change: tensor -> the tensor as its architecture has it, which may move weights but not change them.

    Raises ConfigError where that does change them, or blocks do not fill the rows.
    """
    import gguf

    views = {"weights": as_floats, "codes": _codes, "scale": _scales}
    if kind == "Q4_1":
        views["zero"] = _zeros
    found = {name: change(tensor_of(flat, one, np.float32, view)) for name, view in views.items()}
    if found["codes"].shape[-1] % BLOCK:
        raise ConfigError(f"GGUF: rows of {one.theirs} have {found['codes'].shape[-1]} weights, no multiple of {BLOCK}")
    parts = {name: a.reshape(*a.shape[:-1], -1, BLOCK) for name, a in found.items()}
    heads = [parts[name][..., :1].astype(np.float16).view(np.uint8) for name in ("scale", "zero") if name in parts]
    codes = parts["codes"]
    if kind == "Q8_0":
        body = codes.astype(np.int8).view(np.uint8)
    else:
        codes = (codes + (8 if kind == "Q4_0" else 0)).astype(np.uint8)
        body = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
    data = np.concatenate([*heads, body], -1)
    data = data.reshape(*data.shape[:-2], -1)
    again = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    if not np.array_equal(again, found["weights"]):
        raise ConfigError(f"GGUF: {kind} cannot hold {one.theirs} as it is quantized: save the float model instead")
    return data


def _kind(name: str, matrix) -> str | None:
    if not is_quantized(matrix):
        return None
    kind = KINDS.get((matrix.scheme, matrix.zero is None))
    if kind is None or not matrix.group_size or matrix.group_size % BLOCK:
        groups = f"groups of {matrix.group_size}" if matrix.group_size else "one scale an output"
        raise ConfigError(
            f"GGUF has no form for {name} in {'' if matrix.zero is None else 'asymmetric '}{matrix.scheme} with "
            f"{groups}: quantize with group_size = 32 and int4 (Q4_0; asymmetric Q4_1) or int8 (symmetric, Q8_0)"
        )
    return kind


def as_floats(matrix):
    """A quantized matrix as its weights; others as they are."""
    return matrix.astype(np.float32) if is_quantized(matrix) else matrix


def _codes(matrix: QuantizedMatrix):
    return matrix.codes()


def _scales(matrix: QuantizedMatrix):
    return _whole(matrix, matrix.scale)


def _zeros(matrix: QuantizedMatrix):
    return _whole(matrix, matrix.zero)


def _whole(matrix, scale):
    return np.broadcast_to(spread(scale, matrix.shape[matrix.inputs], matrix.inputs), matrix.shape)
