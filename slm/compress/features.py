"""What a student may imitate of a teacher's inside: hidden states, attention matrices, relations.

Each is a loss (B, T) of every token, 0 where the models are equal there. Tokens see what their segment and the mask let
them see; padding has weight 0 and is seen by none but padding.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm.attention.spans import visible
from slm.config import DistillConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.mixers import layers
from slm.models.mixers.base import head_dim, logit_scale
from slm.models.mixers.softmax import SoftmaxMixer
from slm.models.transformer import Transformer
from slm.models.watch import Take

ATTENDED = "mixer/attended"
"""Where softmax mixers show their queries, keys and values."""


class Features(NamedTuple):
    """Pure functions for one pair of models."""

    take: Take | None
    """What to watch in both models (slm.models.watch); None: nothing."""
    init: Callable[[jax.Array], dict]
    """key -> projections that are trained beside the student; {} where widths agree."""
    losses: Callable[[dict, list, list, jax.Array | None], dict[str, jax.Array]]
    """(projections, what was seen in the student, in the teacher, segment ids (B, T) or None) -> {"hidden",
    "attention", "relations": (B, T) float32}, those with a weight, means over pairs of layers."""


def layer_pairs(distill: DistillConfig, student: int, teacher: int) -> list[tuple[int, int]]:
    """(layer of the student, layer of the teacher), from 0, for models of so many layers.

    Unless distill.layers says so, student layer m of M imitates teacher layer m N / M of N (TinyBERT, Jiao et al. 2020,
    section 4.1), rounded. Raises ConfigError for a map that does not fit.
    """
    chosen = distill.layers
    if not chosen:
        return [(m, max(1, int((m + 1) * teacher / student + 0.5)) - 1) for m in range(student)]
    if len(chosen) != student:
        raise ConfigError(
            f"distill.layers = {chosen} has {len(chosen)} numbers: give one for each of the student's {student} "
            "layers, 0 for those that imitate none"
        )
    for n in chosen:
        if not 0 <= n <= teacher:
            raise ConfigError(f"distill.layers holds {n}: the teacher has layers 1 to {teacher}; 0 stands for none")
    if not any(chosen):
        raise ConfigError("distill.layers holds only 0: name a layer of the teacher, or set the features' weights to 0")
    return [(m, n - 1) for m, n in enumerate(chosen) if n]


def features(distill: DistillConfig, student: Transformer, teacher: Transformer) -> Features:
    """The features that have a weight. Raises ConfigError where the two models do not fit together."""
    s, t = student.cfg, teacher.cfg
    inside = bool(distill.attention or distill.relations)
    if not (distill.hidden or inside):
        return Features(None, lambda key: {}, lambda *a: {})
    pairs = layer_pairs(distill, s.layers, t.layers)
    last = pairs if distill.layers else pairs[-1:]
    if distill.attention:
        _check_attention(s, t, pairs)
    if distill.relations:
        heads = _relation_heads(distill, s, t, last)
    projected = bool(distill.hidden) and s.width != t.width

    def take(path, module, inputs, output):
        if not path and distill.hidden:
            return output[0]
        return output if path == ATTENDED and inside else None

    def init(key):
        if not projected:
            return {}
        return {"hidden": {"kernel": jax.nn.initializers.lecun_normal()(key, (s.width, t.width))}}

    def losses(learned, mine, theirs, segment_ids):
        found = {}
        if distill.hidden:
            kernel = learned["hidden"]["kernel"] if projected else None
            distance = DISTANCES[distill.hidden_loss]
            found["hidden"] = _mean(distance(_projected(mine[m][""], kernel), theirs[n][""]) for m, n in pairs)
        if distill.attention:
            found["attention"] = _mean(
                attention_distance(
                    scores(*mine[m][ATTENDED][:2], _scale(s, m)),
                    scores(*theirs[n][ATTENDED][:2], _scale(t, n)),
                    _seen(s, m, mine[m], segment_ids) & _seen(t, n, theirs[n], segment_ids),
                )
                for m, n in pairs
            )
        if distill.relations:
            found["relations"] = _mean(
                sum(
                    relation_distance(a, b, heads, _seen(s, m, mine[m], segment_ids))
                    for a, b in zip(mine[m][ATTENDED], theirs[n][ATTENDED], strict=True)
                )
                for m, n in last
            )
        return found

    return Features(take, init, losses)


def mse(student_BxTxD, teacher_BxTxD):
    """Mean squared error over channels: (B, T)."""
    return jnp.square(_float(student_BxTxD) - _float(teacher_BxTxD)).mean(-1)


def cosine(student_BxTxD, teacher_BxTxD):
    """1 - cosine of the angle between the vectors (DistilBERT, Sanh et al. 2019): (B, T)."""
    a, b = _float(student_BxTxD), _float(teacher_BxTxD)
    squares = jnp.square(a).sum(-1) * jnp.square(b).sum(-1)
    return 1 - (a * b).sum(-1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


DISTANCES = {"mse": mse, "cosine": cosine}
"""Name in `distill.hidden_loss` to function."""


def scores(q_BxTxHxK, k_BxSxGxK, scale):
    """What softmax is taken of, before masks and soft caps: (B, H, T, S) float32."""
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxSxGxK.shape[2]
    q = _float(q_BxTxHxK).reshape(B, T, G, H // G, K)
    return jnp.einsum("BTGRK,BSGK->BGRTS", q, _float(k_BxSxGxK)).reshape(B, H, T, -1) * scale


def attention_distance(student_BxHxTxS, teacher_BxHxTxS, seen_BxTxS):
    """Mean squared error of scores before the softmax, over heads and the keys that a token sees: (B, T).

    TinyBERT (section 3) takes these and not the weights after the softmax, since they are learned faster.
    """
    squares = jnp.square(student_BxHxTxS - teacher_BxHxTxS).mean(1)
    return jnp.where(seen_BxTxS, squares, 0).sum(-1) / jnp.maximum(seen_BxTxS.sum(-1), 1)


def relation_distance(student_BxTxHxK, teacher_BxTxHxK, heads: int, seen_BxTxS):
    """KL divergence between softmaxes of x x^T / sqrt(K'), x cut into `heads` heads of size K', of teacher and student;
    mean over heads, (B, T) nats (MiniLM v2, Wang et al. 2021, eqs. 4 to 8)."""

    def log_relation(x):
        x = _float(x).reshape(*x.shape[:2], heads, -1)
        logits = jnp.einsum("BTHK,BSHK->BHTS", x, x) * x.shape[-1] ** -0.5
        return jax.nn.log_softmax(jnp.where(seen_BxTxS[:, None], logits, -1e30))

    log_p, log_q = log_relation(teacher_BxTxHxK), log_relation(student_BxTxHxK)
    return (jnp.exp(log_p) * jnp.where(seen_BxTxS[:, None], log_p - log_q, 0)).sum(-1).mean(1)


def _seen(cfg: ModelConfig, layer: int, seen: dict, segment_ids):
    """(B or 1, T, S) bool: keys that each token sees in that layer, but for sinks beyond a window."""
    T = seen[ATTENDED][0].shape[1]
    at = jnp.arange(T)
    keep = visible(at[:, None], at[None, :], cfg.causal, layers(cfg)[layer].configured.mixer.window)[None]
    return keep if segment_ids is None else keep & (segment_ids[:, :, None] == segment_ids[:, None, :])


def _scale(cfg: ModelConfig, layer: int) -> float:
    return logit_scale(layers(cfg)[layer].configured)


def _projected(x, kernel):
    return x if kernel is None else _float(x) @ kernel


def _float(x):
    return x.astype(jnp.float32)


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def _check_softmax(field: str, cfg: ModelConfig, whose: str, numbers) -> None:
    for number in numbers:
        layer = layers(cfg)[number]
        if not issubclass(layer.mixer, SoftmaxMixer):
            raise ConfigError(
                f"distill.{field}: layer {number + 1} of the {whose} is {layer.mechanism}, which has no attention "
                "matrix: choose other layers in distill.layers, or set it to 0"
            )


def _check_attention(s: ModelConfig, t: ModelConfig, pairs) -> None:
    _check_softmax("attention", s, "student", [m for m, _ in pairs])
    _check_softmax("attention", t, "teacher", [n for _, n in pairs])
    for m, n in pairs:
        a, b = layers(s)[m].cfg.heads, layers(t)[n].cfg.heads
        if a != b:
            raise ConfigError(
                f"distill.attention: layer {m + 1} of the student has {a} heads and layer {n + 1} of the teacher {b}: "
                "use distill.relations, which needs no equal counts, or give model.heads the teacher's"
            )


def _relation_heads(distill: DistillConfig, s: ModelConfig, t: ModelConfig, pairs) -> int:
    _check_softmax("relations", s, "student", [m for m, _ in pairs])
    _check_softmax("relations", t, "teacher", [n for _, n in pairs])
    heads = distill.relation_heads or s.kv_heads or s.heads
    for cfg, whose, numbers in ((s, "student", [m for m, _ in pairs]), (t, "teacher", [n for _, n in pairs])):
        for number in numbers:
            one = layers(cfg)[number].cfg
            for what, count in (("queries", one.heads), ("keys", one.kv_heads or one.heads)):
                if count * head_dim(one) % heads:
                    raise ConfigError(
                        f"distill.relation_heads = {heads} does not divide the {count * head_dim(one)} channels of the "
                        f"{whose}'s {what}: choose a number that divides those of both models"
                    )
    return heads
