"""A model as one folder of ours, quantized or not: slm.save, and what slm.load reads it with.

config.json          the experiment, as in a run
tokenizer.json       if the model has one
model.safetensors    every leaf of the parameter tree by its name; of quantized matrices NAME/values (fp8 as bytes),
                     NAME/scale and, asymmetric, NAME/zero, packed as slm.models.quantized says
layout.json          {"version": 1, "dtype": of computation, "quantized": {NAME: {"scheme", "group_size",
                     "symmetric", "activations", "inputs"}}}
origin/              what came with a model from another house: its config, chat template, generation settings
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.config import Experiment, from_json, to_json
from slm.errors import CheckpointError, ConfigError
from slm.interop.starting import keep_origin, kept_origin
from slm.interop.tensors import SINGLE, TensorFolder, read_json
from slm.models.counts import abstract_parameters
from slm.models.language_model import LanguageModel
from slm.models.quantized import GRIDS, LEVELS, from_codes, is_quantized

CONFIG, LAYOUT, TOKENIZER, VERSION = "config.json", "layout.json", "tokenizer.json", 1
DTYPES = ("float32", "bfloat16", "float16")


def save(model: LanguageModel, folder: str | Path) -> Path:
    """Writes a folder that slm.load, eval.py and the server open. What an earlier save left there is replaced.

    Args:
      model: any; quantized matrices are written as they are packed.
      folder: created if need be.

    Returns:
      The folder.

    Raises CheckpointError if it holds something else, or cannot be written.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not is_saved(folder):
        raise CheckpointError(f"{folder} holds something else than a saved model: name an empty or new folder")
    layout = {"version": VERSION, "dtype": jnp.dtype(model.dtype).name, "quantized": {}}
    for path, leaf in jax.tree.leaves_with_path(model.params, is_leaf=is_quantized):
        if is_quantized(leaf):
            layout["quantized"][_name(path)] = {
                "scheme": leaf.scheme, "group_size": leaf.group_size, "symmetric": leaf.zero is None,
                "activations": leaf.activations, "inputs": leaf.inputs,
            }  # fmt: skip
    tensors = {_name(path): _stored(np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(model.params)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SINGLE).unlink(missing_ok=True)
        (folder / LAYOUT).write_text(json.dumps(layout, indent=2) + "\n")
        (folder / CONFIG).write_text(to_json(model.config))
        if model.tokenizer is not None:
            model.tokenizer.save(folder / TOKENIZER)
        if model.origin is not None:
            keep_origin(model.origin, folder)
        # Last, so that a folder with weights is a whole one.
        save_file(tensors, folder / SINGLE)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def is_saved(folder: Path) -> bool:
    return (folder / LAYOUT).is_file()


def load_saved(folder: Path) -> LanguageModel:
    """The model that `save` wrote. Raises CheckpointError, naming the file or tensor, for a damaged folder."""
    from slm.data.tokenizers import Tokenizer

    layout = read_json(folder / LAYOUT)
    if layout.get("version") != VERSION or layout.get("dtype") not in DTYPES:
        raise CheckpointError(f"{folder / LAYOUT}: version {layout.get('version')}, dtype {layout.get('dtype')!r}: "
                              f"this slm reads version {VERSION} and {', '.join(DTYPES)}")  # fmt: skip
    try:
        cfg = from_json((folder / CONFIG).read_text())
    except (ConfigError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be used: {error}") from error
    expected = _expected(cfg, layout.get("quantized"), folder / LAYOUT)
    with TensorFolder(folder) as tensors:
        wanted = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(expected)}
        if differing := sorted(wanted.keys() ^ set(tensors.names())):
            what = "lacks" if differing[0] in wanted else "holds, without a place in the config's model,"
            raise CheckpointError(f"{folder / SINGLE} {what} the tensor '{differing[0]}'")
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: _read(tensors, _name(path), leaf), expected)
    tokenizer = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    return LanguageModel(params, cfg, tokenizer, jnp.dtype(layout["dtype"]).type, kept_origin(folder))


def _expected(cfg: Experiment, quantized: Any, where: Path) -> Any:
    """The parameter tree of a config, as shapes and dtypes, with quantized matrices where the layout has them."""
    left = dict(quantized) if isinstance(quantized, dict) else {"": None}

    def one(path, leaf):
        return leaf if (settings := left.pop(_name(path), None)) is None else _abstract(leaf, **settings)

    try:
        tree = jax.tree_util.tree_map_with_path(one, abstract_parameters(cfg.model))
    except (TypeError, ValueError, KeyError, IndexError, ConfigError) as error:
        raise CheckpointError(f"{where} cannot be used: {error}") from error
    if left:
        raise CheckpointError(f"{where} names '{next(iter(left))}', which the config's model does not have")
    return tree


def _abstract(leaf, *, scheme: str, group_size: int | None, symmetric: bool, activations: str, inputs: int):
    if scheme not in GRIDS or (not symmetric and scheme not in LEVELS):
        raise ValueError(f"scheme {scheme!r}")
    if activations not in ("none", "int8") or inputs not in (-1, -2) or leaf.ndim < 2:
        raise ValueError(f"activations {activations!r}, inputs {inputs!r}")
    size = leaf.shape[inputs]
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1 or size % group_size):
        raise ValueError(f"groups of {group_size!r} among {size} inputs")
    shape = list(leaf.shape)
    shape[inputs] = size // group_size if group_size else 1
    if scheme == "ternary" and group_size is None:
        shape[-1] = shape[-2] = 1
    scale = jax.ShapeDtypeStruct(shape, jnp.float32)
    make = lambda codes, scale, zero: from_codes(codes, scale, zero, scheme, group_size, activations, inputs)  # noqa: E731
    return jax.eval_shape(make, leaf, scale, None if symmetric else scale)


def _stored(array: np.ndarray) -> np.ndarray:
    """As safetensors takes it, which has no float8 for numpy."""
    return np.ascontiguousarray(array.view(np.uint8) if array.dtype == jnp.float8_e4m3fn else array)


def _read(tensors: TensorFolder, name: str, leaf) -> jax.Array:
    shape, dtype, wanted = tensors.shape(name), tensors.dtype(name), leaf.dtype
    stored = np.dtype(np.uint8) if wanted == jnp.float8_e4m3fn else wanted
    if shape != leaf.shape or (dtype.name not in DTYPES if wanted == jnp.float32 else dtype != stored):
        raise CheckpointError(f"'{name}' is {dtype.name} {shape}: the layout asks for {stored.name} {leaf.shape}")
    array = tensors.read(name)
    array = array.view(wanted) if stored != wanted else array
    if not jnp.issubdtype(array.dtype, jnp.integer) and not np.isfinite(array.astype(np.float32)).all():
        raise CheckpointError(f"'{name}' holds numbers that are not finite: the file is damaged")
    return jnp.asarray(array)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
