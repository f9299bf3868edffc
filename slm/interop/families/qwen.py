"""Qwen 2, 2.5 and 3: biases of queries, keys and values, or norms of queries and keys."""

from slm.config import MixerConfig, ModelConfig
from slm.interop.families.family import DECODER, Family
from slm.interop.families.llama import read_llama, write_llama
from slm.interop.fields import FULL, SLIDING, layer_types, need, windows


def _attention(hf: dict, qk_norm: str) -> dict:
    """model.attention and model.mixer: the layers from max_window_layers on have a window, if any has."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    first = hf.get("max_window_layers", need(hf, "num_hidden_layers"))
    count = need(hf, "num_hidden_layers")
    types = hf.get("layer_types") or [SLIDING if window and i >= first else FULL for i in range(count)]
    pattern = windows(types)
    window = hf.get("sliding_window") if "window" in pattern else None
    return {"attention": pattern, "mixer": MixerConfig(qk_norm=qk_norm, window=window)}


def _write_windows(cfg: ModelConfig) -> dict:
    types = layer_types(cfg)
    some = SLIDING in types
    return {
        "use_sliding_window": some,
        "sliding_window": cfg.mixer.window if some else None,
        "max_window_layers": types.index(SLIDING) if some else cfg.layers,
        "layer_types": types,
    }


def read_qwen2(hf: dict) -> ModelConfig:
    return read_llama(hf, bias=("qkv",), **_attention(hf, "none"))


def write_qwen2(cfg: ModelConfig) -> dict:
    hf = write_llama(cfg) | _write_windows(cfg)
    del hf["attention_bias"], hf["mlp_bias"]
    return hf


def read_qwen3(hf: dict) -> ModelConfig:
    return read_llama(hf, **{"head_dim": hf.get("head_dim") or 128} | _attention(hf, "rms"))


def write_qwen3(cfg: ModelConfig) -> dict:
    hf = write_llama(cfg) | _write_windows(cfg)
    del hf["mlp_bias"]
    return hf


FAMILIES = (
    Family("qwen2", "Qwen2ForCausalLM", read_qwen2, write_qwen2, DECODER),
    Family("qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3, DECODER),
)
