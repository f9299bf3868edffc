"""MobileBERT: a narrow stream inside each layer, several feed-forwards, and scales in place of norms."""

from slm.config import ModelConfig
from slm.interop.families.bert import embeddings, read_bert, write_bert
from slm.interop.families.family import Family, Names
from slm.interop.fields import need, refuse
from slm.interop.layout import linear, norm, same

SERVED = {"trigram_input": True, "use_bottleneck": True, "use_bottleneck_attention": False,
          "key_query_shared_bottleneck": True, "normalization_type": "no_norm"}  # fmt: skip
"""Settings of google/mobilebert-uncased; no other is published."""


def read_mobilebert(hf: dict) -> ModelConfig:
    refuse(hf, classifier_activation=True, **SERVED)
    inner, heads = hf.get("intra_bottleneck_size", 128), need(hf, "num_attention_heads")
    return read_bert(
        hf, "MobileBert", "relu", embedding_width=hf.get("embedding_size", 128), trigrams=True, wide_readout=True,
        bottleneck=inner, head_dim=inner // heads, feedforwards=hf.get("num_feedforward_networks", 4), norm="affine",
    )  # fmt: skip


def write_mobilebert(cfg: ModelConfig) -> dict:
    return write_bert(cfg, "MobileBert") | SERVED | {
        "embedding_size": cfg.embedding_width, "intra_bottleneck_size": cfg.bottleneck,
        "num_feedforward_networks": cfg.feedforwards, "classifier_activation": True,
    }  # fmt: skip


def feedforward(theirs: str, number: int) -> tuple:
    return (
        *linear(f"{theirs}intermediate.dense", f"mlp{number}/up"),
        *linear(f"{theirs}output.dense", f"mlp{number}/down"),
        *norm(f"{theirs}output.LayerNorm", f"mlp{number}_norm"),
    )


def layer_links(layer) -> tuple:
    last = layer.cfg.feedforwards - 1
    return (
        *linear("bottleneck.input.dense", "narrow"),
        *norm("bottleneck.input.LayerNorm", "narrow_norm"),
        *linear("bottleneck.attention.dense", "narrow_query"),
        *norm("bottleneck.attention.LayerNorm", "narrow_query_norm"),
        *linear("attention.self.query", "mixer/query"),
        *linear("attention.self.key", "mixer/key"),
        *linear("attention.self.value", "mixer/value"),
        *linear("attention.output.dense", "mixer/out"),
        *norm("attention.output.LayerNorm", "attention_norm"),
        *(link for i in range(last) for link in feedforward(f"ffn.{i}.", i)),
        *feedforward("", last),
        *linear("output.bottleneck.dense", "widen"),
        *norm("output.bottleneck.LayerNorm", "widen_norm"),
    )


NAMES = Names(
    "mobilebert.encoder.layer",
    layer_links,
    (
        *embeddings("mobilebert"),
        *linear("mobilebert.embeddings.embedding_transformation", "embed/projection"),
        *linear("mobilebert.pooler.dense", "head/pooler"),
        *linear("cls.predictions.transform.dense", "head/transform"),
        *norm("cls.predictions.transform.LayerNorm", "head/norm"),
        same("cls.predictions.dense.weight", "head/rest/kernel"),
        same("cls.predictions.bias", "head/bias"),
        *linear("classifier", "head/classifier"),
    ),
    ignored=r"(mobilebert\.)?(pooler\..*|embeddings\.position_ids)|cls\.(seq_relationship|predictions\.decoder)\..*",
)
FAMILIES = (Family("mobilebert", "MobileBertForMaskedLM", read_mobilebert, write_mobilebert, NAMES),)
