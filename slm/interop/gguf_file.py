"""GGUF, the files of llama.cpp: slm.from_pretrained(FILE.gguf) and slm.save_gguf.

A GGUF file is read as the Hugging Face folder that it was made from: its metadata becomes a config.json, its tensors
get their names there back. What llama.cpp stores otherwise is undone; slm.interop.gguf_archs says what.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slm.config import ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.families import FAMILIES
from slm.interop.fields import fraction, rotated_share
from slm.interop.gguf_archs import ARCHS, Arch, Fields, rope_tensors
from slm.interop.gguf_tokenizer import read_tokenizer, write_tokenizer
from slm.interop.parameters import Bound, bind, tensors_of
from slm.interop.sameness import differences
from slm.interop.tensors import read_json
from slm.models.language_model import LanguageModel, Origin

MAGIC, LARGEST_COUNT = b"GGUF", 2**20
QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What save_gguf writes. K-quants are read only: the gguf package cannot make them."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
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
    names = _gguf_names(name, cfg, bind(cfg, FAMILIES[arch.family].names))
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


def _package():
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: pip install gguf") from error
    return gguf


def _reader(path: Path):
    gguf = _package()
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


def _gguf_names(name: str, cfg: ModelConfig, bound: list[Bound]) -> dict[str, str]:
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


def save_gguf(model: LanguageModel, path: str | Path, quantization: str = "F16") -> Path:
    """Writes a file in llama.cpp's layout, with tokenizer and chat template.

    Args:
      model: one that an architecture in ARCHS can hold (slm.interop.gguf_archs).
      path: of the file.
      quantization: of the matrices: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0; the embedding gets at least Q8_0,
        norms stay F32.

    Returns:
      The path.

    Raises:
      ConfigError: the architecture, a setting, the tokenizer or the quantization has no form in GGUF.
      CheckpointError: the file cannot be written.
    """
    from slm.interop.pretrained import describe

    gguf = _package()
    if quantization not in QUANTIZATIONS:
        hint = "; the gguf package can only read K-quants, llama.cpp's llama-quantize makes them from F16 or F32"
        raise ConfigError(
            f"quantization = {quantization!r}: one of {', '.join(QUANTIZATIONS)}{hint if '_K' in quantization else ''}"
        )
    path, cfg = Path(path), model.config.model
    family, hf = describe(model)
    longest = cfg.max_length or hf.get("max_position_embeddings", model.config.data.sequence_length)
    name, values, bound, names = _described(family.model_type, cfg, int(longest))
    arch = ARCHS[name]
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(model.config.name)
    for key, value in values.items():
        _add(writer, f"{name}.{key}", value)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_file_type(FILE_TYPES[quantization])
    if quantization.startswith("Q"):
        writer.add_quantization_version(2)
    _write_tokens(writer, model, hf)
    for theirs, tensor in tensors_of(model.params, bound, np.float32):
        tensor = arch.change(theirs, tensor, cfg, False)
        kind = _kind_of(names[theirs], tensor, quantization)
        data = tensor if kind == "F32" else gguf.quants.quantize(tensor, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(names[theirs], np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType[kind])
    for key, tensor in rope_tensors(arch, cfg).items():
        writer.add_tensor(key, tensor)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _described(family: str, cfg: ModelConfig, longest: int) -> tuple[str, dict, list[Bound], dict[str, str]]:
    """(architecture, metadata, links, names) of a model: its family's architecture, or Llama's where it has none.

    Raises ConfigError if that cannot express the model, saying what it would lose.
    """
    own = [name for name, arch in ARCHS.items() if arch.family == family]
    why = f"models of family {family} are not written as GGUF, only {', '.join(ARCHS)}"
    for name in own or ["llama"]:
        arch = ARCHS[name]
        try:
            values = arch.write(cfg) | {"context_length": longest}
            bound = bind(cfg, FAMILIES[arch.family].names)
            names = _gguf_names(name, cfg, bound)
            differing = _lost(arch, name, cfg, values, names)
        except (ConfigError, CheckpointError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            differing = [str(error)]
        if not differing:
            return name, values, bound, names
        if own:
            why = f"GGUF's {name} cannot express this model's {', '.join(differing)}"
    raise ConfigError(why)


def _lost(arch: Arch, name: str, cfg: ModelConfig, values: dict, names: dict[str, str]) -> list[str]:
    """Fields of the model that reading the file would give otherwise."""
    rope = rope_tensors(arch, cfg)
    tensors = {key: lambda: np.zeros(0) for key in names.values()} | {key: lambda x=x: x for key, x in rope.items()}
    stored = {f"{name}.{k}": float(np.float32(v)) if isinstance(v, float) else v for k, v in values.items()}
    again = FAMILIES[arch.family].read(arch.read(Fields(name, stored, cfg.vocab_size, tensors)))
    if cfg.rope.scaling == "llama3" and rope:  # its divisors are stored, not what they were computed from
        again = dataclasses.replace(again, rope=cfg.rope)
    return differences(_rounded(cfg), _rounded(again))


def _rounded(cfg: ModelConfig) -> ModelConfig:
    """`cfg` with six digits, which float32 keeps, and with the share of dimensions that do rotate."""

    def rounded(value: Any):
        if dataclasses.is_dataclass(value):
            fields = {field.name: rounded(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        if isinstance(value, tuple):
            return tuple(map(rounded, value))
        return float(f"{value:.6g}") if isinstance(value, float) else value

    if cfg.mixer.rope_fraction is not None:
        share = fraction(rotated_share(cfg))
        cfg = dataclasses.replace(cfg, mixer=dataclasses.replace(cfg.mixer, rope_fraction=share))
    return rounded(cfg)


def _kind_of(name: str, tensor: np.ndarray, quantization: str) -> str:
    if tensor.ndim < 2 or name.startswith("position") or "norm" in name or re.search(r"\.ssm_(conv1d|a$|d$)", name):
        return "F32"  # llama.cpp computes with these in float32
    blocks = quantization.startswith("Q")
    if blocks and tensor.shape[-1] % 32:
        return "F16"  # rows that blocks of 32 do not fill
    return "Q8_0" if blocks and name.startswith(("token_embd", "output.")) else quantization


def _add(writer, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write_tokens(writer, model: LanguageModel, hf: dict) -> None:
    if model.tokenizer is None:
        raise ConfigError("GGUF: the model has no tokenizer, without which llama.cpp does not load it")
    parts = write_tokenizer(model.tokenizer, model.config.model.vocab_size)
    writer.add_tokenizer_model(parts["model"])
    writer.add_tokenizer_pre(parts["pre"])
    writer.add_token_list(parts["tokens"])
    writer.add_token_types(parts["types"])
    if "merges" in parts:
        writer.add_token_merges(parts["merges"])
    else:
        writer.add_token_scores(parts["scores"])
        writer.add_add_space_prefix(parts["space_prefix"])
    end = model.tokenizer.end_of_text
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (number := _first(hf, kind, end)) is not None:
            add(int(number))
    added = model.tokenizer.backend.encode("a")
    writer.add_add_bos_token(bool(added.special_tokens_mask[0]) and added.ids[0] == _first(hf, "bos", end))
    if template := model.origin and model.origin.text("chat_template.jinja"):
        writer.add_chat_template(template)


def _first(hf: dict, kind: str, end: int | None) -> int | None:
    """The id of a kind of token; of several, the first."""
    number = hf.get(f"{kind}_token_id", end)
    return number[0] if isinstance(number, list) else number
