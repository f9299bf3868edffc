"""Decoders and encoders: a function of (parameters, tokens), with layers stacked and scanned.

Parameters: {"embed": {"embedding" (V, D), ...}, "blocks": {"0": ..., "1": ...}[, "final_norm"][, "head"]}.
`blocks/i` holds layer i of the pattern, stacked over the repeats of the pattern on a leading axis (of length 1 where
the repeats share their parameters); layers that do not fill a whole period stand in `tail/i`, and a first layer unlike
the others in `first/0`, stacked with length 1. Scanning, unrolling and remat read the same tree.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from slm.attention.forget import document_starts
from slm.config import ModelConfig
from slm.errors import ConfigError
from slm.models.blocks import block
from slm.models.embedding import embed, init_embedding
from slm.models.heads import OVER_TOKENS, answer, check_head, has_bias, has_kernel, has_rest, init_head, transform
from slm.models.layers import norm
from slm.models.mixers import MIXERS, Context, Layer, Row, check_mechanisms, layer_pattern, layers
from slm.models.quantized import as_array, is_quantized
from slm.models.quantized_products import quantized_product, quantized_similarity
from slm.models.rope import rope_tables
from slm.models.watch import stream, watch

_policies = jax.checkpoint_policies
REMAT = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("attention")
    ),
    "full": _policies.nothing_saveable,
}
"""Name in `model.remat` to what the forward pass keeps for the backward pass."""
GROUPS = ("first", "blocks", "tail")
"""Names of the groups of stacked layers in the parameter tree, in order of depth."""


@dataclass(frozen=True)
class Transformer:
    """A decoder, or an encoder where `cfg.causal` is False.

    Raises ConfigError where `cfg.attention` names no mixer, or settings contradict each other.
    """

    cfg: ModelConfig
    """vocab_size must be set, and max_length too if positions are learned."""
    dtype: Any = jnp.float32
    """Compute dtype; parameters are created in float32 and used in whatever dtype they are given."""
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x
    """Applied to the residual stream (B, T, D) before every layer: the place for a sharding constraint."""
    rows: tuple[Row, ...] = field(init=False, repr=False)
    """What the names of cfg.attention stand for. A notebook may give a name another class: then this is another model,
    and no program that was compiled for the first is taken for it."""

    def __post_init__(self):
        check_mechanisms(self.cfg)
        object.__setattr__(self, "rows", tuple(MIXERS[name] for name in layer_pattern(self.cfg)))
        check_head(self.cfg)
        if not self.cfg.vocab_size:
            raise ConfigError("model.vocab_size = 0: set it, or give a tokenizer whose size it can take")
        if self.cfg.position == "learned" and not self.cfg.max_length:
            raise ConfigError("model.max_length must be set for model.position = learned")

    @property
    def groups(self) -> dict[str, tuple[tuple[Layer, ...], int]]:
        """Group name to (pattern of layers, repeats), in order of depth. Where layers differ in size, the pattern is
        as long as the model is deep."""
        every, groups = layers(self.cfg), {}
        if not self.cfg.first_norm and len(every) > 1:
            # Apart, so that the others, which have that norm, can be stacked.
            groups["first"], every = (tuple(every[:1]), 1), every[1:]
        period = min(len(layer_pattern(self.cfg)), len(every))
        if any(layer != every[i % period] for i, layer in enumerate(every)):
            period = len(every)
        pattern = tuple(every[:period])
        repeats, rest = divmod(len(every), period)
        groups["blocks"] = (pattern, repeats)
        return groups | ({"tail": (pattern[:rest], 1)} if rest else {})

    def stored(self, repeats: int) -> int:
        """Sets of parameters that `repeats` of a pattern have."""
        return 1 if self.cfg.shared_layers else repeats

    @functools.partial(jax.jit, static_argnums=0)  # op by op it would compile a hundred programs instead of one
    def init(self, key: jax.Array) -> dict:
        """Random float32 parameters from one key."""
        # Backends do not change parameters, and some cannot run the float32 that parameters are made in.
        cfg = any_backend(self.cfg)
        x_BxTxD = jnp.zeros((1, 1, cfg.width))
        context = self.context(jnp.zeros((1, 1), jnp.int32), None)
        keys, depth = iter(jax.random.split(key, cfg.layers + 3)), 0
        one = next(keys)
        params = {"embed": init_embedding(cfg, one, next(keys) if cfg.position == "learned" else one)}
        for group, (pattern, repeats) in self.groups.items():
            params[group] = {}
            for i, layer in enumerate(pattern):
                module = block(any_backend(layer.cfg), layer.mechanism, jnp.float32)
                depths = depth + i + len(pattern) * jnp.arange(self.stored(repeats))

                def one(key, depth, module=module):
                    return module.init(key, x_BxTxD, context.replace(layer=depth))["params"]

                params[group][str(i)] = jax.vmap(one)(jax.random.split(next(keys), len(depths)), depths)
            depth += len(pattern) * repeats
        if cfg.residual != "post":
            params["final_norm"] = self._norm().init(key, x_BxTxD)["params"]
        head = init_head(cfg, next(keys))
        return params | ({"head": head} if head else {})

    def hidden(self, params, tokens, *, segment_ids=None, positions=None, token_types=None, cache=None):
        """Final hidden states.

        Args:
          params: the tree of `init`, in any float dtype.
          tokens: (B, T) int32.
          segment_ids: (B, T) int32: tokens see only their own segment; None: one segment.
          positions: (B, T) int32; None: from 0 at the first token of each segment. With a cache, -1 marks padding.
          token_types: (B, T) int32 below cfg.token_types; None: 0.
          cache: None, or the tree of `init_cache`, which is read and extended.

        Returns:
          (hidden (B, T, D) after the last norm, new cache or None).
        """
        x, cache, _ = self._forward(params, tokens, segment_ids, positions, token_types, cache)
        return x, cache

    def hidden_states(self, params, tokens, *, segment_ids=None, positions=None, token_types=None):
        """What every layer says, (layers + 1, B, T, D): the embedded tokens, then the residual stream after each layer,
        of which the last is after the last norm, as `hidden` returns it. Arguments as there."""
        where = {"segment_ids": segment_ids, "positions": positions}
        x, layers = self.watched(params, tokens, stream, token_types=token_types, **where)
        return jnp.stack([layers[0][""][0], *(seen[""][1] for seen in layers[:-1]), x])

    def watched(self, params, tokens, take, *, segment_ids=None, positions=None, token_types=None):
        """The forward pass, and what `take` saw in it (slm.models.watch), without changing it.

        Returns:
          (hidden (B, T, D) after the last norm, a dict for each layer in order of depth).
        """
        x, _, seen = self._forward(params, tokens, segment_ids, positions, token_types, None, take)
        return x, seen

    def _forward(self, params, tokens, segment_ids, positions, token_types, cache, take=None):
        """(final hidden states, new cache or None, what `take` saw in each layer)."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            if segment_ids is not None:
                positions -= document_starts(segment_ids)
        context = self.context(positions, segment_ids)
        x = embed(self.cfg, params["embed"], tokens, positions, token_types, self.dtype)
        new_cache, depth, seen = {}, 0, []
        for group, (pattern, repeats) in self.groups.items():
            group_cache = None if cache is None else cache[group]
            depths = depth + len(pattern) * jnp.arange(repeats)
            x, new_cache[group], stacked = self._run(pattern, params[group], x, context, depths, group_cache, take)
            depth += len(pattern) * repeats
            seen += [jax.tree.map(lambda a, r=r: a[r], one) for r in range(repeats) for one in stacked]
        x = self.final(params, self.constrain(x))
        return x, None if cache is None else new_cache, seen

    def final(self, params, x):
        """Hidden states from the residual stream after the last layer."""
        if self.cfg.residual == "post":
            return x
        return self._norm().apply({"params": params["final_norm"]}, x)

    def _run(self, pattern, params, x, context, depths, cache, take):
        """Layers of one group, by scan or by a loop over slices of the same stacked trees: (x, new cache or None, what
        `take` saw in each layer of the pattern, stacked over its repeats)."""

        def period(x, one):
            period_params, first, period_cache = one
            new_cache, seen = {}, []
            for i, layer in enumerate(pattern):
                module = block(layer.cfg, layer.mechanism, self.dtype)
                old = None if period_cache is None else period_cache[str(i)]
                rope = context.local_rope if layer.local else context.rope
                here = context.replace(layer=first + i, rope=rope, local_rope=None)
                with watch(take) as one:
                    x, new_cache[str(i)] = module.apply({"params": period_params[str(i)]}, self.constrain(x), here, old)
                seen.append(one)
            return x, (None if period_cache is None else new_cache, seen)

        if self.cfg.remat != "none" and cache is None:
            # CSE cannot undo the recomputation across iterations of a scan, so its guard is only needed unrolled.
            period = jax.checkpoint(period, policy=REMAT[self.cfg.remat], prevent_cse=not self.cfg.scan)
        if self.cfg.shared_layers:
            only = jax.tree.map(lambda a: a[0], params)
            body, stacked = lambda x, one: period(x, (only, *one)), (depths, cache)
        else:
            body, stacked = period, (params, depths, cache)
        if self.cfg.scan:
            x, news = jax.lax.scan(body, x, stacked)
            return x, *news
        news = []
        for one in _unstack(stacked):
            x, new = body(x, one)
            news.append(new)
        return x, *jax.tree.map(lambda *a: jnp.stack(a), *news)

    def unembedding(self, params) -> jax.Array:
        """(D, V) matrix from hidden states, or (E, V) from those that a masked LM has transformed, to logits."""
        if has_kernel(self.cfg):
            return as_array(params["head"]["kernel"])
        columns = as_array(params["embed"]["embedding"]).T
        return jnp.concatenate([columns, params["head"]["rest"]["kernel"]]) if has_rest(self.cfg) else columns

    def readout(self, params, hidden) -> tuple[jax.Array, jax.Array]:
        """(hidden (..., D'), matrix (D', V)) whose product is the logits before the soft cap, for losses that never
        hold all of them. D' is D, or D + 1 with a bias."""
        kernel, hidden = self.unembedding(params), self._transformed(params, hidden)
        if self.cfg.logit_divisor != 1:
            hidden = hidden / self.cfg.logit_divisor
        if has_bias(self.cfg):
            hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], -1)
            kernel = jnp.concatenate([kernel, params["head"]["bias"].astype(kernel.dtype)[None]], 0)
        return hidden, kernel

    def logits(self, params, hidden) -> jax.Array:
        """float32 (..., V) from hidden (..., D), soft-capped if the config says so."""
        hidden = self._transformed(params, hidden)
        own = has_kernel(self.cfg)
        matrix = params["head"]["kernel"] if own else params["embed"]["embedding"]
        if is_quantized(matrix):
            rows = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)
            logits = (quantized_product if own else quantized_similarity)(rows, matrix)
            return self._finished(params, logits.reshape(*hidden.shape[:-1], -1))
        kernel = self.unembedding(params).astype(hidden.dtype)
        if self.cfg.tied and hidden.ndim == 2:
            # A decode step has few rows. XLA:CPU computes embedding x hidden at memory speed and hidden x embedding^T
            # 2 to 20 times slower; the barrier keeps it from turning the one into the other.
            logits = jnp.dot(kernel.T, hidden.T, preferred_element_type=jnp.float32)
            logits = jax.lax.optimization_barrier(logits).T
        else:
            logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        return self._finished(params, logits)

    def _finished(self, params, logits):
        """Divided, shifted and capped as the config says."""
        if self.cfg.logit_divisor != 1:
            logits /= self.cfg.logit_divisor
        if has_bias(self.cfg):
            logits += params["head"]["bias"].astype(jnp.float32)
        return softcap(logits, self.cfg.logit_softcap)

    def _transformed(self, params, hidden):
        return transform(self.cfg, params.get("head", {}), hidden, self.dtype)

    def answer(self, params, hidden, mask=None) -> jax.Array:
        """What cfg.head says of hidden (B, T, D) with padding where mask (B, T) is 0, float32: (B, T, V), (B, labels),
        (B, T, labels) or (B, D)."""
        if self.cfg.head in OVER_TOKENS:
            return self.logits(params, hidden)
        return answer(self.cfg, params.get("head", {}), hidden, mask, self.dtype)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> dict:
        """Empty decode cache for `batch` sequences of at most `length` tokens.

        Args:
          batch, length: sizes.
          dtype: of cached keys, values and inputs of convolutions; None: the compute dtype. int8 holds for keys and
            values alone, with one float32 scale for each token and head.

        Raises ConfigError for an encoder, or for int8 with a mechanism whose keys cannot be so.
        """
        if not self.cfg.causal:
            raise ConfigError(
                "model.causal = false: an encoder has no decode cache and cannot generate; use slm.logits"
            )
        cache = {}
        for group, (pattern, repeats) in self.groups.items():
            one = {
                str(i): layer.mixer.init_cache(layer.configured, batch, length, self._cache_dtype(layer, dtype))
                for i, layer in enumerate(pattern)
            }
            cache[group] = jax.tree.map(lambda a, n=repeats: jnp.broadcast_to(a, (n, *a.shape)), one)
        return cache

    @property
    def rewinds(self) -> bool:
        """Whether decoding may go on from an earlier position with a cache that has seen more (Mixer.rewinds)."""
        return all(layer.mixer.rewinds(layer.configured) for layer in layers(self.cfg))

    def _cache_dtype(self, layer: Layer, dtype: Any) -> Any:
        try:
            dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        except TypeError:
            raise ConfigError(f"cache_dtype = {dtype!r}: no such dtype; use float32, bfloat16 or int8") from None
        if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
            raise ConfigError(f"cache_dtype = {dtype.name}: keys and values need float32, bfloat16 or int8")
        if dtype != jnp.int8 or layer.mixer.int8_cache:
            return dtype
        if layer.mixer.int8_cache is None:
            return self.dtype
        raise ConfigError(f"cache_dtype = int8: layers of {layer.mechanism} cannot keep such keys; use bfloat16")

    def _norm(self):
        return norm("final_norm", self.cfg, self.dtype)

    def context(self, positions, segment_ids) -> Context:
        """What layers are told about tokens at positions (B, T) of segments (B, T) or None."""
        cfg = self.cfg
        if cfg.position != "rope":
            return Context(positions, segment_ids, {})
        rope, local = {}, {}
        for layer in layers(cfg):
            tables, size = local if layer.local else rope, layer.mixer.rotary_size(layer.configured)
            if size and size not in tables:
                tables[size] = rope_tables(positions, size, cfg.rope, layer.local)
        return Context(positions, segment_ids, rope, local_rope=local)


def any_backend(cfg: ModelConfig) -> ModelConfig:
    """`cfg` with every mechanism's backend chosen anew, for a dtype or a machine that it was not written for."""
    return dataclasses.replace(cfg, mixer=dataclasses.replace(cfg.mixer, implementation=None))


def _unstack(tree):
    """The slices of stacked trees. By split, whose gradient is one concatenation, not a sum of padded arrays."""
    n = len(jax.tree.leaves(tree)[0])
    leaves, structure = jax.tree.flatten(tree)
    columns = [[part[0] for part in jax.lax.split(leaf, [1] * n)] for leaf in leaves]
    return [jax.tree.unflatten(structure, row) for row in zip(*columns, strict=True)]


@functools.partial(jax.jit, static_argnums=1)
def softcap(logits, cap: float | None):
    """cap * tanh(logits / cap); the identity for None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
