"""Models as StableHLO: slm.save_stablehlo writes what any XLA runs, without this package.

A folder: `forward.stablehlo`, `start.stablehlo` and `decode.stablehlo` (jax.export's serialization, versioned and with
a compatibility promise), `weights.safetensors`, `settings.json`. Shapes are fixed. `Exported` is the runner: 40 lines
that need jax and safetensors only, to copy where slm is not.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from slm.errors import CheckpointError, ConfigError
from slm.models.language_model import LanguageModel
from slm.models.paths import flat, nested
from slm.models.quantized import check_float_weights

FUNCTIONS = ("forward", "start", "decode")
WEIGHTS, SETTINGS = "weights.safetensors", "settings.json"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def save_stablehlo(
    model: LanguageModel,
    folder: str | Path,
    batch: int = 1,
    length: int = 256,
    platforms: Sequence[str] = ("cpu",),
    cache_dtype: Any = None,
) -> Path:
    """Writes forward pass and decode step of fixed shapes.

    Args:
      model: a decoder.
      folder: created if need be.
      batch: rows (B).
      length: tokens (T) of a forward pass, and of the text that the decode cache holds.
      platforms: where it shall run, of cpu, cuda, rocm, tpu; several make one artefact that serves all of them.
      cache_dtype: of cached keys and values; None: that of computation.

    Returns:
      The folder. Its functions: forward(weights, tokens (B, T)) -> logits (B, T, V) float32; start() -> cache;
      decode(weights, cache, tokens (B,), positions (B,)) -> (logits (B, V) float32, cache).

    Raises:
      ConfigError: a platform or size that cannot be, or the package flatbuffers is missing.
      CheckpointError: the folder cannot be written.
    """
    from safetensors.numpy import save_file

    if unknown := set(platforms) - set(PLATFORMS):
        raise ConfigError(f"platforms: {min(unknown)!r} is none of {', '.join(PLATFORMS)}")
    if not importlib.util.find_spec("flatbuffers"):
        raise ConfigError("jax.export serializes with the package flatbuffers: pip install flatbuffers")
    if batch < 1 or length < 1 or not platforms:
        raise ConfigError("batch and length must be at least 1, and platforms name at least one")
    check_float_weights(model.params)
    transformer = model.transformer

    def forward(weights, tokens):
        return transformer.logits(weights, transformer.hidden(weights, tokens)[0])

    def start():
        return transformer.init_cache(batch, length, cache_dtype)

    def decode(weights, cache, tokens, positions):
        hidden, cache = transformer.hidden(weights, tokens[:, None], positions=positions[:, None], cache=cache)
        return transformer.logits(weights, hidden[:, 0]), cache

    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.params)
    row, cache = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.eval_shape(start)
    arguments = {
        "forward": (abstract, jax.ShapeDtypeStruct((batch, length), jnp.int32)),
        "start": (),
        "decode": (abstract, cache, row, row),
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for function in (forward, start, decode):
            name = function.__name__
            exported = jax.export.export(jax.jit(function), platforms=tuple(platforms))(*arguments[name])
            (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
        save_file({name: np.asarray(leaf) for name, leaf in flat(model.params).items()}, folder / WEIGHTS)
        settings = {"batch": batch, "length": length, "platforms": list(platforms), "vocab_size": _rows(model)}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def _rows(model: LanguageModel) -> int:
    return model.config.model.vocab_size


class Exported:
    """What `save_stablehlo` wrote, ready to run. Raises CheckpointError for a folder that is damaged."""

    def __init__(self, folder: str | Path):
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            self.settings = json.loads((folder / SETTINGS).read_text())
            self._functions = {
                name: jax.export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
                for name in FUNCTIONS
            }
            arrays = load_file(folder / WEIGHTS)
        except Exception as error:  # three formats, each with errors of its own
            raise CheckpointError(f"{folder} is no exported model: {type(error).__name__}: {error}") from error
        self.weights = nested({name: jnp.asarray(array) for name, array in arrays.items()})

    def forward(self, tokens) -> jax.Array:
        """(B, T) ids to logits (B, T, V)."""
        return self._functions["forward"].call(self.weights, jnp.asarray(tokens, jnp.int32))

    def start(self) -> Any:
        """An empty cache."""
        return self._functions["start"].call()

    def decode(self, cache: Any, tokens, positions) -> tuple[jax.Array, Any]:
        """One token a row, (B,) ids at (B,) positions: logits (B, V) and the cache after it."""
        row = (jnp.asarray(x, jnp.int32) for x in (tokens, positions))
        return self._functions["decode"].call(self.weights, cache, *row)
