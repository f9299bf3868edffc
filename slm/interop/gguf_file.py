"""GGUF, the files of llama.cpp: slm.from_pretrained(FILE.gguf) and slm.save_gguf.

A GGUF file is read as the Hugging Face folder that it was made from: its metadata becomes a config.json, its tensors
get their names there back. What llama.cpp stores otherwise is undone; slm.interop.gguf_archs says what.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slm.config import ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.families import FAMILIES
from slm.interop.gguf_archs import ARCHS, Arch
from slm.interop.gguf_fields import Fields
from slm.interop.gguf_tokenizer import read_tokenizer
from slm.interop.parameters import Bound, bind
from slm.interop.tensors import read_json
from slm.models.language_model import Origin

MAGIC, LARGEST_COUNT = b"GGUF", 2**20
SETTINGS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold no parameters."""


class GGUFTensors:
    """The tensors of a GGUF file under their Hugging Face names (see slm.interop.parameters.Tensors)."""

    def __init__(self, tensors: dict[str, Any], undo: Callable[[str, np.ndarray], np.ndarray]):
        self._tensors, self._undo = tensors, undo

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> np.dtype:
        """F32 for what is quantized."""
        kind = self._tensors[name].tensor_type.name
        return np.dtype({"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32))

    def read(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        kind = tensor.tensor_type.name
        try:
            if kind in ("F32", "F16"):
                data = np.asarray(tensor.data)
            elif kind == "BF16":
                data = np.asarray(tensor.data).view(ml_dtypes.bfloat16)
            else:
                data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            return self._undo(name, data.reshape(self.shape(name)))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"tensor '{name}' of type {kind} cannot be read: {error}") from error


def open_gguf(path: Path) -> tuple[dict, GGUFTensors, dict, Origin]:
    """(config.json, tensors, tokenizer.json, origin) of a GGUF file.

    Raises CheckpointError for a damaged or hostile file, ConfigError for an architecture that is not supported.
    """
    reader = _reader(path)
    try:
        return _opened(path, reader)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"the metadata of {path} cannot be used: {type(error).__name__}: {error}") from error


def _opened(path: Path, reader: Any) -> tuple[dict, GGUFTensors, dict, Origin]:
    values = {name: field.contents() for name, field in reader.fields.items()}
    name = values.get("general.architecture")
    if name not in ARCHS:
        raise ConfigError(f"{path}: architecture {name!r} is not supported in GGUF, only {', '.join(ARCHS)}")
    arch = ARCHS[name]
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    hf = _config(arch, name, values, by_name)
    cfg = FAMILIES[arch.family].read(hf)
    names = gguf_names(name, cfg, bind(cfg, FAMILIES[arch.family].names))
    theirs_of = {ours: theirs for theirs, ours in names.items()}
    tensors = {theirs_of.get(key, key): tensor for key, tensor in by_name.items() if key not in SETTINGS}
    beside = path.with_name("tokenizer.json")
    tokenizer = read_json(beside) if beside.is_file() else read_tokenizer(values)
    texts = {
        "generation_config.json": json.dumps({key: hf[key] for key in ("bos_token_id", "eos_token_id") if key in hf})
    }
    if template := values.get("tokenizer.chat_template"):
        texts["chat_template.jinja"] = template
    source = GGUFTensors(tensors, lambda theirs, data: arch.change(theirs, data, cfg, True))
    return hf, source, tokenizer, Origin(arch.family, hf, "float32", {}, texts)


def package():
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: pip install gguf") from error
    return gguf


def _reader(path: Path):
    gguf = package()
    try:
        with path.open("rb") as file:
            head = file.read(24)
        counts = [int.from_bytes(head[at : at + 8], "little") for at in (8, 16)]
        if head[:4] != MAGIC or len(head) < 24 or max(counts) > LARGEST_COUNT:
            raise CheckpointError(f"{path} is damaged or no GGUF file")
        return gguf.GGUFReader(path)
    except CheckpointError:
        raise
    except Exception as error:  # the reader trusts its input and fails as it comes
        raise CheckpointError(f"{path} is damaged or no GGUF file: {type(error).__name__}: {error}") from error


def _config(arch: Arch, name: str, values: dict, by_name: dict) -> dict:
    """config.json of the metadata. Raises CheckpointError where something is missing."""
    embedding = by_name.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("the GGUF file lacks token_embd.weight")
    tensors = {key: lambda tensor=tensor: np.asarray(tensor.data) for key, tensor in by_name.items()}
    fields = Fields(name, values, int(embedding.shape[1]), tensors)
    if not 0 < fields.get("block_count") <= len(by_name):  # before anything is made for each layer
        raise CheckpointError(
            f"{name}.block_count = {fields.get('block_count')}: the file holds {len(by_name)} tensors"
        )
    hf = {"architectures": [FAMILIES[arch.family].architecture], "model_type": arch.family} | arch.read(fields)
    for kind in ("bos", "eos", "padding"):
        if (number := values.get(f"tokenizer.ggml.{kind}_token_id")) is not None:
            hf[f"{kind.replace('padding', 'pad')}_token_id"] = number
    return hf


def gguf_names(name: str, cfg: ModelConfig, bound: list[Bound]) -> dict[str, str]:
    """Name in a Hugging Face folder to name in GGUF. Raises ConfigError for a tensor that GGUF has no name for."""
    import gguf

    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(number, cfg.layers)
    found = {}
    for one in bound:
        theirs = one.theirs.replace(".dt_bias", ".dt_proj.bias")  # Mamba-2's has Mamba's name
        found[one.theirs] = table.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if found[one.theirs] is None:
            raise ConfigError(f"GGUF's {name} has no name for the tensor '{one.theirs}'")
    return found
