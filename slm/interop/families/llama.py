"""Llama 2 to 3.2, SmolLM 1 and 2, TinyLlama and all others of the Llama layout; SmolLM3 with layers without positions;
Granite with its multipliers; Mistral and Ministral with windows."""

from slm.config import MixerConfig, ModelConfig
from slm.interop.families.family import DECODER, Family
from slm.interop.fields import (
    activation,
    common,
    gated,
    layer_types,
    need,
    read_rope,
    refuse,
    shortest,
    windows,
    write_common,
    write_rope,
)
from slm.models.mixers import layer_pattern


def read_llama(hf: dict, **fields) -> ModelConfig:
    biases = (("qkv", "out") if hf.get("attention_bias") else ()) + (("mlp",) if hf.get("mlp_bias") else ())
    share = (hf.get("rope_parameters") or {}).get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    refuse({"partial_rotary_factor": share}, partial_rotary_factor=1.0)
    wanted = {"mlp": gated(hf.get("hidden_act", "silu")), "bias": biases}
    wanted |= {} if "rope" in fields else {"rope": read_rope(hf)}
    return common(hf, **wanted | fields)


def write_llama(cfg: ModelConfig) -> dict:
    return write_common(cfg) | write_rope(cfg.rope) | {
        "hidden_act": activation(cfg),
        "attention_bias": "qkv" in cfg.bias,
        "mlp_bias": "mlp" in cfg.bias,
    }  # fmt: skip


def read_smollm3(hf: dict) -> ModelConfig:
    refuse(hf, use_sliding_window=False)
    every = hf.get("no_rope_layer_interval", 4)
    turned = hf.get("no_rope_layers") or [(i + 1) % every for i in range(need(hf, "num_hidden_layers"))]
    names = ["softmax" if turns else "nope_softmax" for turns in turned]
    tied = bool(hf.get("tie_word_embeddings", True))
    return read_llama(hf, attention=shortest(names), rope=read_rope(hf, 2_000_000.0), tied=tied)


def write_smollm3(cfg: ModelConfig) -> dict:
    pattern = layer_pattern(cfg)
    turned = [int(pattern[i % len(pattern)] == "softmax") for i in range(cfg.layers)]
    return write_llama(cfg) | {"no_rope_layers": turned, "use_sliding_window": False, "layer_types": layer_types(cfg)}


def read_granite(hf: dict) -> ModelConfig:
    return read_llama(
        hf,
        embedding_scale=float(hf.get("embedding_multiplier", 1.0)),
        residual_scale=float(hf.get("residual_multiplier", 1.0)),
        logit_divisor=float(hf.get("logits_scaling", 1.0)),
        mixer=MixerConfig(qk_norm="none", scale=float(hf.get("attention_multiplier", 1.0))),
    )


def write_granite(cfg: ModelConfig) -> dict:
    return write_llama(cfg) | {
        "embedding_multiplier": cfg.embedding_scale,
        "residual_multiplier": cfg.residual_scale,
        "logits_scaling": cfg.logit_divisor,
        "attention_multiplier": cfg.mixer.scale,
    }


def read_mistral(hf: dict, **fields) -> ModelConfig:
    """Every layer has the window, or none has."""
    window = hf.get("sliding_window")
    return read_llama(
        hf, attention=("window" if window else "softmax",), mixer=MixerConfig(qk_norm="none", window=window), **fields
    )


def write_mistral(cfg: ModelConfig) -> dict:
    hf = write_llama(cfg) | {"sliding_window": cfg.mixer.window}
    del hf["attention_bias"], hf["mlp_bias"]
    return hf


def read_ministral(hf: dict) -> ModelConfig:
    """Layers with and without a window, by layer_types."""
    types = hf.get("layer_types")
    if types is None:
        return read_mistral(hf)
    pattern = windows(types)
    window = hf.get("sliding_window") if "window" in pattern else None
    return read_llama(hf, attention=pattern, mixer=MixerConfig(qk_norm="none", window=window))


def write_ministral(cfg: ModelConfig) -> dict:
    return write_mistral(cfg) | {"layer_types": layer_types(cfg)}


def read_ministral3(hf: dict) -> ModelConfig:
    return read_mistral(hf, rope=read_rope(hf, 1_000_000.0, growing_queries=True))


def write_ministral3(cfg: ModelConfig) -> dict:
    """In the new layout only: the model is younger than it."""
    hf = write_mistral(cfg)
    scaling = hf.pop("rope_scaling") or {"rope_type": "default"}
    return hf | {"rope_parameters": scaling | {"rope_theta": hf.pop("rope_theta")}}


FAMILIES = (
    Family("llama", "LlamaForCausalLM", read_llama, write_llama, DECODER),
    Family("granite", "GraniteForCausalLM", read_granite, write_granite, DECODER),
    Family("mistral", "MistralForCausalLM", read_mistral, write_mistral, DECODER),
    Family("ministral", "MinistralForCausalLM", read_ministral, write_ministral, DECODER),
    Family("ministral3", "Ministral3ForCausalLM", read_ministral3, write_ministral3, DECODER),
    # Its own padding id lies beyond a small vocabulary, and transformers refuses that.
    Family("smollm3", "SmolLM3ForCausalLM", read_smollm3, write_smollm3, DECODER, {"pad_token_id": None}),
)
