"""BERT and TinyBERT, DistilBERT, ALBERT: encoders that norm after each residual, with learned positions."""

from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.interop.families.family import Family, Names
from slm.interop.families.heads import read_head, write_head
from slm.interop.fields import activation, need, plain, refuse
from slm.interop.layout import linear, norm, same
from slm.models.layers import mlp_width

BIASES = ("qkv", "out", "mlp", "norm", "head", "head_dense")


def encoder(hf: dict, head: dict, act: str, **fields) -> ModelConfig:
    """What all of them have alike; `head` as read_head says, `act` their name of the activation."""
    if head["head"] == "masked_lm":
        head = head | {"head_activation": plain(act), "head_norm": True}
    wanted = {
        "vocab_size": need(hf, "vocab_size"), "mlp": plain(act), "position": "learned", "causal": False,
        "max_length": need(hf, "max_position_embeddings"), "norm": "layernorm", "norm_eps": 1e-12, "residual": "post",
        "embedding_norm": True, "bias": BIASES, "mixer": MixerConfig(qk_norm="none"),
        "tied": bool(hf.get("tie_word_embeddings", True)),
    }  # fmt: skip
    return ModelConfig(**wanted | head | fields)


def read_bert(hf: dict, prefix: str = "Bert", act: str = "gelu", **fields) -> ModelConfig:
    if not hf.get("type_vocab_size", 2):
        raise ConfigError("config.json: type_vocab_size = 0: this family has token types")
    # An untied head would have two biases, of which one does nothing; no published model has that.
    refuse(hf, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False,
           tie_word_embeddings=True)  # fmt: skip
    return encoder(
        hf, read_head(hf, prefix, "tanh"), hf.get("hidden_act", act), layers=need(hf, "num_hidden_layers"),
        width=need(hf, "hidden_size"), heads=need(hf, "num_attention_heads"), mlp_width=need(hf, "intermediate_size"),
        token_types=hf.get("type_vocab_size", 2), norm_eps=float(hf.get("layer_norm_eps", 1e-12)), **fields,
    )  # fmt: skip


def write_bert(cfg: ModelConfig, prefix: str = "Bert") -> dict:
    return write_head(cfg, prefix) | {
        "vocab_size": cfg.vocab_size, "num_hidden_layers": cfg.layers, "hidden_size": cfg.width,
        "num_attention_heads": cfg.heads, "intermediate_size": mlp_width(cfg), "hidden_act": activation(cfg),
        "max_position_embeddings": cfg.max_length, "type_vocab_size": cfg.token_types, "layer_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std, "tie_word_embeddings": cfg.tied,
    }  # fmt: skip


LAYER = (
    *linear("attention.self.query", "mixer/query"),
    *linear("attention.self.key", "mixer/key"),
    *linear("attention.self.value", "mixer/value"),
    *linear("attention.output.dense", "mixer/out"),
    *norm("attention.output.LayerNorm", "attention_norm"),
    *linear("intermediate.dense", "mlp/up"),
    *linear("output.dense", "mlp/down"),
    *norm("output.LayerNorm", "mlp_norm"),
)


def embeddings(base: str) -> tuple:
    """Links of the embeddings of a model whose tensors begin with `base`."""
    return (
        same(f"{base}.embeddings.word_embeddings.weight", "embed/embedding"),
        same(f"{base}.embeddings.position_embeddings.weight", "embed/position"),
        same(f"{base}.embeddings.token_type_embeddings.weight", "embed/token_type"),
        *norm(f"{base}.embeddings.LayerNorm", "embed/norm"),
    )


BERT = Names(
    "bert.encoder.layer",
    lambda layer: LAYER,
    (
        *embeddings("bert"),
        *linear("bert.pooler.dense", "head/pooler"),
        *linear("cls.predictions.transform.dense", "head/transform"),
        *norm("cls.predictions.transform.LayerNorm", "head/norm"),
        same("cls.predictions.bias", "head/bias"),
        *linear("classifier", "head/classifier"),
    ),
    # What the second of BERT's tasks learned, repeated tensors, and a pooler that this head does not read.
    ignored=r"(bert\.)?(pooler\..*|embeddings\.position_ids)|cls\.(seq_relationship\..*|predictions\.decoder\..*)",
)


def read_distilbert(hf: dict) -> ModelConfig:
    head = read_head(hf, "DistilBert")
    if head["head"] == "sequence":
        head["head_activation"] = "relu"
    return encoder(
        hf, head, hf.get("activation", "gelu"), layers=need(hf, "n_layers"), width=need(hf, "dim"),
        heads=need(hf, "n_heads"), mlp_width=need(hf, "hidden_dim"),
    )  # fmt: skip


def write_distilbert(cfg: ModelConfig) -> dict:
    return write_head(cfg, "DistilBert") | {
        "vocab_size": cfg.vocab_size, "n_layers": cfg.layers, "dim": cfg.width, "n_heads": cfg.heads,
        "hidden_dim": mlp_width(cfg), "activation": activation(cfg), "max_position_embeddings": cfg.max_length,
        "initializer_range": cfg.init_std, "tie_word_embeddings": cfg.tied,
    }  # fmt: skip


DISTILBERT_LAYER = (
    *linear("attention.q_lin", "mixer/query"),
    *linear("attention.k_lin", "mixer/key"),
    *linear("attention.v_lin", "mixer/value"),
    *linear("attention.out_lin", "mixer/out"),
    *norm("sa_layer_norm", "attention_norm"),
    *linear("ffn.lin1", "mlp/up"),
    *linear("ffn.lin2", "mlp/down"),
    *norm("output_layer_norm", "mlp_norm"),
)
DISTILBERT = Names(
    "distilbert.transformer.layer",
    lambda layer: DISTILBERT_LAYER,
    (
        *embeddings("distilbert"),
        *linear("vocab_transform", "head/transform"),
        *norm("vocab_layer_norm", "head/norm"),
        *linear("vocab_projector", "head"),
        *linear("pre_classifier", "head/pooler"),
        *linear("classifier", "head/classifier"),
    ),
    ignored=r"vocab_projector\.weight|(distilbert\.)?embeddings\.position_ids",
)


def read_albert(hf: dict) -> ModelConfig:
    refuse(hf, num_hidden_groups=1, inner_group_num=1)
    width = hf.get("embedding_size", 128)
    return read_bert(hf, "Albert", "gelu_new", embedding_width=width, shared_layers=True)


def write_albert(cfg: ModelConfig) -> dict:
    groups = {"num_hidden_groups": 1, "inner_group_num": 1}
    return write_bert(cfg, "Albert") | {"embedding_size": cfg.embedding_width} | groups


ALBERT_LAYER = (
    *linear("attention.query", "mixer/query"),
    *linear("attention.key", "mixer/key"),
    *linear("attention.value", "mixer/value"),
    *linear("attention.dense", "mixer/out"),
    *norm("attention.LayerNorm", "attention_norm"),
    *linear("ffn", "mlp/up"),
    *linear("ffn_output", "mlp/down"),
    *norm("full_layer_layer_norm", "mlp_norm"),
)
ALBERT = Names(
    "albert.encoder.albert_layer_groups.0.albert_layers",
    lambda layer: ALBERT_LAYER,
    (
        *embeddings("albert"),
        *linear("albert.encoder.embedding_hidden_mapping_in", "embed/projection"),
        *linear("albert.pooler", "head/pooler"),
        *linear("predictions.dense", "head/transform"),
        *norm("predictions.LayerNorm", "head/norm"),
        same("predictions.bias", "head/bias"),
        *linear("classifier", "head/classifier"),
    ),
    ignored=r"(albert\.)?(pooler\..*|embeddings\.position_ids)|sop_classifier\..*|predictions\.decoder\..*",
)
FAMILIES = (
    Family("bert", "BertForMaskedLM", read_bert, write_bert, BERT),
    Family("distilbert", "DistilBertForMaskedLM", read_distilbert, write_distilbert, DISTILBERT),
    Family("albert", "AlbertForMaskedLM", read_albert, write_albert, ALBERT),
)
