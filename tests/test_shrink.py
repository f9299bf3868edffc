"""Smaller models: equal to the larger one with parts at zero, whatever goes, and better than chance at what goes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_learner import BASE as TRAINED
from tiny_learner import built, held_out, teacher, text_batches

import slm
from slm.compress.importance import block_influence
from slm.compress.shrink import shrunk_config
from slm.config import Experiment, ModelConfig, ShrinkConfig
from slm.errors import ConfigError
from slm.models import layerwise
from slm.models.counts import parameter_counts
from slm.models.language_model import LanguageModel
from slm.models.paths import flat
from slm.models.transformer import Transformer
from slm.training.transforms import replaced

BASE = {"vocab_size": 50, "layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 48}
MODELS = {
    "tied, gated": {},
    "untied, plain, biases": {"tied": False, "mlp": "gelu", "bias": ("qkv", "out", "mlp")},
    "hybrid, qk norm": {"attention": ("window", "softmax"), "tied": False},
    "sandwich, zero-centred": {"residual": "sandwich", "norm": "zero_centered_rmsnorm"},
    "gate, sinks": {"attention": ("gated_softmax", "sink_softmax")},
    "parallel": {"residual": "parallel"},
}
TOKENS = np.arange(5 * 16).reshape(5, 16) * 7 % 50


def made(seed=0, **changes):
    cfg = ModelConfig(**BASE | changes)
    shapes, rng = jax.eval_shape(Transformer(cfg).init, jax.random.key(0)), np.random.default_rng(seed)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), shapes)
    return LanguageModel(params, Experiment(model=cfg), None)


def kept_columns(whole, part):
    """Which columns of a matrix are those of a smaller one."""
    return np.array([np.flatnonzero((whole == column[:, None]).all(0))[0] for column in part.T])


def compare_with_zeros(model, small, zeroed):
    """The smaller model says what the larger one says with these parameters."""
    masked = dataclasses.replace(model, params=replaced(model.params, zeroed))
    want, found = (np.asarray(slm.logits(m, TOKENS)) for m in (masked, small))
    assert np.abs(found - slm.logits(model, TOKENS)).max() > 1e-2
    np.testing.assert_allclose(found, want, atol=2e-5 * np.abs(want).max())


def stacks(model, path):
    """Name of the stack and index, for each layer."""
    return [(f"{p.group}/{p.number}/{path}", p.index) for p in layerwise.places(model.transformer)]


def zero(model, path, keep, axis):
    """Parameters in which only entries keep[layer] of an axis are left."""
    leaves = {name: np.array(leaf) for name, leaf in flat(model.params).items() if name.endswith(path)}
    for layer, (name, index) in enumerate(stacks(model, path)):
        gone = np.setdiff1d(np.arange(leaves[name].shape[axis]), keep[layer])
        np.swapaxes(leaves[name][index], 0, axis - 1)[gone] = 0
    return leaves


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [20, (8, 48, 20, 33)], ids=["alike", "each its own"])
def test_channels_of_feedforwards(name, sizes):
    model = made(**MODELS[name])
    small = slm.shrink(model, mlp_width=sizes, criterion="activation", calibration=TOKENS)
    each = (sizes,) * 4 if isinstance(sizes, int) else sizes
    keep = []
    for number, F in enumerate(each):
        (a, i), (b, j) = (stacks(m, "mlp/up/kernel")[number] for m in (model, small))
        part = flat(small.params)[b][j]
        assert part.shape[1] == F
        keep.append(kept_columns(np.asarray(flat(model.params)[a][i]), np.asarray(part)))
    compare_with_zeros(model, small, zero(model, "mlp/down/kernel", keep, 1))
    gone = sum(48 - F for F in each) * (3 if model.config.model.mlp == "swiglu" else 2) * 32
    if not model.config.model.bias:
        assert (
            sum(a.size for a in jax.tree.leaves(small.params))
            == sum(a.size for a in jax.tree.leaves(model.params)) - gone
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [2, (1, 4, 2, 3)], ids=["alike", "each its own"])
def test_groups_of_heads(name, sizes):
    model = made(**MODELS[name])
    small = slm.shrink(model, kv_heads=sizes, criterion="random")
    each = (sizes,) * 4 if isinstance(sizes, int) else sizes
    keep = []
    for number, G in enumerate(each):
        (a, i), (b, j) = (stacks(m, "mixer/key/kernel")[number] for m in (model, small))
        part = flat(small.params)[b][j]
        assert part.shape[1] == G * 4
        groups = kept_columns(np.asarray(flat(model.params)[a][i]), np.asarray(part))[::4] // 4
        keep.append((groups[:, None] * 8 + np.arange(8)).reshape(-1))  # two heads of four channels each
    compare_with_zeros(model, small, zero(model, "mixer/out/kernel", keep, 1))


@pytest.mark.parametrize("name", MODELS)
def test_channels_of_the_stream(name):
    model = made(**MODELS[name])
    small = slm.shrink(model, width=24, criterion="weight_norm")
    keep = kept_columns(np.asarray(model.params["embed"]["embedding"]), np.asarray(small.params["embed"]["embedding"]))
    gone = np.setdiff1d(np.arange(32), keep)
    zeroed = {}
    for path, leaf in flat(model.params).items():
        # Whatever writes to the stream; in a sandwich, the norms behind it.
        if path.split("/")[-2] in ("embed", "out", "down", "attention_post_norm", "mlp_post_norm"):
            leaf = np.array(leaf)
            centred = path.endswith("scale") and model.config.model.norm == "zero_centered_rmsnorm"
            leaf[..., gone] = -1 if centred else 0
            zeroed[path] = leaf
    compare_with_zeros(model, small, zeroed)
    assert small.config.model.width == 24
    assert small.config.model.norm_eps == pytest.approx(1e-6 * 32 / 24)


def test_layers_go_by_number_and_keep_their_mechanism():
    model = made(attention=("window", "softmax", "window"))
    small = slm.shrink(model, keep_layers=(0, 1, 3))
    assert small.config.model.attention == ("window", "softmax")  # and window again
    assert slm.shrink(model, keep_layers=(0, 2)).config.model.attention == ("window",)
    x = layerwise.enter(model.transformer, model.params, jnp.asarray(TOKENS))
    for number in (0, 1, 3):
        layer = layerwise.layer_params(model.params, layerwise.places(model.transformer)[number])
        x, _ = layerwise.run(model.transformer, number, layer, x)
    want = model.transformer.logits(model.params, model.transformer.final(model.params, x))
    np.testing.assert_allclose(slm.logits(small, TOKENS), want, rtol=1e-4, atol=1e-4)


def test_layers_that_change_nothing_go_first():
    model = made()
    leaves = {name: np.array(leaf) for name, leaf in flat(model.params).items()}
    for path in ("mixer/out/kernel", "mlp/down/kernel"):
        leaves[f"blocks/0/{path}"][2] *= 1e-3
    model = dataclasses.replace(model, params=replaced(model.params, leaves))
    influence = block_influence(model, TOKENS)
    assert influence.argmin() == 2
    assert influence[2] < 1e-3
    _, seen = model.transformer.watched(model.params, TOKENS, lambda path, m, i, o: None if path else (i[0], o[0]))
    for number, one in enumerate(seen):
        a, b = (np.asarray(x, np.float64) for x in one[""])
        cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
        assert influence[number] == pytest.approx(1 - cosine.mean(), abs=1e-5)
    small = slm.shrink(model, layers=3, calibration=TOKENS)
    kept = slm.shrink(model, keep_layers=(0, 1, 3))
    assert jax.tree.all(jax.tree.map(np.array_equal, small.params, kept.params))


def test_all_at_once_and_again():
    model = made()
    small = slm.shrink(model, layers=3, mlp_width=32, kv_heads=2, width=24, criterion="taylor", calibration=TOKENS)
    m = small.config.model
    assert (m.layers, m.mlp_width, m.kv_heads, m.heads, m.width, m.head_dim) == (3, 32, 2, 4, 24, 4)
    spec = ShrinkConfig(layers=3, mlp_width=32, kv_heads=2, width=24)
    assert shrunk_config(model.config.model, spec) == m
    assert parameter_counts(m)["total"] == sum(a.size for a in jax.tree.leaves(small.params))
    again = slm.shrink(small, mlp_width=16, criterion="weight_norm")
    assert again.config.model.mlp_width == 16
    assert np.isfinite(slm.logits(again, TOKENS)).all()


def test_what_matters_is_kept():
    """On a trained model: channels of large activations, or large derivatives, lose less than any others do."""
    model, before = teacher()
    plain = built(TRAINED)
    assert before == pytest.approx(held_out(plain, model.params), abs=1e-5)
    tokens = np.concatenate([next(text_batches("train", i))["tokens"] for i in range(2)])

    def lost(**how):
        small = slm.shrink(model, mlp_width=64, calibration=tokens, **how)
        cfg = dataclasses.replace(TRAINED, model=small.config.model)
        return held_out(built(cfg), small.params) - before

    by = {name: lost(criterion=name) for name in ("activation", "taylor")}
    chance = [lost(criterion="random", seed=seed) for seed in (1, 2)]
    assert 0 < max(by.values()) < min(chance), (by, chance)


@pytest.mark.parametrize(("changes", "how", "message"), [
    ({}, {"mlp_width": 64}, "shrink.mlp_width = 64: layer 0 has 48"),
    ({}, {"mlp_width": (8, 8)}, "give one number, or one for each of 4 layers"),
    ({}, {"kv_heads": 5}, "shrink.kv_heads = 5: layer 0 has 4"),
    ({}, {"width": 40}, "shrink.width = 40: the model has 32 channels"),
    ({}, {"layers": 9}, "shrink.layers = 9: the model has 4"),
    ({}, {"keep_layers": (0, 4)}, "the model has layers 0 to 3"),
    ({"attention": ("gla",), "kv_heads": None}, {"kv_heads": 2}, "not known what goes together in layers of gla"),
    ({"attention": ("gla",), "kv_heads": None}, {"width": 24}, "not known what goes together in layers of gla"),
    ({"attention": ("differential",)}, {"keep_layers": (0, 1)}, "compute with their number"),
    ({"shared_layers": True}, {"mlp_width": 8}, "parameters of their own"),
    ({"mlp": "none", "mlp_width": None}, {"mlp_width": 8}, "no feed-forward"),
    ({"norm": "layernorm"}, {"width": 24}, "needs RMSNorm"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, how, message):
    with pytest.raises(ConfigError, match=message):
        slm.shrink(made(**changes), calibration=TOKENS, criterion="random", **how)


def test_what_is_measured_needs_text():
    with pytest.raises(ConfigError, match="give calibration"):
        slm.shrink(made(), layers=2)
    with pytest.raises(ConfigError, match=r"name those that stay in shrink\.keep_layers"):
        shrunk_config(made(attention=("window", "softmax")).config.model, ShrinkConfig(layers=2))
