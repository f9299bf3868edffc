"""Other token mixers in a trained model: softmax attention replaced by a linear, windowed or hybrid mechanism.

The new layers take over what fits (projections, norms, the feed-forward), and learn the rest: first each mixer by
itself imitates the one that it replaces, on that one's inputs (attention transfer: Hedgehog, Zhang et al. 2024;
LoLCATs, Zhang et al. 2025), then the whole model what its teacher says (T2R, Kasai et al. 2021; MambaInLlama, Wang et
al. 2024).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.config import Experiment, MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.mixers import MIXERS, Layer, check_mechanisms, head_dim, layer_pattern, layers, mixer
from slm.models.paths import flat, nested
from slm.models.quantized import check_float_weights
from slm.models.transformer import Transformer
from slm.training import precision
from slm.training.objective import Objective


def convert(
    model: LanguageModel, attention: tuple[str, ...], switches: dict[str, Any] | None = None, seed: int = 0
) -> LanguageModel:
    """`model` with other mechanisms. It says less well what it said before, until it has been trained.

    Args:
      model: a decoder.
      attention: what model.attention is to be; layers whose mechanism stays are not changed.
      switches: fields of model.mixer, for the new layers.
      seed: of the parameters that the model does not have.

    Raises ConfigError for a pattern that the model cannot have, and for quantized weights.
    """
    check_float_weights(model.params)
    cfg = converted_config(model.config.model, attention, switches)
    params = converted_params(model.transformer, model.params, Transformer(cfg), seed)
    return dataclasses.replace(model, params=params, config=dataclasses.replace(model.config, model=cfg), origin=None)


def converted_config(
    cfg: ModelConfig, attention: tuple[str, ...], switches: dict[str, Any] | None = None
) -> ModelConfig:
    """`cfg` with other mechanisms: switches that none of them has are dropped. Raises ConfigError."""
    if not attention:
        raise ConfigError("convert.attention is empty: name mechanisms, such as `gla gla gla softmax`")
    if cfg.shared_layers or cfg.bottleneck:
        raise ConfigError(
            "convert: models whose layers share parameters, or have a bottleneck, cannot get other mixers"
        )
    new = dataclasses.replace(cfg, attention=tuple(attention), mixer=MixerConfig())
    check_mechanisms(new)
    rows = [MIXERS[name].defaults for name in layer_pattern(new)]
    kept = {
        field.name: value
        for field in dataclasses.fields(MixerConfig)
        if (value := getattr(cfg.mixer, field.name)) is not None
        and any(getattr(row, field.name) is not None for row in rows)
    }
    new = dataclasses.replace(new, mixer=MixerConfig(**kept | (switches or {})))
    check_mechanisms(new)
    return new


def converted_params(old: Transformer, params: Any, new: Transformer, seed: int = 0) -> Any:
    """Parameters for `new`, taken over from those of `old` where a name and a shape agree; keys and values that heads
    share are repeated for each where the new mechanism has as many as heads."""
    fresh = jax.tree.map(np.array, jax.jit(new.init)(jax.random.key(seed)))
    for group in ("embed", "final_norm", "head"):
        if group in params:
            fresh[group] = params[group]
    kinds = zip(layers(old.cfg), layers(new.cfg), layerwise.places(old), layerwise.places(new), strict=True)
    for was, becomes, here, there in kinds:
        before = flat(layerwise.layer_params(params, here))
        after = flat(layerwise.layer_params(fresh, there))
        taken = {
            name: _taken(before[name], leaf, was, becomes) if name in before else leaf for name, leaf in after.items()
        }
        fresh = layerwise.with_layer(fresh, there, nested(taken))
    return jax.tree.map(jnp.asarray, fresh)


def _taken(before, after, was: Layer, becomes: Layer):
    if before.shape == after.shape:
        return before
    heads, groups, K = was.cfg.heads, was.cfg.kv_heads or was.cfg.heads, head_dim(was.cfg)
    shared = before.shape[-1] == groups * K and after.shape[-1] == heads * K and before.shape[:-1] == after.shape[:-1]
    if shared and head_dim(becomes.cfg) == K:
        return np.repeat(np.asarray(before).reshape(*before.shape[:-1], groups, K), heads // groups, -2).reshape(
            after.shape
        )
    return after


def transfer_objective(cfg: Experiment, transformer: Transformer, teacher: Transformer, then: Objective) -> Objective:
    """For cfg.convert.transfer_steps steps: the squared error of each new mixer's output against that of the layer that
    it replaces, on the teacher's own inputs, over the mean square of that output; mean over the new layers. From then
    on: `then`.

    Its sums are those of `then`, which are only measured during the transfer, and `transfer`.
    Raises ConfigError unless the teacher has the same depth and width.
    """
    _check_teacher(transformer.cfg, teacher.cfg)
    documents, steps = cfg.data.packing == "documents", cfg.convert.transfer_steps

    def transfer(params, batch, theirs):
        view = precision.cast(params, transformer.dtype)
        where = {"positions": batch["positions"], "segment_ids": batch["segment_ids"] if documents else None}
        _, seen = teacher.watched(precision.cast(theirs, teacher.dtype), batch["tokens"], _around_mixer, **where)
        seen = jax.lax.stop_gradient([one["mixer"] for one in seen])
        context = transformer.context(**where)
        total, count, depth = 0.0, 0, 0
        for group, (pattern, repeats) in transformer.groups.items():
            for i, layer in enumerate(pattern):
                numbers = [depth + i + len(pattern) * r for r in range(repeats)]
                numbers = [n for n in numbers if layer != layers(teacher.cfg)[n]]
                if not numbers:
                    continue
                repeated = np.array([(n - depth - i) // len(pattern) for n in numbers])
                own = jax.tree.map(lambda a, r=repeated: a[r], view[group][str(i)]["mixer"])
                inputs, outputs = (jnp.stack(list(part)) for part in zip(*(seen[n] for n in numbers)))
                here = context.replace(rope=context.local_rope if layer.local else context.rope, local_rope=None)

                def one(total, x, layer=layer, here=here):
                    number, own, inputs, outputs = x
                    module = mixer(layer.mechanism, layer.cfg, transformer.dtype)
                    found, _ = module.apply({"params": own}, inputs, here.replace(layer=number), None)
                    return total + _error(found, outputs, batch["weights"]), None

                total, _ = jax.lax.scan(one, total, (np.array(numbers), own, inputs, outputs))
                count += len(numbers)
            depth += len(pattern) * repeats
        return total / max(count, 1)

    def apply(params, learned, batch, theirs, step):
        def first():
            error = transfer(params, batch, theirs)
            _, sums = jax.lax.stop_gradient(then.apply(params, learned, batch, theirs, step))
            return error, sums | {"transfer": jax.lax.stop_gradient(error)}

        def second():
            value, sums = then.apply(params, learned, batch, theirs, step)
            return value, sums | {"transfer": jnp.zeros((), jnp.float32)}

        return jax.lax.cond(step < steps, first, second)

    return Objective(then.init, apply)


def _around_mixer(path, module, inputs, output):
    return (inputs[0], output[0]) if path == "mixer" else None


def _error(found, wanted, weights_BxT):
    """Sum over weighted tokens of the relative squared error."""
    found, wanted = (a.astype(jnp.float32) for a in (found, wanted))
    size = (jnp.square(wanted).mean(-1) * weights_BxT).sum() / jnp.maximum(weights_BxT.sum(), 1)
    return (jnp.square(found - wanted).mean(-1) * weights_BxT).sum() / jnp.maximum(size, 1e-9)


def _check_teacher(student: ModelConfig, teacher: ModelConfig) -> None:
    for field in ("layers", "width"):
        mine, theirs = getattr(student, field), getattr(teacher, field)
        if mine != theirs:
            raise ConfigError(
                f"convert.transfer_steps: the teacher has model.{field} = {theirs}, the model {mine}; mixers can only "
                "be imitated layer by layer: set distill.teacher to the model that is converted, or leave "
                "convert.transfer_steps at 0"
            )
