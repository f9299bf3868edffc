"""Parts that go because training shuts their gates: channels, groups of heads, layers (Louizos et al. 2018; Sheared
LLaMA, Xia et al. 2024).

A gate multiplies all that a part says. It is drawn anew at each step from a hard concrete distribution, which has zero
and one among its values, so that its parameter has a gradient; a constraint, whose multipliers are trained too, pushes
the expected number of open gates to the number asked for. At the end the gates of the highest parameters stay, exactly
so many, as they then are; what a run ships has the others' parts cut out (slm.compress.shrink).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm.compress.groups import LAYER, OUTSIDE, reads, writes_to_the_stream
from slm.compress.importance import HEADS, MLP, WIDTH
from slm.compress.shrink import check_softmax, cut, shipped_config, shrunk_config
from slm.compression import gate_steps
from slm.config import Experiment, ModelConfig
from slm.errors import ConfigError
from slm.models import layerwise
from slm.models.counts import abstract_parameters
from slm.models.language_model import LanguageModel
from slm.models.layers import mlp_width
from slm.models.mixers import layers
from slm.models.paths import flat, nested
from slm.models.transformer import Transformer
from slm.training.transforms import ParamTransform, replaced

LAYERS = "layers"
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and ends of the stretched distribution (Louizos et al. 2018, section 4)."""
BEGIN = 4.0
"""log alpha of a gate at step 0: open with probability 0.997, and mostly fully, so that training begins with the model
as it is."""
LEAST = 0.1
"""A gate that has to stay is open at least so far, or nothing behind it would learn."""
NOISE = 0x6A7E
"""Tells these random numbers from others of the same seed."""


class Gates(NamedTuple):
    """Gates of one kind: of a stack of layers, or of the whole model."""

    shape: tuple[int, ...]
    """(layers of the stack, parts), or (parts,)."""
    keep: np.ndarray
    """How many stay: (layers of the stack,), or ()."""


def planned(cfg: ModelConfig, smaller: ModelConfig, spec: Any) -> dict[str, Gates]:
    """The gates of spec, a ShrinkConfig, by name: `mlp/GROUP/NUMBER` and `heads/GROUP/NUMBER`, with a row for each
    layer of that stack, and `layers`, `width`."""
    found = {}
    if spec.layers is not None:
        found[LAYERS] = Gates((cfg.layers,), np.array(spec.layers))
    if spec.width is not None:
        found[WIDTH] = Gates((cfg.width,), np.array(spec.width))
    # Where layers go too, those that stay are of one size.
    was, now = layers(cfg), layers(smaller) if spec.layers is None else layers(smaller)[:1] * cfg.layers
    stacks: dict[str, list[int]] = {}
    for number, place in enumerate(layerwise.places(Transformer(cfg))):
        stacks.setdefault(f"{place.group}/{place.number}", []).append(number)
    for kind, wanted, size in ((MLP, spec.mlp_width, mlp_width), (HEADS, spec.kv_heads, _groups)):
        if wanted is not None:
            for stack, numbers in stacks.items():
                keep = np.array([size(now[n].cfg) for n in numbers])
                found[f"{kind}/{stack}"] = Gates((len(numbers), size(was[numbers[0]].cfg)), keep)
    return found


def gate_transform(cfg: Experiment) -> ParamTransform:
    """The transform of cfg.shrink with criterion l0. It learns {"log_alpha", "linear", "quadratic"}, the last two being
    the multipliers of each constraint; its state is noise, in training steps alone.

    Raises ConfigError for sizes that the model cannot have.
    """
    spec, (warmup, end) = cfg.shrink, gate_steps(cfg)
    plan = _checked(cfg)

    def learn(params):
        zeros = {name: jnp.zeros(gates.keep.shape) for name, gates in plan.items()}
        open_ = {name: jnp.full(gates.shape, BEGIN, jnp.float32) for name, gates in plan.items()}
        return {"log_alpha": nested(open_), "linear": nested(zeros), "quadratic": nested(zeros)}

    def draw(state, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), NOISE), step)
        keys = jax.random.split(key, len(plan))
        return {name: jax.random.uniform(k, gates.shape) for k, (name, gates) in zip(keys, plan.items())}

    def apply(params, learned, state, step):
        shown = {}
        for name, log_alpha in flat(learned["log_alpha"]).items():
            still = jax.lax.stop_gradient(standing(log_alpha, plan[name].keep))
            shown[name] = jnp.where(step >= end, still, hard_concrete(log_alpha, state.get(name)))
        return gated(cfg.model, params, shown)

    def penalty(learned, step):
        log_alpha, linear, quadratic = (flat(learned[name]) for name in ("log_alpha", "linear", "quadratic"))
        tight = jnp.clip(step / max(warmup, 1), 0, 1) if warmup else 1.0
        total, open_ = 0.0, {}
        for name, gates in plan.items():
            wanted = 1 - tight * (1 - gates.keep / gates.shape[-1])
            share = jax.nn.sigmoid(log_alpha[name] - BETA * math.log(-GAMMA / ZETA)).mean(-1)
            total += _lagrangian(share - wanted, linear[name], quadratic[name]).sum()
            open_.setdefault(f"open_{name.split('/')[0]}", []).append(share.reshape(-1))
        metrics = {name: jnp.concatenate(shares).mean() for name, shares in open_.items()}
        return jnp.where(step < end, total, 0.0), metrics

    def rate(step):
        return jnp.where(step < end, spec.gate_learning_rate / cfg.optim.learning_rate, 0.0)

    return ParamTransform(lambda params: {}, apply, learn=learn, draw=draw, penalty=penalty, rate=rate)


def hard_concrete(log_alpha, uniform=None):
    """Gates in [0, 1] (Louizos et al. 2018, equations 10 and 11), or without noise those of its equation 13."""
    if uniform is None:
        soft = jax.nn.sigmoid(log_alpha)
    else:
        uniform = jnp.clip(uniform, 1e-6, 1 - 1e-6)
        soft = jax.nn.sigmoid((jnp.log(uniform) - jnp.log1p(-uniform) + log_alpha) / BETA)
    return jnp.clip(soft * (ZETA - GAMMA) + GAMMA, 0, 1)


def standing(log_alpha, keep):
    """Gates after the end: the `keep` highest of each row as they are without noise, the others shut."""
    ranks = jnp.argsort(jnp.argsort(-log_alpha, stable=True, axis=-1), axis=-1)
    return jnp.where(ranks < jnp.asarray(keep)[..., None], jnp.maximum(hard_concrete(log_alpha), LEAST), 0)


def gated(cfg: ModelConfig, params: Any, gates: dict[str, Any]) -> Any:
    """`params` with all that the parts say multiplied by their gates, which are named as in `planned`."""
    found, numbers = {}, {}
    for number, place in enumerate(layerwise.places(Transformer(cfg))):
        numbers.setdefault(f"{place.group}/{place.number}", []).append(number)
    for path, leaf in flat(params).items():
        group, _, rest = path.partition("/")
        stack, _, inner = rest.partition("/")
        stack = f"{group}/{stack}"
        axes = LAYER.get(inner) if stack in numbers else OUTSIDE.get(path)
        if axes is None:
            continue
        for kind in (MLP, HEADS):
            if reads(axes, kind) and (rows := gates.get(f"{kind}/{stack}")) is not None:
                found[path] = leaf = leaf * jnp.repeat(rows, leaf.shape[1] // rows.shape[1], 1)[:, :, None]
        if writes_to_the_stream(path, axes):
            if WIDTH in gates:
                found[path] = leaf = leaf * gates[WIDTH]
            if LAYERS in gates and stack in numbers:
                rows = gates[LAYERS][np.array(numbers[stack])]
                found[path] = leaf * rows.reshape(-1, *(1 for _ in leaf.shape[1:]))
    return replaced(params, found)


def cut_by_gates(cfg: Experiment, params: Any, learned: dict[str, Any]) -> tuple[Experiment, Any]:
    """Config and parameters of the smaller model, of exactly the shape asked for, whenever in the run it is cut."""
    plan = planned(cfg.model, shipped_config(cfg).model, cfg.shrink)
    log_alpha = {name: jnp.asarray(one) for name, one in flat(learned["log_alpha"]).items()}
    params = gated(cfg.model, params, {name: standing(one, plan[name].keep) for name, one in log_alpha.items()})
    model = LanguageModel(params, cfg, None)
    return shipped_config(cfg), _cut(model, {name: np.asarray(one) for name, one in log_alpha.items()}).params


def _cut(model: LanguageModel, log_alpha: dict[str, np.ndarray]) -> LanguageModel:
    spec, nothing = model.config.shrink, np.zeros(0)
    scores = {WIDTH: [log_alpha.get(WIDTH, nothing)], MLP: [], HEADS: []}
    for place in layerwise.places(model.transformer):
        for kind in (MLP, HEADS):
            rows = log_alpha.get(f"{kind}/{place.group}/{place.number}")
            scores[kind].append(nothing if rows is None else rows[place.index])
    keep = () if spec.layers is None else np.sort(np.argsort(-log_alpha[LAYERS], kind="stable")[: spec.layers])
    return cut(model, spec, scores, tuple(int(number) for number in keep))


def _checked(cfg: Experiment) -> dict[str, Gates]:
    spec, model = cfg.shrink, cfg.model
    if spec.layers is not None:
        if model.residual in ("post", "sandwich"):
            raise ConfigError(
                f"shrink.layers with shrink.criterion = l0: model.residual = {model.residual} norms what layers say, "
                "so a gate that is half open changes nothing; take another criterion for layers"
            )
        check_softmax(model, "layers")
    plan = planned(model, shrunk_config(model, spec), spec)
    # What cannot be cut is refused now, and not when all is trained.
    log_alpha = {name: np.zeros(gates.shape) for name, gates in plan.items()}
    jax.eval_shape(lambda params: _cut(LanguageModel(params, cfg, None), log_alpha).params, abstract_parameters(model))
    return plan


def _lagrangian(off, linear, quadratic):
    """linear * off + quadratic * off^2 (Xia et al. 2024, section 2.1), to be minimised in `off` and, at the same time,
    maximised in the multipliers: those get the opposite gradient."""
    fixed = jax.lax.stop_gradient(off)
    down = jax.lax.stop_gradient(linear) * off + jax.lax.stop_gradient(quadratic) * off**2
    return down - linear * fixed - quadratic * fixed**2


def _groups(cfg: ModelConfig) -> int:
    return cfg.kv_heads or cfg.heads
