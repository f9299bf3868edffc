"""Feature losses against loops in NumPy, float64; zero between equal models; maps of layers; refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_teacher import TEACHER, experiment, make_batch, sharp, teacher_params

from slm.compress.distill import distill_objective
from slm.compress.features import (
    ATTENDED,
    attention_distance,
    cosine,
    features,
    layer_pairs,
    mse,
    relation_distance,
    scores,
)
from slm.config import DistillConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.transformer import Transformer

B, T, H, G, K = 2, 7, 4, 2, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]])
SEEN = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & np.tri(T, dtype=bool)


def arrays(seed, *heads):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, h, K)).astype(np.float32) for h in heads]


def test_distances_of_hidden_states():
    a, b = (x.reshape(B, T, -1).astype(np.float64) for x in arrays(0, H, H))
    np.testing.assert_allclose(mse(a, b), ((a - b) ** 2).mean(-1), rtol=1e-5)
    angle = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(cosine(a, b), 1 - angle, rtol=1e-4, atol=1e-6)
    zero = jax.grad(lambda a: cosine(a, b).sum())(jnp.zeros_like(a, jnp.float32))
    assert np.isfinite(zero).all()


def test_scores_and_their_distance():
    (q, k), (q2, k2) = arrays(1, H, G), arrays(2, H, G)

    def naive(q, k, b, i, h):
        """Scores of one token of one head with the keys that it sees."""
        return [q[b, i, h] @ k[b, j, h // (H // G)] * 0.3 for j in range(T) if SEEN[b, i, j]]

    got = attention_distance(scores(q, k, 0.3), scores(q2, k2, 0.3), SEEN)
    for b in range(B):
        for i in range(T):
            differences = [np.subtract(naive(q, k, b, i, h), naive(q2, k2, b, i, h)) for h in range(H)]
            np.testing.assert_allclose(got[b, i], np.mean(np.square(differences)), rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_relations(heads):
    """Any number of relation heads, whatever the models' own."""
    mine, theirs = arrays(3, H)[0], arrays(4, G)[0]
    got = relation_distance(mine, theirs, heads, SEEN)

    def softmax(x, b, i, h):
        x = x[b].reshape(T, heads, -1)[:, h].astype(np.float64)
        logits = np.array([x[i] @ x[j] for j in range(T) if SEEN[b, i, j]]) / np.sqrt(x.shape[-1])
        return np.exp(logits) / np.exp(logits).sum()

    for b in range(B):
        for i in range(T):
            pairs = [(softmax(theirs, b, i, h), softmax(mine, b, i, h)) for h in range(heads)]
            np.testing.assert_allclose(
                got[b, i], np.mean([(p * np.log(p / q)).sum() for p, q in pairs]), rtol=1e-3, atol=1e-6
            )


ALL = {"distill__hidden": 1.0, "distill__attention": 1.0, "distill__relations": 1.0}


@pytest.mark.parametrize("hidden_loss", ["mse", "cosine"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_equal_models_have_nothing_to_learn(hidden_loss, remat):
    """E K4: every feature is zero, and so is its gradient; and a change anywhere is seen by each."""
    cfg = experiment(**ALL, distill__hidden_loss=hidden_loss, distill__alpha=1.0, model__remat=remat,
                     distill__relation_heads=4)  # fmt: skip
    model = Transformer(cfg.model)
    params = sharp(model.init(jax.random.key(0)), 3.0)
    objective = distill_objective(cfg, model, model)
    assert objective.init(jax.random.key(0)) == {}

    @jax.jit
    def both(params, teacher):
        return jax.value_and_grad(lambda p: objective.apply(p, {}, make_batch(), teacher, 0), has_aux=True)(params)

    (value, sums), grads = both(params, params)
    for name in ("hidden", "attention", "relations", "divergence"):
        np.testing.assert_allclose(sums[name], 0, atol=2e-4)
    np.testing.assert_allclose(value, 0, atol=1e-3)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 2e-3
    (_, sums), grads = both(params, sharp(params, 1.2))
    for name in ("hidden", "attention", "relations"):
        assert sums[name] > 0.005
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0.1


def test_what_is_seen_is_what_attends():
    """Attention computed from `mixer/attended` of a layer gives what its output projection was given."""
    model = Transformer(ModelConfig(vocab_size=31, layers=2, width=16, heads=2, kv_heads=1))
    params, batch = model.init(jax.random.key(0)), make_batch()

    def take(path, module, inputs, output):
        return {ATTENDED: output, "mixer/out": inputs[0] if inputs else None}.get(path)

    hidden, seen = model.watched(params, batch["tokens"], take)
    np.testing.assert_array_equal(hidden, model.hidden(params, batch["tokens"])[0])
    for layer in seen:
        q, k, v = (np.asarray(x, np.float64) for x in layer[ATTENDED])
        logits = np.einsum("BTHK,BSGK->BHTS", q, k) / np.sqrt(q.shape[-1])
        weights = np.where(np.tri(q.shape[1], dtype=bool), np.exp(logits), 0)
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("BHTS,BSGV->BTHV", weights, v).reshape(*q.shape[:2], -1)
        np.testing.assert_allclose(layer["mixer/out"], out, atol=1e-5)


def test_windows_bound_what_is_compared():
    """Beyond a student's window nothing is asked of its scores."""
    cfg = experiment(distill__attention=1.0, distill__alpha=0.0)
    plain = Transformer(cfg.model)
    near = Transformer(dataclasses.replace(cfg.model, attention=("window",),
                                           mixer=dataclasses.replace(cfg.model.mixer, window=3)))  # fmt: skip
    found = features(cfg.distill, near, plain)
    q, k = arrays(5, H, H)
    far = k.copy()
    far[:, 0] += 10  # seen by tokens 0 to 2 of a window of 3
    layer = {ATTENDED: (q, k, k)}
    losses = found.losses({}, [layer] * 2, [{ATTENDED: (q, far, k)}] * 2, None)["attention"]
    assert (losses[:, :3] > 0).all()
    np.testing.assert_array_equal(losses[:, 3:], 0)


@pytest.mark.parametrize("feature", ["attention", "relations"])
def test_documents_are_compared_apart(feature):
    """What another document of the row holds changes nothing, and what the own one holds does."""
    cfg = experiment(**{f"distill__{feature}": 1.0})
    model = Transformer(cfg.model)
    found = features(cfg.distill, model, model)
    (q, k), (theirs, _) = arrays(6, 2, 2), arrays(7, 2, 2)

    def losses(k):
        mine, other = {ATTENDED: (q, k, k)}, {ATTENDED: (theirs, q, q)}
        return np.asarray(found.losses({}, [mine] * 2, [other] * 2, jnp.asarray(SEGMENTS))[feature])

    changed = k.copy()
    changed[:, :3] += 1  # the first document of row 0
    before, after = losses(k), losses(changed)
    np.testing.assert_array_equal(before[0, 3:], after[0, 3:])
    assert (np.abs(before - after)[0, 1:3] > 1e-3).all()
    assert (np.abs(before - after)[1, 3:] > 1e-3).all()


def test_maps_of_layers():
    assert layer_pairs(DistillConfig(), 2, 6) == [(0, 2), (1, 5)]  # TinyBERT: g(m) = 3 m
    assert layer_pairs(DistillConfig(), 3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs(DistillConfig(), 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert layer_pairs(DistillConfig(layers=(0, 4)), 2, 6) == [(1, 3)]


def test_chosen_layers_are_those_compared():
    cfg = experiment(distill__hidden=1.0, distill__layers=(3, 0))
    found = features(cfg.distill, Transformer(cfg.model), TEACHER)
    learned = found.init(jax.random.key(0))
    _, mine = Transformer(cfg.model).watched(Transformer(cfg.model).init(jax.random.key(0)), make_batch()["tokens"],
                                             found.take)  # fmt: skip
    _, theirs = TEACHER.watched(teacher_params(), make_batch()["tokens"], found.take)
    got = found.losses(learned, mine, theirs, None)["hidden"]
    projected = np.asarray(mine[0][""], np.float64) @ np.asarray(learned["hidden"]["kernel"], np.float64)
    np.testing.assert_allclose(got, ((projected - np.asarray(theirs[2][""])) ** 2).mean(-1), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__hidden": 1.0, "distill__layers": (1, 2, 3)}, r"distill.layers = .* has 3 numbers: .* 2 layers"),
        ({"distill__hidden": 1.0, "distill__layers": (1, 5)}, r"distill.layers holds 5: the teacher has layers 1 to 4"),
        ({"distill__hidden": 1.0, "distill__layers": (0, 0)}, r"distill.layers holds only 0"),
        ({"distill__attention": 1.0}, r"distill.attention: layer 1 of the student has 2 .*use distill.relations"),
        ({"distill__attention": 1.0, "model__attention": ("gla",)}, r"layer 1 of the student is gla, which has no"),
        ({"distill__relations": 1.0, "model__attention": ("softmax", "gla")}, r"layer 2 of the student is gla"),
        ({"distill__relations": 1.0, "distill__relation_heads": 5}, r"relation_heads = 5 does not divide the 16"),
        ({"distill__relations": 1.0, "distill__relation_heads": 16}, r"= 16 does not divide the 24 .* teacher's q"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(changes, message):
    cfg = experiment(**changes)
    with pytest.raises(ConfigError, match=message):
        distill_objective(cfg, Transformer(cfg.model), TEACHER)
