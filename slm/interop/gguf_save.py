"""Writing GGUF: slm.save_gguf. A model is written if and only if the file's metadata read back as the same model."""

import dataclasses
import functools
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from slm.config import ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.families import FAMILIES
from slm.interop.fields import fraction, rotated_share
from slm.interop.gguf_archs import ARCHS, Arch
from slm.interop.gguf_blocks import block_kind, blocks_of
from slm.interop.gguf_fields import Fields, rope_tensors
from slm.interop.gguf_file import gguf_names, package
from slm.interop.gguf_tokenizer import write_tokenizer
from slm.interop.parameters import Bound, bind, flat_parameters, tensor_of
from slm.interop.pretrained import describe
from slm.interop.sameness import differences
from slm.models.language_model import LanguageModel

QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What save_gguf writes. K-quants are read only: the gguf package cannot make them."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}


def save_gguf(model: LanguageModel, path: str | Path, quantization: str = "F16") -> Path:
    """Writes a file in llama.cpp's layout, with tokenizer and chat template.

    Args:
      model: one that an architecture in ARCHS can hold (slm.interop.gguf_archs).
      path: of the file.
      quantization: of matrices that are floats (those of slm.quantize are kept, code by code): F32, F16, BF16, Q8_0,
        Q5_1, Q5_0, Q4_1, Q4_0; the embedding gets at least Q8_0,
        norms stay F32.

    Returns:
      The path.

    Raises:
      ConfigError: the architecture, a setting, the tokenizer or the quantization has no form in GGUF; for a
        quantized model it says what would have one.
      CheckpointError: the file cannot be written.
    """
    gguf = package()
    if quantization not in QUANTIZATIONS:
        hint = "; the gguf package can only read K-quants, llama.cpp's llama-quantize makes them from F16 or F32"
        raise ConfigError(
            f"quantization = {quantization!r}: one of {', '.join(QUANTIZATIONS)}{hint if '_K' in quantization else ''}"
        )
    path, cfg = Path(path), model.config.model
    family, hf = describe(model)
    longest = cfg.max_length or hf.get("max_position_embeddings", model.config.data.sequence_length)
    name, values, bound, names = _described(family.model_type, cfg, int(longest))
    arch, flat = ARCHS[name], flat_parameters(model.params)
    kept = {one.theirs: block_kind(flat, one) for one in bound}
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(model.config.name)
    for key, value in values.items():
        _add(writer, f"{name}.{key}", value)
    writer.add_vocab_size(cfg.vocab_size)
    mostly = statistics.mode(matrices) if (matrices := [kind for kind in kept.values() if kind]) else quantization
    writer.add_file_type(FILE_TYPES[mostly])
    if mostly.startswith("Q"):
        writer.add_quantization_version(2)
    _write_tokens(writer, model, hf)
    for one in bound:
        change = functools.partial(_changed, arch, one.theirs, cfg)
        if kind := kept[one.theirs]:
            data = blocks_of(flat, one, kind, change)
        else:
            tensor = change(tensor_of(flat, one, np.float32))
            kind = _kind_of(names[one.theirs], tensor, quantization)
            data = tensor if kind == "F32" else gguf.quants.quantize(tensor, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(names[one.theirs], np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType[kind])
    for key, tensor in rope_tensors(cfg, arch.divided).items():
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
            names = gguf_names(name, cfg, bound)
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
    rope = rope_tensors(cfg, arch.divided)
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


def _changed(arch: Arch, theirs: str, cfg: ModelConfig, tensor: np.ndarray) -> np.ndarray:
    return arch.change(theirs, tensor, cfg, False)


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
