"""What each general.architecture of GGUF keeps in its metadata, and which tensors it stores in a way of its own.

Names and meanings are those of the gguf package (gguf.constants) and of llama.cpp's loaders. An architecture can hold a
model if and only if the config read back from its metadata is the same model, so no list here says what it cannot.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from slm.config import ModelConfig
from slm.interop.families.recurrent import write_mamba2 as mamba2_config
from slm.interop.fields import FULL, SLIDING, layer_types
from slm.interop.gguf_fields import Fields, decoder, sizes
from slm.interop.gguf_layout import grouped, interleaved, raised, scanned, transposed, unchanged
from slm.models.mixers import head_dim


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
