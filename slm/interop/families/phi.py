"""Phi 1 to 2, whose blocks are parallel; Phi 3 and 4-mini, whose projections are fused."""

from slm.config import MixerConfig, ModelConfig
from slm.interop.families.family import LAYER, OUTSIDE, Family, Names
from slm.interop.families.llama import write_llama
from slm.interop.fields import (
    activation,
    common,
    fraction,
    gated,
    plain,
    read_rope,
    refuse,
    rotated_share,
    write_common,
    write_rope,
)
from slm.interop.layout import fused, linear, norm, same


def _share(hf: dict, missing: float) -> float | None:
    new = hf.get("rope_parameters") or {}
    return fraction(new.get("partial_rotary_factor", hf.get("partial_rotary_factor", missing)))


def read_phi(hf: dict) -> ModelConfig:
    refuse(hf, qk_layernorm=False)
    return common(
        hf, mlp=plain(hf.get("hidden_act", "gelu_new")), rope=read_rope(hf), norm="layernorm",
        norm_eps=float(hf.get("layer_norm_eps", 1e-5)), bias=("qkv", "out", "mlp", "norm", "head"),
        residual="parallel_shared", mixer=MixerConfig(qk_norm="none", rope_fraction=_share(hf, 0.5)),
    )  # fmt: skip


def write_phi(cfg: ModelConfig) -> dict:
    hf = write_common(cfg) | write_rope(cfg.rope)
    del hf["head_dim"], hf["rms_norm_eps"]
    return hf | {
        "hidden_act": activation(cfg),
        "layer_norm_eps": cfg.norm_eps,
        "partial_rotary_factor": rotated_share(cfg),
        "qk_layernorm": False,
    }


def read_phi3(hf: dict) -> ModelConfig:
    window = hf.get("sliding_window")
    mixer = MixerConfig(qk_norm="none", rope_fraction=_share(hf, 1.0), window=window)
    return common(
        hf, mlp=gated(hf.get("hidden_act", "silu")), rope=read_rope(hf), mixer=mixer,
        attention=("window" if window else "softmax",),
    )  # fmt: skip


def write_phi3(cfg: ModelConfig) -> dict:
    hf = write_llama(cfg) | {"sliding_window": cfg.mixer.window, "partial_rotary_factor": rotated_share(cfg)}
    del hf["attention_bias"], hf["mlp_bias"], hf["head_dim"]
    if cfg.rope.scaling == "longrope":
        hf["original_max_position_embeddings"] = cfg.rope.original_length
        hf["max_position_embeddings"] = round(cfg.rope.factor * cfg.rope.original_length)
    return hf


PHI_LAYER = (
    *norm("input_layernorm", "attention_norm"),
    *linear("self_attn.q_proj", "mixer/query"),
    *linear("self_attn.k_proj", "mixer/key"),
    *linear("self_attn.v_proj", "mixer/value"),
    *linear("self_attn.dense", "mixer/out"),
    *linear("mlp.fc1", "mlp/up"),
    *linear("mlp.fc2", "mlp/down"),
)
PHI_OUTSIDE = (
    same("model.embed_tokens.weight", "embed/embedding"),
    *norm("model.final_layernorm", "final_norm"),
    *linear("lm_head", "head"),
)
SEPARATE = ("self_attn.q_", "self_attn.k_", "self_attn.v_", "mlp.gate", "mlp.up")
PHI3_LAYER = (
    *(link for link in LAYER if not link.theirs.startswith(SEPARATE)),
    *fused("self_attn.qkv_proj", "mixer/query", "mixer/key", "mixer/value"),
    *fused("mlp.gate_up_proj", "mlp/gate", "mlp/up"),
)
FAMILIES = (
    Family("phi", "PhiForCausalLM", read_phi, write_phi, Names("model.layers", lambda layer: PHI_LAYER, PHI_OUTSIDE)),
    Family(
        "phi3", "Phi3ForCausalLM", read_phi3, write_phi3, Names("model.layers", lambda layer: PHI3_LAYER, OUTSIDE),
        {"pad_token_id": None},  # its own lies beyond a small vocabulary, and transformers refuses that
    ),
)  # fmt: skip
