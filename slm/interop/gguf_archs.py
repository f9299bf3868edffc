"""What each general.architecture of GGUF keeps in its metadata, and which tensors it stores in a way of its own.

Names and meanings are those of the gguf package (gguf.constants) and of llama.cpp's loaders. An architecture can hold a
model if and only if the config read back from its metadata is the same model, so no list here says what it cannot.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from slm.config import ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.families.recurrent import write_mamba2 as mamba2_config
from slm.interop.fields import FULL, SLIDING, layer_types, rotated_share
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


class Arch(NamedTuple):
    """What is particular to one general.architecture."""

    family: str
    """model_type in slm.interop.families."""
    read: Callable[[Fields], dict]
    """Metadata -> config.json."""
    write: Callable[[ModelConfig], dict]
    """Metadata of a model without the keys of slm.interop.gguf_file, by keys without the architecture's name."""
    change: Callable[[str, np.ndarray, ModelConfig, bool], np.ndarray]
    """(name in Hugging Face, tensor, config, back) -> the tensor as GGUF has it, or, with `back`, the inverse."""
    divided: bool = False
    """llama.cpp divides this architecture's rotary frequencies by the tensor rope_freqs.weight, if there is one."""


# What tensors become.


def unchanged(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    return data


def interleaved(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """Rows of each head of queries and keys from half-split to interleaved rotary order, or back."""
    if not (".q_proj." in theirs or ".k_proj." in theirs):
        return data
    heads = cfg.heads if ".q_proj." in theirs else cfg.kv_heads or cfg.heads
    shape = (heads, -1, 2) if back else (heads, 2, data.shape[0] // heads // 2)
    return data.reshape(*shape, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


def raised(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """Norms about one become plain norms."""
    return data + np.float32(-1 if back else 1) if theirs.endswith("norm.weight") else data


def transposed(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """GPT-2's (in, out) matrices stand as (out, in)."""
    return data.T if theirs.split(".")[-2].startswith("c_") else data


def grouped(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """GPT-NeoX's queries, keys and values, which take turns from head to head, stand one after the other."""
    if ".query_key_value." not in theirs:
        return data
    shape = (3, cfg.heads) if back else (cfg.heads, 3)
    return data.reshape(*shape, -1, *data.shape[1:]).swapaxes(0, 1).reshape(data.shape)


def scanned(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """Mamba-2's decays are stored as they are used, its vectors with the axes that llama.cpp broadcasts."""
    name = theirs.partition(".mixer.")[2]
    if name == "A_log":
        return np.log(-data.reshape(-1)) if back else -np.exp(data)[:, None]
    if name == "D":
        return data.reshape(-1) if back else data[:, None]
    if name == "norm.weight":
        return data.reshape(-1) if back else data.reshape(cfg.mixer.groups or 1, -1)
    if name == "conv1d.weight":
        return data[:, None] if back else data[:, 0]
    return data


# What metadata say.


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


def rope_tensors(arch: Arch, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors that say how rotary positions are stretched."""
    rope = cfg.rope
    if arch.divided and rope.scaling == "llama3":
        plain = rope.theta ** (-np.arange(0, head_dim(cfg), 2, dtype=np.float32) / head_dim(cfg))
        return {"rope_freqs.weight": np.float32(plain / np.asarray(SCALINGS["llama3"](plain, rope, 0)))}
    if rope.scaling != "longrope":
        return {}
    short, long = np.float32(rope.short_factors), np.float32(rope.long_factors)
    if arch.divided:  # one set only; where there are two, reading back will tell
        return {"rope_freqs.weight": long}
    return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}


def rms(f: Fields) -> dict:
    return decoder(f) | {"rms_norm_eps": f.get("attention.layer_norm_rms_epsilon")}


def biased(f: Fields) -> dict:
    return rms(f) | {
        "attention_bias": "blk.0.attn_q.bias" in f.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in f.tensors,
    }


def granite(f: Fields) -> dict:
    size = f.get("embedding_length") // f.get("attention.head_count")
    return biased(f) | {
        "embedding_multiplier": f.get("embedding_scale", 1.0),
        "residual_multiplier": f.get("residual_scale", 1.0),
        "logits_scaling": f.get("logit_scale"),
        "attention_multiplier": f.get("attention.scale", 0.0) or size**-0.5,
    }


def write_granite(cfg: ModelConfig) -> dict:
    return sizes(cfg) | {
        "embedding_scale": cfg.embedding_scale,
        "residual_scale": cfg.residual_scale,
        "logit_scale": cfg.logit_divisor,
        "attention.scale": cfg.mixer.scale or head_dim(cfg) ** -0.5,
    }


def smollm3(f: Fields) -> dict:
    """llama.cpp leaves out the rotation in every fourth layer, whatever the file says."""
    return rms(f) | {"no_rope_layer_interval": 4}


def gemma(f: Fields) -> dict:
    return rms(f) | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}


def _capped(f: Fields, every: int, largest: int) -> dict:
    """Gemma 2 and 3. llama.cpp knows the scale of scores by the number of layers: `largest` are those of the 27B."""
    hf = gemma(f)
    pattern = f.get("attention.sliding_window_pattern", every)
    windowed = [bool(x) for x in pattern] if isinstance(pattern, list) else [
        pattern == 0 or i % pattern < pattern - 1 for i in range(hf["num_hidden_layers"])
    ]  # fmt: skip
    if not f.get("attention.sliding_window", 0):
        windowed = [False] * len(windowed)
    scalar = hf["head_dim"]
    if hf["num_hidden_layers"] == largest:
        scalar = hf["hidden_size"] // hf["num_attention_heads"]
    return hf | {
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": f.get("final_logit_softcapping", None),
        "sliding_window": f.get("attention.sliding_window", 0),
        "layer_types": [SLIDING if x else FULL for x in windowed],
    }


def _write_capped(cfg: ModelConfig, every: int) -> dict:
    found = sizes(cfg)
    if cfg.logit_softcap:
        found["final_logit_softcapping"] = cfg.logit_softcap
    windowed = [kind == SLIDING for kind in layer_types(cfg)]
    if any(windowed):
        found["attention.sliding_window"] = cfg.mixer.window
        if windowed != [i % every < every - 1 for i in range(cfg.layers)]:
            found["attention.sliding_window_pattern"] = windowed
    return found


def gemma2(f: Fields) -> dict:
    """llama.cpp gives all soft caps and windows; the values are its own where the file has none."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    window = {f"{f.name}.attention.sliding_window": f.get("attention.sliding_window", 4096)}
    return _capped(f._replace(values={**f.values, **window}), 2, 46) | {k: f.get(k, v) for k, v in caps.items()}


def write_gemma2(cfg: ModelConfig) -> dict:
    # Left out, a cap is llama.cpp's own; zero would be divided by.
    return _write_capped(cfg, 2) | ({"attn_logit_softcapping": cfg.mixer.softcap} if cfg.mixer.softcap else {})


def gemma3(f: Fields) -> dict:
    local = f.get("rope.freq_base_swa", 10_000.0)
    tied = "output.weight" not in f.tensors
    return _capped(f, 6, 62) | {"rope_local_base_freq": local, "tie_word_embeddings": tied}


def write_gemma3(cfg: ModelConfig) -> dict:
    return _write_capped(cfg, 6) | {"rope.freq_base_swa": cfg.rope.local_theta or cfg.rope.theta}


def phi2(f: Fields) -> dict:
    eps = {"layer_norm_eps": f.get("attention.layer_norm_epsilon")}
    return decoder(f) | eps | {"hidden_act": "gelu_new", "tie_word_embeddings": False}


def phi3(f: Fields) -> dict:
    """A window is kept; llama.cpp itself does not apply it to this architecture."""
    return rms(f) | {"sliding_window": f.get("attention.sliding_window", 0) or None}


def write_phi3(cfg: ModelConfig) -> dict:
    found = sizes(cfg) | {"attention.sliding_window": cfg.mixer.window or 0}
    if cfg.rope.scaling == "longrope":
        found |= {"rope.scaling.original_context_length": cfg.rope.original_length,
                  "rope.scaling.attn_factor": cfg.rope.magnitude}  # fmt: skip
    return found


def gpt2(f: Fields) -> dict:
    return {
        "vocab_size": f.vocab, "n_embd": f.get("embedding_length"), "n_layer": f.get("block_count"),
        "n_head": f.get("attention.head_count"), "n_inner": f.get("feed_forward_length"),
        "n_positions": f.get("context_length"), "activation_function": "gelu_new",
        "layer_norm_epsilon": f.get("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in f.tensors,
    }  # fmt: skip


def gptneox(f: Fields) -> dict:
    """Its GELU is exact in the models that exist; llama.cpp computes it by tanh, to about 1e-3."""
    hf = decoder(f)
    return hf | {
        "layer_norm_eps": f.get("attention.layer_norm_epsilon"), "hidden_act": "gelu", "tie_word_embeddings": False,
        "use_parallel_residual": bool(f.get("use_parallel_residual")),
        "rotary_pct": hf["partial_rotary_factor"], "rotary_emb_base": hf.pop("rope_theta"),
    }  # fmt: skip


def write_gptneox(cfg: ModelConfig) -> dict:
    return sizes(cfg) | {"use_parallel_residual": cfg.residual == "parallel"}


def mamba2(f: Fields) -> dict:
    inner, heads = f.get("ssm.inner_size"), f.get("ssm.time_step_rank")
    return {
        "vocab_size": f.vocab, "hidden_size": f.get("embedding_length"), "num_hidden_layers": f.get("block_count"),
        "num_heads": heads, "head_dim": inner // heads, "state_size": f.get("ssm.state_size"),
        "n_groups": f.get("ssm.group_count"), "conv_kernel": f.get("ssm.conv_kernel"),
        "expand": inner // f.get("embedding_length"), "layer_norm_epsilon": f.get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in f.tensors, "use_bias": False,
    }  # fmt: skip


def write_mamba2(cfg: ModelConfig) -> dict:
    hf = mamba2_config(cfg)
    return {
        "embedding_length": cfg.width, "block_count": cfg.layers, "feed_forward_length": 0, "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": cfg.norm_eps, "ssm.inner_size": hf["num_heads"] * hf["head_dim"],
        "ssm.time_step_rank": hf["num_heads"], "ssm.state_size": hf["state_size"],
        "ssm.group_count": hf["n_groups"], "ssm.conv_kernel": hf["conv_kernel"],
    }  # fmt: skip


ARCHS = {
    "llama": Arch("llama", biased, sizes, interleaved, divided=True),
    "qwen2": Arch("qwen2", rms, sizes, unchanged),
    "qwen3": Arch("qwen3", rms, sizes, unchanged),
    "granite": Arch("granite", granite, write_granite, interleaved, divided=True),
    "smollm3": Arch("smollm3", smollm3, sizes, interleaved),
    "gemma": Arch("gemma", gemma, sizes, raised),
    "gemma2": Arch("gemma2", gemma2, write_gemma2, raised),
    "gemma3": Arch("gemma3_text", gemma3, write_gemma3, raised),
    "phi2": Arch("phi", phi2, sizes, unchanged),
    "phi3": Arch("phi3", phi3, write_phi3, unchanged),
    "gpt2": Arch("gpt2", gpt2, sizes, transposed),
    "gptneox": Arch("gpt_neox", gptneox, write_gptneox, grouped),
    "mamba2": Arch("mamba2", mamba2, write_mamba2, scanned),
}
"""general.architecture to its particulars."""
