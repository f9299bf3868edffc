"""What a model costs: parameters, FLOPs, cache bytes. Read off abstract trees, so they cannot drift from the model."""

from typing import Any

import jax
import jax.numpy as jnp

from slm.attention import state_bytes
from slm.config import ModelConfig
from slm.models.mixers import MIXERS, configured
from slm.models.transformer import Transformer


def abstract_parameters(cfg: ModelConfig) -> dict:
    """The parameter tree as shapes and dtypes; nothing is allocated."""
    return jax.eval_shape(Transformer(cfg).init, jax.random.key(0))


def parameter_counts(cfg: ModelConfig) -> dict[str, int]:
    """Numbers of parameters: `embedding` (table and positions), `blocks`, `final_norm`, `head`, and their `total`."""
    sizes = {name: sum(a.size for a in jax.tree.leaves(part)) for name, part in abstract_parameters(cfg).items()}
    counts = {
        "embedding": sizes["embed"],
        "blocks": sizes["blocks"] + sizes.get("tail", 0),
        "final_norm": sizes["final_norm"],
        "head": sizes.get("head", 0),
    }
    return counts | {"total": sum(counts.values())}


def flops_per_token(cfg: ModelConfig, length: int) -> dict[str, float]:
    """FLOPs per token at sequence length `length`: `forward`, and `train` = three times that (recomputation by remat
    is not counted).

    Two for each weight of each matrix product, the output projection included and the embedding lookup not, plus what
    the mixers state for themselves; causal attention counts only the keys that a query sees, half of the square. This
    is the count that MFU is computed from.
    """
    params = abstract_parameters(cfg)
    matrices = 0
    for group in ("blocks", "tail"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params.get(group, {})):
            matrices += leaf.size if path[-1].key == "kernel" else 0
    mixing = sum(
        repeats * MIXERS[name].mixer.flops_per_token(configured(MIXERS[name], cfg), length)
        for pattern, repeats in Transformer(cfg).groups.values()
        for name in pattern
    )
    forward = 2 * matrices + 2 * cfg.width * cfg.vocab_size + mixing
    return {"forward": forward, "train": 3 * forward}


def cache_bytes(cfg: ModelConfig, batch: int, length: int, dtype: Any = jnp.bfloat16) -> int:
    """Bytes that decoding `batch` sequences of at most `length` tokens carries between tokens, in the stored dtypes."""
    cache = jax.eval_shape(lambda: Transformer(cfg).init_cache(batch, length, dtype))
    return state_bytes(cache)
