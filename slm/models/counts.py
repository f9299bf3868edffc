"""What a model costs: parameters, FLOPs, cache bytes. Read off abstract trees, so they cannot drift from the model."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slm.attention import state_bytes
from slm.config import ModelConfig
from slm.errors import ConfigError
from slm.models.heads import OVER_TOKENS
from slm.models.layers import mlp_width
from slm.models.transformer import GROUPS, Transformer


def abstract_parameters(cfg: ModelConfig) -> dict:
    """The parameter tree as shapes and dtypes; nothing is allocated."""
    return jax.eval_shape(Transformer(cfg).init, jax.random.key(0))


def parameter_counts(cfg: ModelConfig) -> dict[str, int]:
    """Numbers of parameters: `embedding` (table and positions), `blocks`, `final_norm`, `head`, and their `total`."""
    sizes = {name: sum(a.size for a in jax.tree.leaves(part)) for name, part in abstract_parameters(cfg).items()}
    counts = {
        "embedding": sizes["embed"],
        "blocks": sum(sizes.get(group, 0) for group in GROUPS),
        "final_norm": sizes.get("final_norm", 0),
        "head": sizes.get("head", 0),
    }
    return counts | {"total": sum(counts.values())}


def flops_per_token(cfg: ModelConfig, length: int) -> dict[str, float]:
    """FLOPs per token at sequence length `length`: `forward`, and `train` = three times that (recomputation by remat
    is not counted).

    Two for each weight of each matrix product, the output projection included and the embedding lookup not, plus what
    the mixers state for themselves; causal attention counts only the keys that a query sees, half of the square. What
    a head computes once for a sequence is not counted. This is the count that MFU is computed from.
    """
    params, transformer = abstract_parameters(cfg), Transformer(cfg)
    matrices = mixing = 0
    for group, (pattern, repeats) in transformer.groups.items():
        # Shared layers are stored once and computed often.
        matrices += _matrices(params[group]) * repeats // transformer.stored(repeats)
        mixing += sum(repeats * layer.mixer.flops_per_token(layer.configured, length) for layer in pattern)
    matrices += _matrices(params["embed"])
    if cfg.head in OVER_TOKENS:
        matrices += _matrices(params.get("head", {}).get("transform", {}))
        matrices += math.prod(jax.eval_shape(transformer.unembedding, params).shape)
    elif cfg.head == "token":
        matrices += _matrices(params["head"])
    forward = 2 * matrices + mixing
    return {"forward": forward, "train": 3 * forward}


def _matrices(params) -> int:
    """Numbers in matrices called `kernel`."""
    return sum(leaf.size for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel")


def cache_bytes(cfg: ModelConfig, batch: int, length: int, dtype: Any = jnp.bfloat16) -> int:
    """Bytes that decoding `batch` sequences of at most `length` tokens carries between tokens, in the stored dtypes; 0
    for an encoder."""
    if not cfg.causal:
        return 0
    cache = jax.eval_shape(lambda: Transformer(cfg).init_cache(batch, length, dtype))
    return state_bytes(cache)


def with_parameters(cfg: ModelConfig, total: int, tolerance: float = 0.01, multiple: int = 8) -> ModelConfig:
    """`cfg` with the mlp_width, a multiple of `multiple`, that brings its parameters nearest to `total`.

    It makes a comparison of mechanisms one at equal parameters. Raises ConfigError if the nearest is further off than
    `tolerance` (a share of `total`), as for a mixer that alone is larger than the model wanted.
    """

    def size(width: int) -> int:
        return parameter_counts(dataclasses.replace(cfg, mlp_width=width))["total"]

    if cfg.mlp == "none":
        raise ConfigError("model.mlp = none has no width that could be chosen to match a number of parameters")
    slope = size(2 * multiple) - size(multiple)
    width = max(1, round((total - size(multiple)) / slope) + 1) * multiple
    if abs(size(width) - total) > tolerance * total:
        raise ConfigError(
            f"no mlp_width gives a model of {' '.join(cfg.attention)} {total:,} parameters: the nearest is {width} "
            f"with {size(width):,} (it is now {mlp_width(cfg)}); change model.width or model.layers"
        )
    return dataclasses.replace(cfg, mlp_width=width)


def product_flops(function: Callable, *arguments: Any) -> int:
    """FLOPs of all matrix products of a traced function: two a multiplication, loops of known length multiplied.

    `arguments` may be abstract arrays. Products that a transformation adds (a backward pass, recomputation) count if
    `function` contains it. (XLA's own cost analysis counts the body of a loop once.)
    """
    return _product_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _product_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        inner = [_product_flops(sub) for sub in _inner_jaxprs(equation)]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += equation.params.get("length", 1) * sum(inner) if equation.primitive.name == "scan" else sum(inner)
    return total


def _inner_jaxprs(equation):
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
