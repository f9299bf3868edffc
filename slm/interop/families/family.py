"""What a family is: how its config.json reads, and the table of its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slm.config import ModelConfig
from slm.interop.layout import Link, linear, norm, same
from slm.models.mixers import Layer


@dataclass(frozen=True)
class Names:
    """The tensors of a family."""

    layers: str
    """What stands before the number of a layer, such as `model.layers`."""
    layer: Callable[[Layer], tuple[Link, ...]]
    """Links of one layer, relative to it on both sides. Links whose parameters the model does not have are left out."""
    outside: tuple[Link, ...]
    """Links of what is not in a layer."""
    ignored: str = r".*rotary_emb\.inv_freq"
    """Pattern of their tensors that hold nothing learned."""


@dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face."""

    model_type: str
    architecture: str
    """Name of the class in config.json's `architectures`; of a family with several, `write` says which."""
    read: Callable[[dict], ModelConfig]
    """config.json -> ModelConfig. Raises ConfigError for what is not supported."""
    write: Callable[[ModelConfig], dict]
    """Inverse of read, for a model that the family can express; others come out changed, which the caller finds."""
    names: Names
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that a model made here gets besides, where the family's own values would not fit it."""


LAYER = (
    *norm("input_layernorm", "attention_norm"),
    *linear("self_attn.q_proj", "mixer/query"),
    *linear("self_attn.k_proj", "mixer/key"),
    *linear("self_attn.v_proj", "mixer/value"),
    *linear("self_attn.o_proj", "mixer/out"),
    *norm("self_attn.q_norm", "mixer/query_norm"),
    *norm("self_attn.k_norm", "mixer/key_norm"),
    *norm("post_attention_layernorm", "mlp_norm"),
    *linear("mlp.gate_proj", "mlp/gate"),
    *linear("mlp.up_proj", "mlp/up"),
    *linear("mlp.down_proj", "mlp/down"),
)
OUTSIDE = (
    same("model.embed_tokens.weight", "embed/embedding"),
    *norm("model.norm", "final_norm"),
    *linear("lm_head", "head"),
)
DECODER = Names("model.layers", lambda layer: LAYER, OUTSIDE)
"""The tensors of Llama, which many families share."""
