"""A model in a folder: any model, quantized ones too, as safetensors by the names of its parameters.

    config.json          the experiment
    tokenizer.json
    model.safetensors    (or shards with an index)
    quantization.json    what quantized matrices are made of: name to {format, axis, inputs, activations}
    origin/              what a model of another house brought along

Nothing in it is run: tensors are checked against the shapes that the config promises before they are used.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from slm.config import from_json, to_json
from slm.errors import CheckpointError, ConfigError
from slm.interop.starting import keep_origin, kept_origin
from slm.interop.tensors import TensorFolder, read_json, write_shards
from slm.models.counts import abstract_parameters
from slm.models.language_model import LanguageModel
from slm.models.quantized import BITS, QuantizedMatrix, is_quantized

CONFIG, TOKENIZER, QUANTIZATION = "config.json", "tokenizer.json", "quantization.json"
SHARD_BYTES = 4 * 10**9


def save(model: LanguageModel, folder: str | Path) -> None:
    """Writes the model; `slm.load` and eval.py read it. What was saved there before is replaced.

    Raises:
      ConfigError: the folder holds something else than a saved model.
      CheckpointError: it cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.is_dir() and any(folder.iterdir()) and not is_saved(folder):
        raise ConfigError(f"{folder} holds something else than a saved model: name another folder")
    tensors, described = {}, {}
    for path, leaf in jax.tree.leaves_with_path(model.params, is_leaf=is_quantized):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if is_quantized(leaf):
            parts = {"values": leaf.values, "scale": leaf.scale, "zero": leaf.zero}
            tensors |= {f"{name}/{part}": _plain(a) for part, a in parts.items() if a is not None}
            described[name] = {
                "format": leaf.format, "axis": leaf.axis, "inputs": leaf.inputs, "activations": leaf.activations
            }  # fmt: skip
        else:
            tensors[name] = _plain(leaf)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_shards(folder, tensors.items(), SHARD_BYTES)
        (folder / QUANTIZATION).unlink(missing_ok=True)
        if described:
            (folder / QUANTIZATION).write_text(json.dumps(described, indent=2) + "\n")
        if model.tokenizer is not None:
            model.tokenizer.save(folder / TOKENIZER)
        if model.origin is not None:
            keep_origin(model.origin, folder)
        (folder / CONFIG).write_text(to_json(model.config))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error


def is_saved(folder: Path) -> bool:
    """Whether `save` wrote this folder."""
    if not (folder / CONFIG).is_file() or not any(folder.glob("model*.safetensors")):
        return False
    try:
        return isinstance(read_json(folder / CONFIG).get("model"), dict)
    except CheckpointError:
        return False


def load_saved(folder: str | Path) -> LanguageModel:
    """The model that `save` wrote. Raises CheckpointError if it is damaged."""
    from slm.data.tokenizers import Tokenizer

    folder = Path(folder)
    try:
        cfg = from_json((folder / CONFIG).read_text())
    except (OSError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be used: {error}") from error
    described = read_json(folder / QUANTIZATION) if (folder / QUANTIZATION).is_file() else {}
    promised = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(abstract_parameters(cfg.model))
    }
    if unknown := sorted(set(described) - set(promised)):
        raise CheckpointError(f"{folder / QUANTIZATION} describes {unknown[0]}, which the model does not have")
    with TensorFolder(folder) as tensors:
        expected = set(promised) - set(described)
        for name in described:
            expected |= {f"{name}/values", f"{name}/scale"}
        found = set(tensors.names())
        optional = {f"{name}/zero" for name in described}
        if wrong := sorted((expected - found) | (found - expected - optional)):
            raise CheckpointError(
                f"{folder} does not hold the tensors of its config: {wrong[0]} is missing or too many"
            )
        leaves = [
            _matrix(tensors, name, described[name], leaf.shape)
            if name in described
            else _tensor(tensors, name, leaf.shape)
            for name, leaf in promised.items()
        ]
    params = jax.tree.unflatten(jax.tree.structure(abstract_parameters(cfg.model)), leaves)
    tokenizer = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    return LanguageModel(params, cfg, tokenizer, origin=kept_origin(folder))


def _plain(array: Any) -> np.ndarray:
    """As safetensors knows it: float8 by its bits."""
    array = np.asarray(array)
    return array.view(np.uint8) if array.dtype == ml_dtypes.float8_e4m3fn else array


def _tensor(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> jax.Array:
    if tensors.shape(name) != shape:
        raise CheckpointError(f"tensor {name} has shape {tensors.shape(name)}, the config promises {shape}")
    return jnp.asarray(tensors.read(name))


def _matrix(tensors: TensorFolder, name: str, described: Any, shape: tuple[int, ...]) -> QuantizedMatrix:
    try:
        format, axis, inputs = described["format"], described["axis"], described["inputs"]
        activations = described["activations"]
    except (TypeError, KeyError):
        raise CheckpointError(f"{tensors.folder / QUANTIZATION}: the entry of {name} is damaged") from None
    if format not in BITS or axis not in (-1, -2) or inputs != shape[axis] or activations not in (None, "int8"):
        raise CheckpointError(
            f"{tensors.folder / QUANTIZATION}: the entry of {name} does not fit the model: {described}"
        )
    stored = list(shape)
    stored[axis] = -(-inputs * BITS[format] // 8) if BITS[format] < 8 else inputs
    values = _tensor(tensors, f"{name}/values", tuple(stored))
    if format == "fp8":
        values = values.view(jnp.float8_e4m3fn)
    groups = tensors.shape(f"{name}/scale")
    scale = _tensor(tensors, f"{name}/scale", groups)
    outer = [(a, b) for i, (a, b) in enumerate(zip(groups, shape)) if i != len(shape) + axis]
    if len(groups) != len(shape) or not all(a in (1, b) for a, b in outer) or shape[axis] % groups[axis]:
        raise CheckpointError(f"tensor {name}/scale has shape {groups}, which does not fit a matrix {shape}")
    zero = _tensor(tensors, f"{name}/zero", groups) if f"{name}/zero" in tensors.names() else None
    return QuantizedMatrix(values, scale, zero, format, axis, inputs, activations)
