"""ModernBERT: norms in front, rotary positions, windows on both sides, gated feed-forwards."""

from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.interop.families.family import Family, Names
from slm.interop.families.heads import read_head, write_head
from slm.interop.fields import (
    FULL,
    SLIDING,
    activation,
    gated,
    layer_types,
    need,
    plain,
    plain_name,
    read_rope,
    refuse,
    windows,
)
from slm.interop.layout import fused, linear, norm, same
from slm.models.layers import mlp_width
from slm.models.mixers import layer_pattern

# Part of model.bias to the fields that say so and what holds where they are missing.
BIASES = {"qkv": ("attention_bias", False), "out": ("attention_bias", False), "mlp": ("mlp_bias", False),
          "norm": ("norm_bias", False), "head": ("decoder_bias", True),
          "head_dense": ("classifier_bias", False)}  # fmt: skip


def read_modernbert(hf: dict) -> ModelConfig:
    refuse(hf, rope_scaling=None)
    depth, every = need(hf, "num_hidden_layers"), hf.get("global_attn_every_n_layers", 3)
    pattern = windows(hf.get("layer_types") or [SLIDING if i % every else FULL for i in range(depth)])
    head, mixer = read_head(hf, "ModernBert"), MixerConfig(qk_norm="none")
    if head["head"] != "embedding":
        head |= {"head_activation": plain(hf.get("classifier_activation", "gelu")), "head_norm": True}
    if head["head"] == "sequence":
        head["pooling"] = {"cls": "first"}.get(hf.get("classifier_pooling", "cls"), hf.get("classifier_pooling"))
    rope = {"theta": read_rope(hf, hf.get("global_rope_theta", 160_000.0), FULL).theta}
    for kind in (FULL, SLIDING):
        refuse((hf.get("rope_parameters") or {}).get(kind) or {}, rope_type="default")
    if "window" in pattern:
        # They count tokens on both sides together, without the query's own; we one side with it.
        mixer = MixerConfig(qk_norm="none", window=hf.get("local_attention", 128) // 2 + 1)
        rope["local_theta"] = read_rope(hf, hf.get("local_rope_theta", 10_000.0), SLIDING).theta
    return ModelConfig(
        vocab_size=need(hf, "vocab_size"), layers=depth, width=need(hf, "hidden_size"), causal=False,
        heads=need(hf, "num_attention_heads"), attention=pattern, mixer=mixer, rope=RopeConfig(**rope),
        mlp=gated(hf.get("hidden_activation", "gelu")), mlp_width=need(hf, "intermediate_size"), norm="layernorm",
        norm_eps=float(hf.get("norm_eps", 1e-5)), embedding_norm=True, first_norm=False,
        bias=tuple(part for part, (name, missing) in BIASES.items() if hf.get(name, missing)),
        tied=bool(hf.get("tie_word_embeddings", True)), **head,
    )  # fmt: skip


def write_modernbert(cfg: ModelConfig) -> dict:
    local = cfg.rope.theta if cfg.rope.local_theta is None else cfg.rope.local_theta
    thetas = {"global_rope_theta": (FULL, cfg.rope.theta), "local_rope_theta": (SLIDING, local)}
    pattern = layer_pattern(cfg)
    hf = write_head(cfg, "ModernBert") | {name: part in cfg.bias for part, (name, _) in BIASES.items()} | {
        "vocab_size": cfg.vocab_size, "num_hidden_layers": cfg.layers, "hidden_size": cfg.width,
        "num_attention_heads": cfg.heads, "intermediate_size": mlp_width(cfg), "hidden_activation": activation(cfg),
        "layer_types": layer_types(cfg), "norm_eps": cfg.norm_eps, "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tied, "classifier_pooling": "cls" if cfg.pooling == "first" else cfg.pooling,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.values()},
    }  # fmt: skip
    # As readers before transformers 5 want it.
    hf |= {name: theta for name, (_, theta) in thetas.items()}
    if pattern[0] == "softmax" and set(pattern[1:]) <= {"window"}:
        hf["global_attn_every_n_layers"] = len(pattern)
    if cfg.mixer.window:
        hf["local_attention"] = 2 * (cfg.mixer.window - 1)
    if cfg.head_activation != "none":
        hf["classifier_activation"] = plain_name(cfg.head_activation)
    return hf


LAYER = (
    *norm("attn_norm", "attention_norm"),
    *fused("attn.Wqkv", "mixer/query", "mixer/key", "mixer/value"),
    *linear("attn.Wo", "mixer/out"),
    *norm("mlp_norm", "mlp_norm"),
    *fused("mlp.Wi", "mlp/gate", "mlp/up"),
    *linear("mlp.Wo", "mlp/down"),
)
NAMES = Names(
    "model.layers",
    lambda layer: LAYER,
    (
        same("model.embeddings.tok_embeddings.weight", "embed/embedding"),
        *norm("model.embeddings.norm", "embed/norm"),
        *norm("model.final_norm", "final_norm"),
        *linear("head.dense", "head/transform"),
        *linear("head.dense", "head/pooler"),
        *norm("head.norm", "head/norm"),
        *linear("decoder", "head"),
        *linear("classifier", "head/classifier"),
    ),
    ignored=r"decoder\.weight|.*rotary_emb\..*",
)
# Ids of its own vocabulary, beyond that of a smaller one.
NO_IDS = {f"{name}_token_id": None for name in ("pad", "bos", "eos", "cls", "sep")}
FAMILIES = (Family("modernbert", "ModernBertForMaskedLM", read_modernbert, write_modernbert, NAMES, NO_IDS),)
