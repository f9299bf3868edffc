"""GGUF, the files of llama.cpp: slm.from_pretrained(FILE.gguf) and slm.save_gguf.

A GGUF file is read as the Hugging Face folder that it was made from: its metadata becomes a config.json, its tensors
get their names there back. What llama.cpp stores otherwise is undone, such as the order of rotary dimensions in Llama's
queries and keys.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from slm.config import ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.families import FAMILIES
from slm.interop.gguf_tokenizer import read_tokenizer, write_tokenizer
from slm.interop.parameters import bind, tensors_of
from slm.interop.tensors import read_json
from slm.models.language_model import LanguageModel, Origin
from slm.models.layers import mlp_width
from slm.models.mixers import head_dim
from slm.models.rope import SCALINGS

MAGIC, LARGEST_COUNT = b"GGUF", 2**20
QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What save_gguf writes. K-quants are read only: the gguf package cannot make them."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}


class Arch(NamedTuple):
    """What is particular to one general.architecture."""

    family: str
    """model_type in slm.interop.families."""
    permuted: bool = False
    """Queries and keys are stored with the rotary dimensions interleaved."""


ARCHS = {
    "llama": Arch("llama", permuted=True),
    "qwen2": Arch("qwen2"),
    "qwen3": Arch("qwen3"),
}
"""general.architecture to its particulars."""


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
    fields = {name: field.contents() for name, field in reader.fields.items()}
    name = fields.get("general.architecture")
    if name not in ARCHS:
        raise ConfigError(f"{path}: architecture {name!r} is not supported in GGUF, only {', '.join(ARCHS)}")
    arch = ARCHS[name]
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    hf = _config(arch, name, fields, by_name)
    cfg = FAMILIES[arch.family].read(hf)
    theirs_of = {ours: theirs for theirs, ours in _gguf_names(arch, name, cfg).items()}
    tensors = {theirs_of.get(key, key): tensor for key, tensor in by_name.items() if key != "rope_freqs.weight"}

    def undo(theirs: str, data: np.ndarray) -> np.ndarray:
        if arch.permuted and (heads := _rotary_heads(theirs, cfg)):
            return _permuted(data, heads, back=True)
        return data

    beside = path.with_name("tokenizer.json")
    tokenizer = read_json(beside) if beside.is_file() else read_tokenizer(fields)
    texts = {
        "generation_config.json": json.dumps({key: hf[key] for key in ("bos_token_id", "eos_token_id") if key in hf})
    }
    if template := fields.get("tokenizer.chat_template"):
        texts["chat_template.jinja"] = template
    source = GGUFTensors(tensors, undo)
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


def _config(arch: Arch, name: str, fields: dict, by_name: dict) -> dict:
    """config.json of the metadata. Raises CheckpointError where something is missing."""

    def get(key: str, *default):
        value = fields.get(f"{name}.{key}", *default)
        if value is None and not default:
            raise CheckpointError(f"the GGUF metadata lacks {name}.{key}")
        return value

    width, heads = get("embedding_length"), get("attention.head_count")
    if not 0 < get("block_count") <= len(by_name):  # before anything is made for each layer
        raise CheckpointError(f"{name}.block_count = {get('block_count')}: the file holds {len(by_name)} tensors")
    embedding = by_name.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("the GGUF file lacks token_embd.weight")
    hf = {
        "architectures": [FAMILIES[arch.family].architecture], "model_type": arch.family,
        "vocab_size": int(embedding.shape[1]), "hidden_size": width, "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", width // heads), "intermediate_size": get("feed_forward_length"),
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"), "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in by_name, "max_position_embeddings": get("context_length"),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
    }  # fmt: skip
    scaling = get("rope.scaling.type", "none")
    if "rope_freqs.weight" in by_name:
        # Llama 3's stretching comes as the divisors themselves, which is LongRoPE with one set of them.
        factors = [float(x) for x in by_name["rope_freqs.weight"].data]
        hf["rope_scaling"] = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors,
                              "factor": 1.0, "attention_factor": 1.0}  # fmt: skip
    elif scaling in ("linear", "yarn"):
        original = get("rope.scaling.original_context_length", 0)
        hf["rope_scaling"] = {"rope_type": scaling, "factor": get("rope.scaling.factor"),
                              "original_max_position_embeddings": original}  # fmt: skip
    elif scaling != "none":
        raise ConfigError(f"{name}.rope.scaling.type = {scaling!r} is not supported in GGUF")
    if "blk.0.attn_q.bias" in by_name and arch.family == "llama":
        hf["attention_bias"] = True
    for kind in ("bos", "eos", "padding"):
        if (number := fields.get(f"tokenizer.ggml.{kind}_token_id")) is not None:
            hf[f"{kind.replace('padding', 'pad')}_token_id"] = number
    return hf


def _gguf_names(arch: Arch, name: str, cfg: ModelConfig) -> dict[str, str]:
    """Name in a Hugging Face folder to name in GGUF."""
    import gguf

    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(number, cfg.layers)
    found = {}
    for one in bind(cfg, FAMILIES[arch.family].names):
        stem, _, kind = one.theirs.rpartition(".")
        found[one.theirs] = f"{table.get_name(stem)}.{kind}"
    return found


def _rotary_heads(theirs: str, cfg: ModelConfig) -> int:
    """Heads whose rows in the tensor stand in another order; 0 for tensors without such."""
    if ".q_proj." in theirs:
        return cfg.heads
    return (cfg.kv_heads or cfg.heads) if ".k_proj." in theirs else 0


def _permuted(data: np.ndarray, heads: int, back: bool = False) -> np.ndarray:
    """Rows of each head from half-split to interleaved rotary order, or back."""
    shape = (heads, -1, 2) if back else (heads, 2, data.shape[0] // heads // 2)
    return data.reshape(*shape, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


def save_gguf(model: LanguageModel, path: str | Path, quantization: str = "F16") -> Path:
    """Writes a file in llama.cpp's layout, with tokenizer and chat template.

    Args:
      model: of an architecture in ARCHS: Llama's (SmolLM2 too), Qwen 2's or Qwen 3's.
      path: of the file.
      quantization: of the matrices: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0; the embedding gets at least Q8_0,
        norms stay F32.

    Returns:
      The path.

    Raises:
      ConfigError: the architecture, the tokenizer or the quantization has no form in GGUF.
      CheckpointError: the file cannot be written.
    """
    from slm.interop.pretrained import describe

    gguf = _package()
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization = {quantization!r}: one of {', '.join(QUANTIZATIONS)}")
    path, cfg = Path(path), model.config.model
    family, hf = describe(model)
    name = next((name for name, arch in ARCHS.items() if arch.family == family.model_type), None)
    if name is None:
        raise ConfigError(f"models of family {family.model_type} are not written as GGUF, only {', '.join(ARCHS)}")
    arch = ARCHS[name]
    writer = gguf.GGUFWriter(path, name)
    _write_metadata(writer, model, hf, quantization)
    names = _gguf_names(arch, name, cfg)
    for theirs, tensor in tensors_of(model.params, bind(cfg, family.names), np.float32):
        if arch.permuted and (heads := _rotary_heads(theirs, cfg)):
            tensor = _permuted(tensor, heads)
        kind = _kind_of(names[theirs], tensor, quantization)
        data = tensor if kind == "F32" else gguf.quants.quantize(tensor, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(names[theirs], np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType[kind])
    if cfg.rope.scaling == "llama3":
        writer.add_tensor("rope_freqs.weight", _divisors(cfg))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _kind_of(name: str, tensor: np.ndarray, quantization: str) -> str:
    if tensor.ndim < 2:
        return "F32"
    blocks = quantization.startswith("Q")
    if blocks and tensor.shape[-1] % 32:
        return "F16"  # rows that blocks of 32 do not fill
    return "Q8_0" if blocks and name.startswith(("token_embd", "output.")) else quantization


def _divisors(cfg: ModelConfig) -> np.ndarray:
    """What Llama 3's stretching divides each frequency by."""
    plain = cfg.rope.theta ** (-np.arange(0, head_dim(cfg), 2, dtype=np.float32) / head_dim(cfg))
    return np.float32(plain / np.asarray(SCALINGS["llama3"](plain, cfg.rope, 0)))


def _write_metadata(writer, model: LanguageModel, hf: dict, quantization: str) -> None:
    cfg = model.config.model
    if any((cfg.layer_heads, cfg.layer_kv_heads, cfg.layer_mlp_widths)) or cfg.mlp != "swiglu":
        raise ConfigError("GGUF: layers of different sizes and activations other than SwiGLU are not written")
    writer.add_name(model.config.name)
    writer.add_context_length(int(hf.get("max_position_embeddings", model.config.data.sequence_length)))
    writer.add_embedding_length(cfg.width)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(mlp_width(cfg))
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv_heads or cfg.heads)
    writer.add_key_length(head_dim(cfg))
    writer.add_value_length(head_dim(cfg))
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope.theta)
    writer.add_rope_dimension_count(head_dim(cfg))
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_file_type(FILE_TYPES[quantization])
    if quantization.startswith("Q"):
        writer.add_quantization_version(2)
    _write_rope(writer, cfg)
    _write_tokens(writer, model, hf)


def _write_rope(writer, cfg: ModelConfig) -> None:
    import gguf

    kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
    if cfg.rope.scaling in kinds:
        writer.add_rope_scaling_type(kinds[cfg.rope.scaling])
        writer.add_rope_scaling_factor(cfg.rope.factor)
        if cfg.rope.scaling == "yarn":
            if not math.isclose(cfg.rope.magnitude, 0.1 * math.log(cfg.rope.factor) + 1, rel_tol=1e-6):
                raise ConfigError("GGUF: a yarn magnitude of its own cannot be written")
            writer.add_rope_scaling_orig_ctx_len(cfg.rope.original_length)
    elif cfg.rope.scaling not in ("none", "llama3"):
        raise ConfigError(f"GGUF: model.rope.scaling = {cfg.rope.scaling} is not written")


def _write_tokens(writer, model: LanguageModel, hf: dict) -> None:
    if model.tokenizer is None:
        raise ConfigError("GGUF: the model has no tokenizer, without which llama.cpp does not load it")
    parts = write_tokenizer(model.tokenizer, model.config.model.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(parts["pre"])
    writer.add_token_list(parts["tokens"])
    writer.add_token_types(parts["types"])
    writer.add_token_merges(parts["merges"])
    end = model.tokenizer.end_of_text
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = hf.get(f"{kind}_token_id", end)
        number = number[0] if isinstance(number, list) else number
        if number is not None:
            add(int(number))
    writer.add_add_bos_token(False)
    if template := model.origin and model.origin.text("chat_template.jinja"):
        writer.add_chat_template(template)
