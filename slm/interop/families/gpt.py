"""GPT-2, and GPT-NeoX with Pythia: LayerNorm, biases, plain feed-forwards, fused projections."""

from slm.config import MixerConfig, ModelConfig
from slm.interop.families.family import Family, Names
from slm.interop.fields import (
    activation,
    common,
    fraction,
    need,
    plain,
    read_rope,
    refuse,
    rotated_share,
    write_common,
    write_rope,
)
from slm.interop.layout import by_head, fused_columns, linear, norm, same
from slm.models.layers import mlp_width

BIASES = ("qkv", "out", "mlp", "norm")


def read_gpt2(hf: dict) -> ModelConfig:
    refuse(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width = need(hf, "n_embd")
    return ModelConfig(
        vocab_size=need(hf, "vocab_size"), layers=need(hf, "n_layer"), width=width, heads=need(hf, "n_head"),
        mlp_width=hf.get("n_inner") or 4 * width, mlp=plain(hf.get("activation_function", "gelu_new")),
        position="learned", max_length=need(hf, "n_positions"), norm="layernorm", bias=BIASES,
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)), tied=bool(hf.get("tie_word_embeddings", True)),
        mixer=MixerConfig(qk_norm="none"),
    )  # fmt: skip


def write_gpt2(cfg: ModelConfig) -> dict:
    return {
        "vocab_size": cfg.vocab_size, "n_layer": cfg.layers, "n_embd": cfg.width, "n_head": cfg.heads,
        "n_inner": mlp_width(cfg), "n_positions": cfg.max_length, "n_ctx": cfg.max_length,
        "activation_function": activation(cfg), "layer_norm_epsilon": cfg.norm_eps, "tie_word_embeddings": cfg.tied,
        "initializer_range": cfg.init_std,
    }  # fmt: skip


def read_neox(hf: dict) -> ModelConfig:
    new = hf.get("rope_parameters") or {}
    theta = float(new.get("rope_theta") or hf.get("rotary_emb_base") or 10_000.0)
    share = fraction(new.get("partial_rotary_factor", hf.get("rotary_pct", 0.25)))
    return common(
        hf, kv_heads=None, mlp=plain(hf.get("hidden_act", "gelu")), rope=read_rope(hf, theta), norm="layernorm",
        norm_eps=float(hf.get("layer_norm_eps", 1e-5)), bias=BIASES if hf.get("attention_bias", True) else BIASES[2:],
        residual="parallel" if hf.get("use_parallel_residual", True) else "pre",
        mixer=MixerConfig(qk_norm="none", rope_fraction=share),
    )  # fmt: skip


def write_neox(cfg: ModelConfig) -> dict:
    hf = write_common(cfg) | write_rope(cfg.rope)
    del hf["head_dim"], hf["rms_norm_eps"], hf["num_key_value_heads"]
    return hf | {
        "rotary_emb_base": hf.pop("rope_theta"), "rotary_pct": rotated_share(cfg), "layer_norm_eps": cfg.norm_eps,
        "hidden_act": activation(cfg), "attention_bias": "qkv" in cfg.bias,
        "use_parallel_residual": cfg.residual == "parallel",
    }  # fmt: skip


def neox_layer(layer):
    return (
        *norm("input_layernorm", "attention_norm"),
        *norm("post_attention_layernorm", "mlp_norm"),
        *by_head("attention.query_key_value", layer.cfg.heads, "mixer/query", "mixer/key", "mixer/value"),
        *linear("attention.dense", "mixer/out"),
        *linear("mlp.dense_h_to_4h", "mlp/up"),
        *linear("mlp.dense_4h_to_h", "mlp/down"),
    )


GPT2_LAYER = (
    *norm("ln_1", "attention_norm"),
    *fused_columns("attn.c_attn", "mixer/query", "mixer/key", "mixer/value"),
    *fused_columns("attn.c_proj", "mixer/out"),
    *norm("ln_2", "mlp_norm"),
    *fused_columns("mlp.c_fc", "mlp/up"),
    *fused_columns("mlp.c_proj", "mlp/down"),
)
GPT2 = Names(
    "transformer.h",
    lambda layer: GPT2_LAYER,
    (
        same("transformer.wte.weight", "embed/embedding"),
        same("transformer.wpe.weight", "embed/position"),
        *norm("transformer.ln_f", "final_norm"),
        *linear("lm_head", "head"),
    ),
    ignored=r".*\.attn\.(masked_)?bias",
)
NEOX = Names(
    "gpt_neox.layers",
    neox_layer,
    (
        same("gpt_neox.embed_in.weight", "embed/embedding"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        *linear("embed_out", "head"),
    ),
    ignored=r".*(rotary_emb\.inv_freq|\.attention\.(masked_)?bias)",
)
FAMILIES = (
    Family("gpt2", "GPT2LMHeadModel", read_gpt2, write_gpt2, GPT2),
    Family("gpt_neox", "GPTNeoXForCausalLM", read_neox, write_neox, NEOX),
)
