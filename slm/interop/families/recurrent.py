"""Models with a recurrent state: Mamba-2, RecurrentGemma, and the layout of Qwen3-Next (without experts)."""

import math

import ml_dtypes

from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.interop.families.family import LAYER, OUTSIDE, Family, Names
from slm.interop.fields import (
    activation,
    common,
    fraction,
    gated,
    need,
    read_rope,
    refuse,
    rotated_share,
    shortest,
    write_common,
    write_rope,
)
from slm.interop.layout import by_head, conv, flat, fused, linear, norm, same
from slm.models.layers import mlp_width
from slm.models.mixers import head_dim, layer_pattern


def read_mamba2(hf: dict) -> ModelConfig:
    refuse(hf, use_conv_bias=True, hidden_act="silu", norm_before_gate=False)
    # transformers writes infinity as {"__float__": "Infinity"}.
    limits = [float(x["__float__"] if isinstance(x, dict) else x) for x in hf.get("time_step_limit") or ()]
    refuse({"time_step_limit": limits or None}, time_step_limit=[0.0, math.inf])
    size = need(hf, "head_dim")
    return ModelConfig(
        vocab_size=need(hf, "vocab_size"), layers=need(hf, "num_hidden_layers"), width=need(hf, "hidden_size"),
        heads=need(hf, "num_heads"), head_dim=size, attention=("mamba2",), position="none", mlp="none",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)), tied=bool(hf.get("tie_word_embeddings", False)),
        bias=("qkv", "out") if hf.get("use_bias") else (),
        mixer=MixerConfig(
            expand_k=need(hf, "state_size") / size, expand_v=1.0, groups=hf.get("n_groups", 8),
            conv=hf.get("conv_kernel", 4),
        ),
    )  # fmt: skip


def write_mamba2(cfg: ModelConfig) -> dict:
    m, size = cfg.mixer, head_dim(cfg)
    values = round((m.expand_v or 2.0) * size)
    return {
        "vocab_size": cfg.vocab_size, "num_hidden_layers": cfg.layers, "hidden_size": cfg.width, "num_heads": cfg.heads,
        "head_dim": values, "state_size": round((m.expand_k or 1.0) * size), "n_groups": m.groups or 1,
        "expand": cfg.heads * values // cfg.width, "conv_kernel": 4 if m.conv is None else m.conv,
        "layer_norm_epsilon": cfg.norm_eps, "tie_word_embeddings": cfg.tied, "use_bias": "qkv" in cfg.bias,
        "use_conv_bias": True, "hidden_act": "silu", "chunk_size": 256,
    }  # fmt: skip


MAMBA2 = Names(
    "backbone.layers",
    lambda layer: (
        *norm("norm", "attention_norm"),
        *fused("mixer.in_proj", "mixer/gate", "mixer/value", "mixer/key", "mixer/query", "mixer/step"),
        *conv("mixer.conv1d", "mixer/value_conv", "mixer/key_conv", "mixer/query_conv"),
        same("mixer.A_log", "mixer/decay"),
        same("mixer.D", "mixer/skip"),
        same("mixer.dt_bias", "mixer/bias"),
        flat("mixer.norm.weight", "mixer/output_norm/scale"),
        *linear("mixer.out_proj", "mixer/out"),
    ),
    (
        same("backbone.embeddings.weight", "embed/embedding"),
        *norm("backbone.norm_f", "final_norm"),
        *linear("lm_head", "head"),
    ),
)


def read_recurrent_gemma(hf: dict) -> ModelConfig:
    refuse(hf, attention_bias=False)
    width, heads = need(hf, "hidden_size"), need(hf, "num_attention_heads")
    kinds = {"recurrent": "rglru", "attention": "window"}
    blocks = [kinds.get(kind, kind) for kind in hf.get("block_types") or ("recurrent", "recurrent", "attention")]
    if unknown := set(blocks) - set(kinds.values()):
        raise ConfigError(f"config.json: block type {min(unknown)!r} is not supported, only {', '.join(kinds)}")
    share = (hf.get("rope_parameters") or {}).get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5))
    channels = (hf.get("lru_width") or width) // heads
    return common(
        hf, attention=tuple(blocks), mlp=gated(hf.get("hidden_activation", "gelu_pytorch_tanh")), rope=read_rope(hf),
        mlp_width=need(hf, "intermediate_size") // 2, norm="zero_centered_rmsnorm", bias=("recurrent", "out", "mlp"),
        # Its code rounds the root to bfloat16.
        embedding_scale=float(ml_dtypes.bfloat16(width**0.5)), logit_softcap=hf.get("logits_soft_cap", 30.0),
        tied=bool(hf.get("tie_word_embeddings", True)), head_dim=width // heads,
        mixer=MixerConfig(
            qk_norm="none", rope_fraction=fraction(share), window=hf.get("attention_window_size", 2048),
            conv=hf.get("conv1d_width", 4), expand_v=channels / (width // heads),
        ),
    )  # fmt: skip


def write_recurrent_gemma(cfg: ModelConfig) -> dict:
    hf = write_common(cfg) | write_rope(cfg.rope)
    kinds = {"rglru": "recurrent", "window": "attention"}
    return hf | {
        "block_types": [kinds.get(name, name) for name in layer_pattern(cfg)], "hidden_activation": activation(cfg),
        "intermediate_size": 2 * mlp_width(cfg), "logits_soft_cap": cfg.logit_softcap,
        "partial_rotary_factor": rotated_share(cfg), "attention_window_size": cfg.mixer.window or 256,
        "conv1d_width": 4 if cfg.mixer.conv is None else cfg.mixer.conv,
        "lru_width": cfg.heads * round((cfg.mixer.expand_v or 1.0) * head_dim(cfg)), "attention_bias": False,
    }  # fmt: skip


RECURRENT_GEMMA = Names(
    "model.layers",
    lambda layer: (
        *norm("temporal_pre_norm", "attention_norm"),
        *linear("temporal_block.q_proj", "mixer/query"),
        *linear("temporal_block.k_proj", "mixer/key"),
        *(link for link in linear("temporal_block.v_proj", "mixer/value") if layer.mechanism == "window"),
        *(link for link in linear("temporal_block.o_proj", "mixer/out") if layer.mechanism == "window"),
        *(link for link in linear("temporal_block.linear_x", "mixer/value") if layer.mechanism == "rglru"),
        *linear("temporal_block.linear_y", "mixer/gate"),
        *(link for link in linear("temporal_block.linear_out", "mixer/out") if layer.mechanism == "rglru"),
        *conv("temporal_block.conv_1d", "mixer/value_conv"),
        flat("temporal_block.rg_lru.recurrent_param", "mixer/decay"),
        same("temporal_block.rg_lru.input_gate_weight", "mixer/input_gate/map"),
        same("temporal_block.rg_lru.input_gate_bias", "mixer/input_gate/bias"),
        same("temporal_block.rg_lru.recurrent_gate_weight", "mixer/forget_gate/map"),
        same("temporal_block.rg_lru.recurrent_gate_bias", "mixer/forget_gate/bias"),
        *norm("channel_pre_norm", "mlp_norm"),
        *linear("mlp_block.gate_proj", "mlp/gate"),
        *linear("mlp_block.up_proj", "mlp/up"),
        *linear("mlp_block.down_proj", "mlp/down"),
    ),
    (
        same("model.embed_tokens.weight", "embed/embedding"),
        *norm("model.final_norm", "final_norm"),
        *linear("lm_head", "head"),
    ),
)

LINEAR, FULL = "linear_attention", "full_attention"


def read_qwen3_next(hf: dict) -> ModelConfig:
    """Experts are refused. The layers' heads differ: value heads of the delta rule, query heads of softmax."""
    count, size = need(hf, "num_hidden_layers"), hf.get("head_dim") or 256
    dense = hf.get("mlp_only_layers") or []
    if hf.get("num_experts") and not set(range(count)) <= set(dense):
        refuse(hf, num_experts=0)
    refuse({"partial_rotary_factor": _share(hf)}, partial_rotary_factor=0.25)
    every = hf.get("full_attention_interval", 4)
    types = hf.get("layer_types") or [LINEAR if (i + 1) % every else FULL for i in range(count)]
    names = ["gated_delta" if kind == LINEAR else "gated_softmax" for kind in types]
    heads, value_heads = need(hf, "num_attention_heads"), hf.get("linear_num_value_heads", 32)
    return common(
        hf, attention=shortest(names), head_dim=size, mlp=gated(hf.get("hidden_act", "silu")), rope=read_rope(hf),
        norm="zero_centered_rmsnorm", bias=("qkv", "out") if hf.get("attention_bias") else (),
        layer_heads=tuple(value_heads if kind == LINEAR else heads for kind in types),
        mixer=MixerConfig(
            groups=hf.get("linear_num_key_heads", 16), conv=hf.get("linear_conv_kernel_dim", 4),
            expand_k=hf.get("linear_key_head_dim", 128) / size, expand_v=hf.get("linear_value_head_dim", 128) / size,
        ),
    )  # fmt: skip


def _share(hf: dict) -> float:
    return (hf.get("rope_parameters") or {}).get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.25))


def write_qwen3_next(cfg: ModelConfig) -> dict:
    pattern, m, size = layer_pattern(cfg), cfg.mixer, head_dim(cfg)
    types = [LINEAR if pattern[i % len(pattern)] == "gated_delta" else FULL for i in range(cfg.layers)]
    heads = cfg.layer_heads or (cfg.heads,) * cfg.layers
    count = {kind: heads[types.index(kind)] if kind in types else cfg.heads for kind in (LINEAR, FULL)}
    return write_common(cfg) | write_rope(cfg.rope) | {
        "layer_types": types, "num_attention_heads": count[FULL], "linear_num_value_heads": count[LINEAR],
        "linear_num_key_heads": m.groups or count[LINEAR], "linear_conv_kernel_dim": 4 if m.conv is None else m.conv,
        "linear_key_head_dim": round((0.75 if m.expand_k is None else m.expand_k) * size),
        "linear_value_head_dim": round((1.5 if m.expand_v is None else m.expand_v) * size),
        "partial_rotary_factor": 0.25, "hidden_act": activation(cfg), "attention_bias": "qkv" in cfg.bias,
        "num_experts": 0, "mlp_only_layers": [], "decoder_sparse_step": 1,
    }  # fmt: skip


def qwen3_next_layer(layer):
    shared = tuple(link for link in LAYER if not link.theirs.startswith("self_attn"))
    if layer.mechanism == "gated_softmax":
        own = tuple(link for link in LAYER if link.theirs.startswith("self_attn") and "q_proj" not in link.theirs)
        return *shared, *own, *by_head("self_attn.q_proj", layer.cfg.heads, "mixer/query", "mixer/gate")
    groups = layer.configured.mixer.groups or layer.cfg.heads
    return (
        *shared,
        *by_head("linear_attn.in_proj_qkvz", groups, "mixer/query", "mixer/key", "mixer/value", "mixer/gate"),
        *by_head("linear_attn.in_proj_ba", groups, "mixer/beta", "mixer/step"),
        *conv("linear_attn.conv1d", "mixer/query_conv", "mixer/key_conv", "mixer/value_conv"),
        same("linear_attn.A_log", "mixer/decay"),
        same("linear_attn.dt_bias", "mixer/bias"),
        *norm("linear_attn.norm", "mixer/output_norm"),
        *linear("linear_attn.out_proj", "mixer/out"),
    )


FAMILIES = (
    Family("mamba2", "Mamba2ForCausalLM", read_mamba2, write_mamba2, MAMBA2),
    Family(
        "recurrent_gemma", "RecurrentGemmaForCausalLM", read_recurrent_gemma, write_recurrent_gemma, RECURRENT_GEMMA
    ),
    Family(
        "qwen3_next", "Qwen3NextForCausalLM", read_qwen3_next, write_qwen3_next,
        Names("model.layers", qwen3_next_layer, OUTSIDE, ignored=r"mtp\..*"),
    ),
)  # fmt: skip
