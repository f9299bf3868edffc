"""What architectures with attention have in common in GGUF's metadata: sizes and rotary positions, out and in."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from slm.config import ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.fields import rotated_share
from slm.models.layers import mlp_width
from slm.models.mixers import head_dim
from slm.models.rope import SCALINGS


class Fields(NamedTuple):
    """A file's metadata, and what its tensors tell about the model."""

    name: str
    """general.architecture."""
    values: Mapping[str, Any]
    vocab: int
    """Rows of the embedding."""
    tensors: Mapping[str, Callable[[], np.ndarray]]
    """Name in GGUF to its content, for those that hold settings."""

    def get(self, key: str, *default: Any) -> Any:
        """The value of {name}.{key}. Raises CheckpointError where it is missing and there is no default."""
        value = self.values.get(f"{self.name}.{key}", *default)
        if value is None and not default:
            raise CheckpointError(f"the GGUF metadata lacks {self.name}.{key}")
        # Numbers are float32 there: 0.22 comes back as 0.2199999988.
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def floats(self, tensor: str) -> list[float]:
        return [float(f"{x:.7g}") for x in self.tensors[tensor]().reshape(-1)]


def sizes(cfg: ModelConfig) -> dict:
    """Metadata that all architectures with attention have."""
    eps = "attention.layer_norm_epsilon" if cfg.norm == "layernorm" else "attention.layer_norm_rms_epsilon"
    found = {
        "embedding_length": cfg.width, "block_count": cfg.layers, "feed_forward_length": mlp_width(cfg),
        "attention.head_count": cfg.heads, "attention.head_count_kv": cfg.kv_heads or cfg.heads,
        "attention.key_length": head_dim(cfg), "attention.value_length": head_dim(cfg), eps: cfg.norm_eps,
    }  # fmt: skip
    if cfg.position != "rope":
        return found
    rope = cfg.rope
    found |= {"rope.freq_base": rope.theta, "rope.dimension_count": round(rotated_share(cfg) * head_dim(cfg))}
    if rope.scaling in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope.scaling, "rope.scaling.factor": rope.factor}
    if rope.scaling == "yarn":
        found |= {"rope.scaling.original_context_length": rope.original_length}
    return found


def decoder(f: Fields) -> dict:
    """config.json of what `sizes` wrote, as Llama names it."""
    width, heads = f.get("embedding_length"), f.get("attention.head_count")
    size = f.get("attention.key_length", width // heads)
    hf = {
        "vocab_size": f.vocab, "hidden_size": width, "num_hidden_layers": f.get("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": f.get("attention.head_count_kv", heads),
        "head_dim": size, "intermediate_size": f.get("feed_forward_length"), "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in f.tensors, "max_position_embeddings": f.get("context_length"),
        "partial_rotary_factor": f.get("rope.dimension_count", size) / size,
        "rope_theta": float(f.get("rope.freq_base", 10_000.0)),
    }  # fmt: skip
    return hf | rope_scaling(f)


def rope_scaling(f: Fields) -> dict:
    kind = f.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in f.tensors:
        # Llama 3's stretching comes as the divisors themselves, which is LongRoPE with one set of them.
        factors = f.floats("rope_freqs.weight")
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
                   "attention_factor": 1.0}  # fmt: skip
    elif "rope_factors_long.weight" in f.tensors:
        scaling = {
            "rope_type": "longrope", "short_factor": f.floats("rope_factors_short.weight"),
            "long_factor": f.floats("rope_factors_long.weight"),
            "attention_factor": f.get("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": f.get("rope.scaling.original_context_length"),
        }  # fmt: skip
    elif kind in ("linear", "yarn"):
        original = f.get("rope.scaling.original_context_length", 0)
        scaling = {"rope_type": kind, "factor": f.get("rope.scaling.factor", 1.0),
                   "original_max_position_embeddings": original}  # fmt: skip
    elif kind in ("none", "longrope"):
        return {}
    else:
        raise ConfigError(f"{f.name}.rope.scaling.type = {kind!r} is not supported in GGUF")
    return {"rope_scaling": scaling}


def rope_tensors(cfg: ModelConfig, divided: bool) -> dict[str, np.ndarray]:
    """Tensors that say how rotary positions are stretched; `divided`: see Arch."""
    rope = cfg.rope
    if divided and rope.scaling == "llama3":
        plain = rope.theta ** (-np.arange(0, head_dim(cfg), 2, dtype=np.float32) / head_dim(cfg))
        return {"rope_freqs.weight": np.float32(plain / np.asarray(SCALINGS["llama3"](plain, rope, 0)))}
    if rope.scaling != "longrope":
        return {}
    short, long = np.float32(rope.short_factors), np.float32(rope.long_factors)
    if divided:  # one set only; where there are two, reading back will tell
        return {"rope_freqs.weight": long}
    return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
