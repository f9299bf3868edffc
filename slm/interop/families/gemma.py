"""Gemma 1 to 3 (text): embeddings times the root of the width, norms about one, GeGLU; then soft caps and windows; then
two rotary bases and norms of queries and keys."""

from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.interop.families.family import DECODER, LAYER, OUTSIDE, Family, Names
from slm.interop.fields import (
    FULL,
    SLIDING,
    activation,
    common,
    gated,
    layer_types,
    need,
    read_rope,
    refuse,
    windows,
    write_common,
    write_rope,
)
from slm.interop.layout import norm


def _read(hf: dict, **fields) -> ModelConfig:
    refuse(hf, attention_bias=False, use_bidirectional_attention=False)
    width = need(hf, "hidden_size")
    wanted = {
        "mlp": gated(hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh"), "rope": read_rope(hf),
        "norm": "zero_centered_rmsnorm", "embedding_scale": width**0.5,
        "tied": bool(hf.get("tie_word_embeddings", True)), "head_dim": hf.get("head_dim") or 256,
    }  # fmt: skip
    return common(hf, **wanted | fields)


def _write(cfg: ModelConfig) -> dict:
    act = activation(cfg)
    return write_common(cfg) | write_rope(cfg.rope) | {"hidden_activation": act, "hidden_act": act}


def _capped(hf: dict, qk_norm: str, pattern: tuple[str, ...]) -> dict:
    """What Gemma 2 and 3 have in common."""
    scale = float(need(hf, "query_pre_attn_scalar")) ** -0.5
    softcap = hf.get("attn_logit_softcapping")
    window = need(hf, "sliding_window") if "window" in pattern else None
    return {
        "attention": pattern,
        "residual": "sandwich",
        "logit_softcap": hf.get("final_logit_softcapping"),
        "mixer": MixerConfig(qk_norm=qk_norm, scale=scale, softcap=softcap, window=window),
    }


def _write_capped(cfg: ModelConfig) -> dict:
    hf = _write(cfg)
    del hf["hidden_act"]
    return hf | {
        "query_pre_attn_scalar": round((cfg.mixer.scale or 1.0) ** -2),
        "attn_logit_softcapping": cfg.mixer.softcap or None,
        "final_logit_softcapping": cfg.logit_softcap,
        "sliding_window": cfg.mixer.window,
        "layer_types": layer_types(cfg),
    }


def read_gemma2(hf: dict) -> ModelConfig:
    count = need(hf, "num_hidden_layers")
    types = hf.get("layer_types") or [FULL if i % 2 else SLIDING for i in range(count)]
    return _read(hf, **_capped(hf, "none", windows(types)))


def read_gemma3(hf: dict) -> ModelConfig:
    count, every = need(hf, "num_hidden_layers"), hf.get("sliding_window_pattern", 6)
    types = hf.get("layer_types") or [SLIDING if (i + 1) % every else FULL for i in range(count)]
    rope = read_rope(hf, 1_000_000.0, FULL)
    near = (hf.get("rope_parameters") or {}).get(SLIDING) or {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)}
    refuse(near, rope_type="default")
    local = RopeConfig(**vars(rope) | {"local_theta": float(near["rope_theta"])})
    return _read(hf, rope=local, **_capped(hf, "rms", windows(types)))


def write_gemma3(cfg: ModelConfig) -> dict:
    return _write_capped(cfg) | {"rope_local_base_freq": cfg.rope.local_theta}


LAYER_4 = (
    *(link for link in LAYER if not link.theirs.startswith("post_attention")),
    *norm("post_attention_layernorm", "attention_post_norm"),
    *norm("pre_feedforward_layernorm", "mlp_norm"),
    *norm("post_feedforward_layernorm", "mlp_post_norm"),
)
SANDWICH = Names("model.layers", lambda layer: LAYER_4, OUTSIDE)
FAMILIES = (
    Family("gemma", "GemmaForCausalLM", _read, _write, DECODER),
    Family("gemma2", "Gemma2ForCausalLM", read_gemma2, _write_capped, SANDWICH),
    Family("gemma3_text", "Gemma3ForCausalLM", read_gemma3, write_gemma3, SANDWICH),
)
