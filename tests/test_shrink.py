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
from slm.compress.shrink import KNOW_THEIR_DEPTH, shrunk_config
from slm.config import Experiment, MixerConfig, ModelConfig, ShrinkConfig
from slm.errors import ConfigError
from slm.models import layerwise
from slm.models.counts import parameter_counts
from slm.models.language_model import LanguageModel
from slm.models.mixers import MIXERS, layers, mixer
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
    "shared norm, low-rank gates": {
        "attention": ("gated_softmax",), "residual": "parallel_shared", "bias": ("qkv", "out", "mlp"),
        "mixer": MixerConfig(gate_rank=32),  # as wide as the stream, which it is not
    },
    "post, tables, scales": {
        "residual": "post", "position": "learned", "max_length": 16, "token_types": 2, "embedding_norm": True,
        "embedding_scale": 3.0, "residual_scale": 0.7, "logit_divisor": 2.0, "bias": ("head",), "tied": False,
    },
    "large epsilon": {"norm_eps": 0.3},
}  # fmt: skip
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


def off_the_stream(model, gone, leaves=()):
    """Parameters, some of them given, in which nothing writes to these channels of the stream."""
    found = dict(leaves)
    for path, leaf in flat(model.params).items():
        # Whatever writes to the stream; in a sandwich, the norms behind it.
        if path.startswith("embed/") or path.split("/")[-2] in ("out", "down", "attention_post_norm", "mlp_post_norm"):
            found[path] = np.array(found.get(path, leaf))
            centred = path.endswith("scale") and model.config.model.norm == "zero_centered_rmsnorm"
            found[path][..., gone] = -1 if centred else 0
    return found


def of_groups(model, small, number):
    """Rows of a layer's `out` of the groups of heads that the smaller model has kept."""
    was, now = (layers(m.config.model)[number].cfg for m in (model, small))
    (a, i), (b, j) = (stacks(m, "mixer/value/bias")[number] for m in (model, small))
    kept = np.isin(np.asarray(flat(model.params)[a][i]), np.asarray(flat(small.params)[b][j]))
    groups = np.flatnonzero(kept)[::4] // 4
    assert len(groups) == now.kv_heads
    size = was.heads // was.kv_heads * 4
    return (groups[:, None] * size + np.arange(size)).reshape(-1)


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


@pytest.mark.parametrize("name", [*MODELS, "no feed-forward"])
def test_channels_of_the_stream(name):
    model = made(**MODELS.get(name, {"mlp": "none", "mlp_width": None}))
    small = slm.shrink(model, width=24, criterion="weight_norm")
    keep = kept_columns(np.asarray(model.params["embed"]["embedding"]), np.asarray(small.params["embed"]["embedding"]))
    compare_with_zeros(model, small, off_the_stream(model, np.setdiff1d(np.arange(32), keep)))
    assert small.config.model.width == 24
    assert small.config.model.norm_eps == pytest.approx(model.config.model.norm_eps * 32 / 24)


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


def program(mechanism, number, deep):
    """What a layer computes, as (function of parameters and x, its arguments, its text, its constants)."""
    settings = {"feature_dim": 8} if mechanism == "performer" else {}
    cfg = ModelConfig(50, deep, 32, attention=(mechanism,), mixer=MixerConfig(**settings))
    layer, x = layers(cfg)[1], np.random.default_rng(0).normal(size=(1, 16, 32)).astype(np.float32)
    context = Transformer(cfg).context(jnp.arange(16)[None], None).replace(layer=number)
    module, rng = mixer(mechanism, layer.cfg, jnp.float32), np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, context)
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), shapes)
    jaxpr, shape = jax.make_jaxpr(lambda params, x: module.apply(params, x, context)[0], return_shape=True)(params, x)
    assert shape.shape == x.shape
    consts = [np.asarray(a) for a in jaxpr.consts]
    return jax.jit(lambda: module.apply(params, x, context)[0]), (
        str(jaxpr.jaxpr),
        [(a.shape, a.tobytes()) for a in consts],
    )


def test_mechanisms_that_compute_with_their_number_are_known():
    """All others say the same at another depth of another model: their programs are the same, or at least the sums."""
    of_class = {row.mixer: name for name, row in MIXERS.items()}
    found = set()
    for name in of_class.values():
        (here, one), (there, other) = program(name, 1, 4), program(name, 2, 3)
        if one != other and not np.array_equal(here(), there()):
            found.add(name)
    assert found == set(KNOW_THEIR_DEPTH)


def test_layers_with_sizes_of_their_own_lose_layers_and_then_parts():
    changes = {"layer_heads": (8, 4, 8, 2), "layer_kv_heads": (4, 2, 2, 2), "layer_mlp_widths": (48, 40, 30, 20)}
    model = made(first_norm=False, bias=("qkv",), attention=("window", "softmax", "softmax"), **changes)
    for keep in ((0, 2, 3), (1, 3)):
        small = slm.shrink(model, keep_layers=keep)
        m = small.config.model
        assert m.first_norm == (keep[0] != 0)  # only the first layer lacks the norm
        assert m.layer_mlp_widths == tuple(changes["layer_mlp_widths"][number] for number in keep)
        x = layerwise.enter(model.transformer, model.params, jnp.asarray(TOKENS))
        for number in keep:
            layer = layerwise.layer_params(model.params, layerwise.places(model.transformer)[number])
            x, _ = layerwise.run(model.transformer, number, layer, x)
        want = model.transformer.logits(model.params, model.transformer.final(model.params, x))
        np.testing.assert_allclose(slm.logits(small, TOKENS), want, rtol=1e-4, atol=1e-4)
    # Groups of 2, 2, 4 and 1 query heads: fewer groups keep that, each layer its own.
    small = slm.shrink(model, kv_heads=(2, 1, 1, 2), width=24, criterion="random")
    assert small.config.model.layer_heads == (4, 2, 4, 2)
    wider = zero(model, "mixer/out/kernel", [of_groups(model, small, number) for number in range(4)], 1)
    keep = kept_columns(np.asarray(model.params["embed"]["embedding"]), np.asarray(small.params["embed"]["embedding"]))
    compare_with_zeros(model, small, off_the_stream(model, np.setdiff1d(np.arange(32), keep), wider))


@pytest.mark.parametrize("mechanism", ["base_conv"])
@pytest.mark.parametrize("criterion", ["activation", "taylor", "weight_norm"])
def test_feedforwards_shrink_beside_any_mixer(mechanism, criterion):
    model = made(attention=(mechanism,), kv_heads=None, layers=2)
    small = slm.shrink(model, mlp_width=20, criterion=criterion, calibration=TOKENS)
    whole, part = (np.asarray(m.params["blocks"]["0"]["mlp"]["up"]["kernel"]) for m in (model, small))
    keep = [kept_columns(a, b) for a, b in zip(whole, part)]
    compare_with_zeros(model, small, zero(model, "mlp/down/kernel", keep, 1))


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
    ({}, {"keep_layers": (1, 0, 2, 3)}, "each once, in rising order"),
    ({}, {"keep_layers": (0, 0)}, "each once, in rising order"),
    ({"head": "sequence", "labels": 2, "pooling": "mean", "head_activation": "tanh"}, {"width": 24}, "head_activation"),
    ({"attention": ("differential",)}, {"keep_layers": (0, 1)}, "compute with their number"),
    ({"shared_layers": True}, {"mlp_width": 8}, "parameters of their own"),
    ({"mlp": "none", "mlp_width": None}, {"mlp_width": 8}, "no feed-forward"),
    ({"norm": "layernorm"}, {"width": 24}, "needs RMSNorm"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, how, message):
    with pytest.raises(ConfigError, match=message):
        slm.shrink(made(**changes), calibration=TOKENS, criterion="random", **how)


def test_a_group_counts_all_that_it_says():
    """Weights of many channels, though no single one is large, are more than those of one."""
    model = made(layers=1)
    leaves = {"blocks/0/mixer/out/kernel": np.zeros((1, 32, 32), np.float32)}
    leaves["blocks/0/mixer/out/kernel"][0, 8:16] = 1.0  # the second of four groups
    leaves["blocks/0/mixer/out/kernel"][0, 25] = 2.0
    model = dataclasses.replace(model, params=replaced(model.params, leaves))
    small = slm.shrink(model, kv_heads=1, criterion="weight_norm")
    np.testing.assert_array_equal(
        small.params["blocks"]["0"]["mixer"]["value"]["kernel"],
        model.params["blocks"]["0"]["mixer"]["value"]["kernel"][..., 4:8],
    )


def test_a_model_without_a_next_token_is_measured_by_what_it_says():
    model = made(head="sequence", labels=2, pooling="mean", layers=2)
    with pytest.raises(ConfigError, match=r"criterion = taylor: model\.head = sequence"):
        slm.shrink(model, width=24, criterion="taylor", calibration=TOKENS)
    small = slm.shrink(model, width=24, mlp_width=20, calibration=TOKENS)
    assert slm.logits(small, TOKENS).shape == (5, 2)


def test_what_is_measured_needs_text():
    with pytest.raises(ConfigError, match="give calibration"):
        slm.shrink(made(), layers=2)
    with pytest.raises(ConfigError, match=r"name those that stay in shrink\.keep_layers"):
        shrunk_config(made(attention=("window", "softmax")).config.model, ShrinkConfig(layers=2))
