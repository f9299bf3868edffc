"""Linear attention: feature maps of queries and keys in place of the exponential of their product.

Parameters of one mixer: `query`, `key`, `value`, `gate`, `out` kernels, `query_conv` ... short convolutions,
`output_norm`; learned maps add `query_map` and `key_map`.
"""

import dataclasses
import difflib
import functools
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slm.attention import linear_attention_with_state
from slm.attention.features import (
    FEATURE_MAPS,
    SIGNED,
    cosformer,
    favor_keys,
    favor_queries,
    hedgehog,
    quadratic,
    random_features,
)
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.mixers.base import (
    Context,
    RecurrentMixer,
    Row,
    conv_cache,
    finish,
    key_size,
    live,
    normalise,
    project,
    recurrent_backend,
    rotate,
    short_conv,
    value_size,
)


class LinearMixer(RecurrentMixer):
    """out_t = phi(q_t)^T S_t / phi(q_t) . z_t with the map `feature_map` (Katharopoulos et al. 2020, equations 16-20).

    q and k pass a short convolution, a norm and rotary positions, if any, before the map. The papers of these
    mechanisms had absolute positions (model.position = learned) and neither convolution, norm nor gate. A
    `learned_state` is one of the numerator; the sum of weights begins at 0.
    """

    @nn.compact
    def __call__(self, x_BxTxD, context: Context, cache=None):
        cfg, m = self.cfg, self.cfg.mixer
        H, K, V = cfg.heads, self.projected_size(cfg), value_size(cfg)
        news = {}

        def heads(name, size):
            x_BxTxHxK = project(x_BxTxD, H, size, name, cfg, self.dtype)
            return short_conv(x_BxTxHxK, f"{name}_conv", cfg, self.dtype, context, cache, news)

        turned = self.rotary_size(cfg)
        q = rotate(normalise(heads("query", K), "query_norm", cfg, self.dtype), context, turned)
        k = rotate(normalise(heads("key", K), "key_norm", cfg, self.dtype), context, turned)
        v = heads("value", V)
        q, k = self.features(q, k, context)
        (k,) = live(context, cache, k)
        initial_state, reset_state = self._states((H, k.shape[-1], V), context, cache)
        out, news["state"] = linear_attention_with_state(
            q, k, v,
            feature_map="identity", normalize=normalized(cfg), initial_state=initial_state, reset_state=reset_state,
            segment_ids=context.segment_ids, chunk=m.chunk, implementation=recurrent_backend(cfg),
            form="chunked" if cache is None or x_BxTxD.shape[1] > 1 else "recurrent",
        )  # fmt: skip
        return finish(out, x_BxTxD, cfg, self.dtype), None if cache is None else news

    def features(self, q_BxTxHxK, k_BxTxHxK, context: Context):
        """phi(q), phi(k): (B, T, H, M) each."""
        phi, scale = feature_map(self.cfg), 1.0
        if self.cfg.mixer.feature_map == "taylor2":
            scale = q_BxTxHxK.shape[-1] ** -0.5  # the only one of them that is of one scale: it expands softmax's exp
        return phi(q_BxTxHxK * scale), phi(k_BxTxHxK)

    def _states(self, shape_HxMxV, context, cache):
        """`starting_states` with the column of the sums of weights, if there is one."""
        if not normalized(self.cfg):
            return self.starting_states(shape_HxMxV, context, cache)
        inner = None if cache is None else {"state": cache["state"][..., :-1]}
        initial, reset = self.starting_states(shape_HxMxV, context, inner)
        column = 0.0 if cache is None else cache["state"][..., -1:]
        return _with_column(initial, column), _with_column(reset, 0.0)

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        H, K, V = cfg.heads, cls.projected_size(cfg), value_size(cfg)
        state = jnp.zeros((batch, H, cls.features_size(cfg), V + normalized(cfg)), jnp.float32)
        return {"state": state} | conv_cache(cfg, batch, dtype, query_conv=H * K, key_conv=H * K, value_conv=H * V)

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Of the definition: one write and one read of the state (a chunked form computes more)."""
        return 4 * cfg.heads * cls.features_size(cfg) * (value_size(cfg) + normalized(cfg))

    @classmethod
    def projected_size(cls, cfg: ModelConfig) -> int:
        """K: what queries and keys are projected to."""
        return cfg.mixer.feature_dim or key_size(cfg)

    @classmethod
    def features_size(cls, cfg: ModelConfig) -> int:
        """M: what the map makes of K."""
        x = jax.ShapeDtypeStruct((1, 1, 1, cls.projected_size(cfg)), jnp.float32)
        return jax.eval_shape(feature_map(cfg), x).shape[-1]

    @classmethod
    def rotated_head(cls, cfg: ModelConfig) -> int:
        return cls.projected_size(cfg)


class PerformerMixer(LinearMixer):
    """FAVOR+: `feature_dim` M positive orthogonal random features of softmax's exponential (2009.14794, section 2).

    Features are constants drawn from `feature_seed` and the layer's number, the same for all heads: another seed draws
    them anew. The paper wants M of the order of K ln K, and takes 256 where K = 64.
    """

    def features(self, q_BxTxHxK, k_BxTxHxK, context: Context):
        cfg, K = self.cfg, q_BxTxHxK.shape[-1]
        directions = layers_features(cfg.mixer.feature_seed, cfg.layers, K, cfg.mixer.feature_dim)
        projection = jnp.asarray(directions)[context.layer]
        return favor_queries(q_BxTxHxK * K**-0.25, projection), favor_keys(k_BxTxHxK * K**-0.25, projection)

    @classmethod
    def projected_size(cls, cfg: ModelConfig) -> int:
        return key_size(cfg)

    @classmethod
    def features_size(cls, cfg: ModelConfig) -> int:
        return cfg.mixer.feature_dim

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Also the products of queries and keys with the directions."""
        return super().flops_per_token(cfg, length) + 4 * cfg.heads * cfg.mixer.feature_dim * key_size(cfg)


class CosformerMixer(LinearMixer):
    """ReLU features with weights cos(pi/2 (i - j)/horizon), positions counted in the document (2202.08791).

    `horizon` is fixed, in training and decoding alike, and best the longest sequence of both (the paper's choice): far
    beyond it this is `relu_linear`. ConfigError for longer sequences, since weights would turn negative.
    """

    def features(self, q_BxTxHxK, k_BxTxHxK, context: Context):
        within_horizon(self.cfg, q_BxTxHxK.shape[1])
        at = context.positions, self.cfg.mixer.horizon
        return cosformer(q_BxTxHxK, *at), cosformer(k_BxTxHxK, *at)

    @classmethod
    def init_cache(cls, cfg: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        within_horizon(cfg, length)
        return super().init_cache(cfg, batch, length, dtype)

    @classmethod
    def features_size(cls, cfg: ModelConfig) -> int:
        return 2 * key_size(cfg)


class HedgehogMixer(LinearMixer):
    """Features [softmax(x W), softmax(-x W)] with W learned for each head, of queries and of keys (2402.04347).

    W begins as the identity. Here it is trained with the rest; the paper first fits it to a given softmax model.
    """

    def features(self, q_BxTxHxK, k_BxTxHxK, context: Context):
        return HeadMap(name="query_map")(q_BxTxHxK), HeadMap(name="key_map")(k_BxTxHxK)

    @classmethod
    def features_size(cls, cfg: ModelConfig) -> int:
        return 2 * key_size(cfg)

    @classmethod
    def flops_per_token(cls, cfg: ModelConfig, length: int) -> float:
        """Also the learned maps."""
        return super().flops_per_token(cfg, length) + 4 * cfg.heads * key_size(cfg) ** 2


class HeadMap(nn.Module):
    """The learned matrix of `hedgehog`: (B, T, H, K) -> (B, T, H, 2 K)."""

    @nn.compact
    def __call__(self, x_BxTxHxK):
        H, K = x_BxTxHxK.shape[2:]
        identity = lambda key, shape: jnp.broadcast_to(jnp.eye(K), shape)  # noqa: E731
        return hedgehog(x_BxTxHxK, self.param("map", identity, (H, K, K)))


class RebasedMixer(LinearMixer):
    """(q' . k')^2 with learned q' = scale norm(q) + bias, and k' likewise (2402.10644). As in the authors' code, a
    LayerNorm over all heads, one for queries and one for keys; fla's is one for both, over each head."""

    def features(self, q_BxTxHxK, k_BxTxHxK, context: Context):
        q = self._affine(q_BxTxHxK, "query_map") * q_BxTxHxK.shape[-1] ** -0.5
        return quadratic(q), quadratic(self._affine(k_BxTxHxK, "key_map"))

    def _affine(self, x_BxTxHxK, name):
        norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)
        x = norm(einops.rearrange(x_BxTxHxK, "B T H K -> B T (H K)"))
        return einops.rearrange(x, "B T (H K) -> B T H K", H=x_BxTxHxK.shape[2])

    @classmethod
    def features_size(cls, cfg: ModelConfig) -> int:
        K = cls.projected_size(cfg)
        return K * (K + 1) // 2


def normalized(cfg: ModelConfig) -> bool:
    """cfg.mixer.normalize; FAVOR+ has no such switch, since its factor per query must cancel."""
    return cfg.mixer.normalize is not False


def feature_map(cfg: ModelConfig):
    """The function that cfg.mixer.feature_map names. Raises ConfigError for no such map, or one that cannot serve."""
    name = cfg.mixer.feature_map
    if name not in FEATURE_MAPS:
        near = difflib.get_close_matches(name, FEATURE_MAPS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(FEATURE_MAPS)}"
        raise ConfigError(f"model.mixer.feature_map: no map {name!r}: {hint}")
    if name in SIGNED and normalized(cfg):
        raise ConfigError(
            f"model.mixer.feature_map = {name} has weights of both signs, whose sum cannot normalise: set "
            "model.mixer.normalize = false (and model.mixer.output_norm = head, as DeltaNet and RetNet have it)"
        )
    return FEATURE_MAPS[name]


def within_horizon(cfg: ModelConfig, length: int) -> None:
    if length > cfg.mixer.horizon:
        raise ConfigError(
            f"{length} tokens exceed model.mixer.horizon = {cfg.mixer.horizon}, beyond which cosFormer's weights turn "
            "negative: set it to the longest sequence that the model will see"
        )


@functools.cache
def layers_features(seed: int, layers: int, K: int, M: int) -> np.ndarray:
    """(layers, M, K): the random directions of every layer, made once, outside of the compiled model."""
    with jax.ensure_compile_time_eval():
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(layers))
        return np.asarray(jax.jit(jax.vmap(lambda key: random_features(key, K, M)))(keys))


def _with_column(state, column):
    """(..., M, V) and its column of sums of weights; None stays None."""
    if state is None:
        return None
    return jnp.concatenate([state, jnp.broadcast_to(column, (*state.shape[:-1], 1))], -1)


LINEAR = MixerConfig(
    qk_norm="none",
    rope_fraction=0.0,
    gate="none",
    gate_rank=0,
    gate_first=False,
    output_norm="none",
    conv=0,
    learned_state=False,
    expand_k=1.0,
    expand_v=1.0,
    feature_map="elu1",
    normalize=True,
    chunk=64,
    implementation="auto",
)
MAPPED = dataclasses.replace(LINEAR, feature_map=None)  # the map is the mechanism
PROJECTED = dataclasses.replace(LINEAR, expand_k=None, feature_dim=16)  # K is chosen by itself
ROWS = {
    # Katharopoulos et al. 2020 (2006.16236)
    "linear": Row(LinearMixer, LINEAR),
    "relu_linear": Row(LinearMixer, dataclasses.replace(LINEAR, feature_map="relu")),
    # Choromanski et al. 2021 (2009.14794)
    "performer": Row(PerformerMixer, dataclasses.replace(MAPPED, normalize=None, feature_dim=256, feature_seed=0)),
    # Qin et al. 2022 (2202.08791)
    "cosformer": Row(CosformerMixer, dataclasses.replace(MAPPED, horizon=4096)),
    # Zhang et al. 2024 (2402.04347)
    "hedgehog": Row(HedgehogMixer, MAPPED),
    # Arora et al. 2024 (2402.18668); the paper alternates it with windows and gated convolutions (`base_conv`).
    "based": Row(LinearMixer, dataclasses.replace(PROJECTED, feature_map="taylor2")),
    # Aksenov et al. 2024 (2402.10644)
    "rebased": Row(RebasedMixer, dataclasses.replace(PROJECTED, feature_map=None, qk_norm=None)),
}
