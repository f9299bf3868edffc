"""Weights that need not be stored: made from each tensor's name and shape, here and where the oracle ran."""

import math
import zlib
from pathlib import Path

import numpy as np

ORACLE = Path(__file__).parent


def weights_of(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Tensors float32: norms and vectors vary, matrices keep the size of what passes through them."""
    return {name: _tensor(name, tuple(shape)) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) < 2:
        return np.float32(0.3) * draw + np.float32(0.5 if name.endswith("weight") else 0.0)
    return draw * np.float32(1.2 / math.sqrt(shape[-1]))
