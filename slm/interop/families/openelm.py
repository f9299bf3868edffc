"""OpenELM, whose layers differ in heads and feed-forward width (Mehta et al. 2024, 2404.14619).

transformers has no class for it: its folders come with code of their own, which is not needed here.
"""

from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.errors import ConfigError
from slm.interop.families.family import Family, Names
from slm.interop.fields import gated, need, refuse
from slm.interop.layout import fused, linear, norm, same
from slm.models.layers import mlp_width
from slm.models.mixers import head_dim


def read_openelm(hf: dict) -> ModelConfig:
    refuse(hf, ffn_with_glu=True, normalization_layer_name="rms_norm")
    heads, kv_heads = need(hf, "num_query_heads"), need(hf, "num_kv_heads")
    count, width = need(hf, "num_transformer_layers"), need(hf, "model_dim")
    shares, divisor = need(hf, "ffn_multipliers"), hf.get("ffn_dim_divisor", 256)
    for name, values in (("num_query_heads", heads), ("num_kv_heads", kv_heads), ("ffn_multipliers", shares)):
        if not isinstance(values, list) or len(values) != count:
            raise ConfigError(f"config.json: {name} must have a value for each of {count} layers")
    return ModelConfig(
        vocab_size=need(hf, "vocab_size"), layers=count, width=width, heads=heads[0], kv_heads=kv_heads[0],
        head_dim=need(hf, "head_dim"), layer_heads=tuple(heads), layer_kv_heads=tuple(kv_heads),
        layer_mlp_widths=tuple(_divisible(share * width, divisor) for share in shares),
        mlp=gated(hf.get("activation_fn_name", "swish")), norm_eps=1e-6, tied=hf.get("share_input_output_layers", True),
        rope=RopeConfig(theta=float(hf.get("rope_freq_constant", 10_000))),
        mixer=MixerConfig(qk_norm="rms" if hf.get("normalize_qk_projections") else "none"),
    )  # fmt: skip


def _divisible(size: float, divisor: int) -> int:
    """The nearest multiple of `divisor` that is not less than nine tenths of `size`."""
    nearest = max(divisor, int(size + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * size else nearest


def write_openelm(cfg: ModelConfig) -> dict:
    """ffn_dim_divisor 1, so that every width can be said."""
    every = range(cfg.layers)
    widths = cfg.layer_mlp_widths or (mlp_width(cfg),) * cfg.layers
    return {
        "vocab_size": cfg.vocab_size, "num_transformer_layers": cfg.layers, "model_dim": cfg.width,
        "head_dim": head_dim(cfg), "num_query_heads": list(cfg.layer_heads or (cfg.heads for _ in every)),
        "num_kv_heads": list(cfg.layer_kv_heads or (cfg.kv_heads or cfg.heads for _ in every)),
        "ffn_multipliers": [width / cfg.width for width in widths], "ffn_dim_divisor": 1, "ffn_with_glu": True,
        "activation_fn_name": "swish", "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": cfg.mixer.qk_norm != "none", "share_input_output_layers": cfg.tied,
        "rope_freq_constant": cfg.rope.theta, "initializer_range": cfg.init_std,
    }  # fmt: skip


LAYER = (
    *norm("attn_norm", "attention_norm"),
    *fused("attn.qkv_proj", "mixer/query", "mixer/key", "mixer/value"),
    *norm("attn.q_norm", "mixer/query_norm"),
    *norm("attn.k_norm", "mixer/key_norm"),
    *linear("attn.out_proj", "mixer/out"),
    *norm("ffn_norm", "mlp_norm"),
    *fused("ffn.proj_1", "mlp/gate", "mlp/up"),
    *linear("ffn.proj_2", "mlp/down"),
)
OUTSIDE = (
    same("transformer.token_embeddings.weight", "embed/embedding"),
    *norm("transformer.norm", "final_norm"),
    *linear("lm_head", "head"),
)
FAMILIES = (
    Family(
        "openelm", "OpenELMForCausalLM", read_openelm, write_openelm,
        Names("transformer.layers", lambda layer: LAYER, OUTSIDE),
    ),
)  # fmt: skip
