"""Post-training quantization: GPTQ against its equations in float64, methods in the order that their papers claim."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_gguf import made

import slm
from slm.compress.clipping import GRID, SHRINK, clipped, shrunk
from slm.compress.folding import feeds, fold
from slm.compress.gptq import gptq
from slm.compress.hqq import best_zeros
from slm.compress.rotate import orthogonal, rotate
from slm.compress.scaling import awq, powered, scaled_loss, smoothquant
from slm.compress.schemes import Scheme
from slm.compress.second_order import factor
from slm.config import ModelConfig
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError
from slm.models.language_model import LanguageModel
from slm.models.mixers import layers
from slm.models.quantized import dequantized, is_quantized
from slm.models.transformer import Transformer

TOKENS = np.random.default_rng(0).integers(0, 250, (16, 64)).astype(np.int32)
HELD_OUT = np.random.default_rng(1).integers(0, 250, (8, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return made("llama", build_tokenizer("bytes", lambda: iter(())))


@pytest.fixture(scope="module")
def spiky(model):
    """With a few channels of the stream that are much larger than the others, as trained models have them."""
    params = dict(model.params)
    channels = jnp.ones(64).at[jnp.array([3, 17])].set(20.0)
    block = params["blocks"]["0"]
    norms = {name: {"scale": block[name]["scale"] * channels} for name in ("attention_norm", "mlp_norm")}
    params["blocks"] = {"0": block | norms}
    return dataclasses.replace(model, params=params)


def divergence(model, small):
    """Mean KL(model || small) of the next token, in nats."""
    p, q = (jax.nn.log_softmax(slm.logits(m, HELD_OUT)) for m in (model, small))
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


def problem(size=24, outputs=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, size)) @ (np.eye(size) + 0.5 * rng.normal(size=(size, size)))
    return rng.normal(size=(size, outputs)), x.T @ x


def brain_surgeon(w, h, scheme, damping, order):
    """Optimal brain quantization in a fixed order: after each input, the best change of all that are left, from a new
    inverse of what is left of H (Frantar & Alistarh 2022, eq. 3)."""
    w, size = w.copy(), len(w)
    h = h + damping * np.diag(h).mean() * np.eye(size)
    static = [None if a is None else np.asarray(a) for a in scheme.fit(jnp.asarray(w, jnp.float32))]
    group, left = scheme.group_size or size, list(order)
    moving = scheme.group_size and list(order) == list(range(size))
    for n, i in enumerate(order):
        if moving and n % group == 0:
            now = [None if a is None else np.asarray(a) for a in scheme.fit(jnp.asarray(w[i : i + group], jnp.float32))]
        elif not moving:
            now = [None if a is None else a[i // group : i // group + 1] for a in static]
        steps = [None if a is None else jnp.asarray(a) for a in now]
        rounded = np.asarray(
            scheme.restore(scheme.codes(jnp.asarray(w[i : i + 1], jnp.float32), *steps), *steps), np.float64
        )[0]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        w[left] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - rounded)
        w[i] = rounded
        left = left[1:]
    return w


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int4"),
        Scheme("int4", 8),
        Scheme("int4", 8, False),
        Scheme("int2", 4),
        Scheme("nf4", 12),
        Scheme("ternary"),
    ],
    ids=str,
)
def test_gptq_does_what_its_equations_say(scheme, act_order):
    w, h = problem()
    order = np.argsort(-np.diag(h)) if act_order else np.arange(len(h))
    want = brain_surgeon(w, h, scheme, 0.01, order)
    found, scale, zero = gptq(jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), scheme, 0.01, act_order)
    # A weight halfway between two codes may fall to either side, and those after it follow.
    assert np.isclose(found, want, atol=1e-3).mean() > 0.98
    packed = scheme.pack(found, scale, zero)
    np.testing.assert_array_equal(packed.astype(jnp.float32), found)

    def loss(rounded):
        error = np.asarray(rounded, np.float64) - w
        return np.sum(error * (h @ error))

    assert loss(found) == pytest.approx(loss(want), rel=0.02)
    assert loss(found) < (0.95 if scheme.name == "ternary" else 0.8) * loss(scheme.fake(jnp.asarray(w, jnp.float32)))


def test_the_factor_is_that_of_the_inverse():
    _, h = problem()
    h[5] = h[:, 5] = 0  # an input that is always zero
    u = np.asarray(factor(jnp.asarray(h, jnp.float32), 0.01), np.float64)
    damped = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
    damped[5, 5] += 1
    np.testing.assert_allclose(np.tril(u, -1), 0)
    np.testing.assert_allclose(u.T @ u @ damped, np.eye(len(h)), atol=2e-3)


def test_large_groups_and_blocks_agree_with_the_equations():
    """More inputs than a block, groups larger than blocks, and inputs that blocks do not fill."""
    for size, group in ((384, 384), (150, None), (320, 160)):
        w, h = problem(size, 3, 1)
        scheme = Scheme("int4", group)
        found, *_ = gptq(jnp.asarray(w, jnp.float32), jnp.asarray(h + 50 * np.eye(size), jnp.float32), scheme, 0.05)
        want = brain_surgeon(w, h + 50 * np.eye(size), scheme, 0.05, np.arange(size))
        assert np.isclose(found, want, atol=1e-3).mean() > 0.9, (size, group)


def test_gptq_beats_rounding_and_needs_the_right_inputs(model):
    for scheme, group in (("int4", 32), ("int2", 16)):
        rounded = divergence(model, slm.quantize(model, scheme, group_size=group, embedding=False))
        small = slm.quantize(model, scheme, group_size=group, embedding=False, method="gptq", calibration=TOKENS)
        assert divergence(model, small) < 0.95 * rounded
        w, h = problem(64, 32, 3)
        shuffled = np.random.default_rng(0).permutation(64)
        one, w = Scheme(scheme, group), jnp.asarray(w, jnp.float32)
        right, wrong = (gptq(w, jnp.asarray(m, jnp.float32), one)[0] - w for m in (h, h[shuffled][:, shuffled]))
        assert np.sum(right * (h @ right)) < 0.8 * np.sum(wrong * (h @ wrong))


def test_every_matrix_in_layers_is_quantized_and_skipped_ones_are_not(model):
    small = slm.quantize(model, "int4", group_size=16, symmetric=False, embedding=True, skip=(".*/mlp/down/kernel",))
    where = jax.tree.leaves_with_path(small.params, is_leaf=is_quantized)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in where}
    quantized = {name: leaf for name, leaf in found.items() if is_quantized(leaf)}
    inside = [f"blocks/0/mixer/{n}/kernel" for n in ("query", "key", "value", "out")]
    inside += [f"blocks/0/mlp/{n}/kernel" for n in ("up", "gate")]
    assert set(quantized) == {*inside, "embed/embedding", "head/kernel"}
    assert {quantized[name].scheme for name in inside} == {"int4"}
    assert {quantized[name].scheme for name in ("embed/embedding", "head/kernel")} == {"int8"}
    exact = dataclasses.replace(small, params=dequantized(small.params))
    np.testing.assert_allclose(slm.logits(small, HELD_OUT), slm.logits(exact, HELD_OUT), atol=1e-4)


def test_half_quadratic_zeros_err_less():
    w = jnp.asarray(np.random.default_rng(0).standard_t(3, size=(2, 64, 32)), jnp.float32)
    for scheme in (Scheme("int4", 16, False), Scheme("int2", None, False)):
        plain = np.asarray(scheme.fake(w))
        scale, zero = best_zeros(w, scheme)
        better = np.asarray(scheme.fake(w, scale, zero))
        groups = w.shape[1] // (scheme.group_size or w.shape[1])
        errors = [(np.abs(a - w) ** 0.7).reshape(2, groups, -1, 32).sum(2) for a in (plain, better)]
        assert (errors[1] <= errors[0] * 1.0001).all()
        assert errors[1].sum() < 0.98 * errors[0].sum()
        np.testing.assert_array_equal(scheme.fit(w)[0], scale)


def test_scales_of_channels_change_nothing_and_help_with_outliers(spiky):
    schemes = {f"blocks/0/{path}/kernel": Scheme("int4", 16) for path in MATRICES}
    scaled = awq(spiky, schemes, TOKENS, lambda done, all_: None)
    assert not np.allclose(
        scaled.params["blocks"]["0"]["mlp_norm"]["scale"], spiky.params["blocks"]["0"]["mlp_norm"]["scale"]
    )
    np.testing.assert_allclose(slm.logits(scaled, HELD_OUT), slm.logits(spiky, HELD_OUT), atol=2e-3)
    plain, better, clips = (
        slm.quantize(spiky, "int4", group_size=16, embedding=False, method=method, calibration=TOKENS)
        for method in ("rtn", "awq+rtn", "awq")
    )
    assert divergence(spiky, better) < 0.8 * divergence(spiky, plain)
    assert 0.5 * divergence(spiky, better) < divergence(spiky, clips) < divergence(spiky, better)
    for path in MATRICES:
        part, name = path.split("/")
        scales = [np.abs(m.params["blocks"]["0"][part][name]["kernel"].scale) for m in (better, clips)]
        assert (scales[1] <= scales[0]).all()
        assert np.array_equal(*scales) == (name in ("query", "key")), path


MATRICES = [f"mixer/{n}" for n in ("query", "key", "value", "out")] + [f"mlp/{n}" for n in ("up", "gate", "down")]


def test_awq_measures_what_readers_say():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 16)) * rng.uniform(0.1, 5, 16), rng.normal(size=(16, 8))
    s = np.asarray(powered(jnp.asarray(np.abs(x).mean(0), jnp.float32), 0.5), np.float64)
    np.testing.assert_allclose(s / s[0], np.sqrt(np.abs(x).mean(0) / np.abs(x).mean(0)[0]), rtol=1e-4)
    scheme = Scheme("int4", 8)
    rounded = np.asarray(scheme.fake(jnp.asarray(w * s[:, None], jnp.float32)), np.float64)
    want = np.square((x / s) @ rounded - x @ w).sum()
    found = scaled_loss(
        jnp.asarray(s, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), [jnp.asarray(w, jnp.float32)], (scheme,)
    )
    assert float(found) == pytest.approx(want, rel=1e-3)


def far_out():
    """A matrix (32, 24) with some weights far out, and inputs (200, 32) that go together."""
    w, h = problem(32, 24, 4)
    w[np.random.default_rng(2).random(w.shape) < 0.03] *= 5
    return jnp.asarray(w, jnp.float32), np.asarray(h)


def output_errors(w, rounded, h):
    """|X dW|^2 of each output (O,)."""
    error = np.asarray(rounded, np.float64) - np.asarray(w, np.float64)
    return (error * (h @ error)).sum(0)


@pytest.mark.parametrize(
    "scheme", [Scheme("int4", 8), Scheme("int4", 8, False), Scheme("int3"), Scheme("nf4", 16)], ids=str
)
def test_clipped_ranges_never_raise_the_error_of_an_output_and_lower_it_where_weights_lie_far_out(scheme):
    w, h = far_out()
    scale, zero = clipped(w, jnp.asarray(h, jnp.float32), scheme)
    found = np.asarray(scheme.fake(w, scale, zero))
    before, after = output_errors(w, scheme.fake(w), h), output_errors(w, found, h)
    assert (after <= before * 1.0001).all()
    assert after.sum() < 0.93 * before.sum()
    np.testing.assert_array_equal(scheme.pack(w, scale, zero).astype(jnp.float32), found)
    # Inputs in another order are a control: what is chosen for them does this layer less good.
    other = np.random.default_rng(0).permutation(len(h))
    wrong = scheme.fake(w, *clipped(w, jnp.asarray(h[other][:, other], jnp.float32), scheme))
    assert output_errors(w, wrong, h).sum() > 1.1 * after.sum()


def test_clipped_ranges_are_the_best_of_those_tried():
    """Group by group, each with the others as they are, by trying all in float64."""
    (w, h), scheme = far_out(), Scheme("int4", 8)
    wanted = np.array(scheme.fake(w))
    scale, _ = clipped(w, jnp.asarray(h, jnp.float32), scheme)
    for first in range(0, len(w), 8):
        rows, tried = slice(first, first + 8), []
        for n in range(int(GRID * SHRINK)):
            tried.append(wanted.copy())
            tried[-1][rows] = scheme.fake(w[rows], *shrunk(w[rows], 1 - n / GRID, scheme))
        best = np.argmin([output_errors(w, one, h) for one in tried], 0)
        wanted = np.stack([tried[n][:, o] for o, n in enumerate(best)], 1)
        assert len(set(best)) > 2
    np.testing.assert_array_equal(scheme.fake(w, scale), wanted)


def test_zeros_of_a_pruned_model_are_not_filled_unawares(model):
    sparse = slm.prune(model, 0.5)
    few = {"group_size": 16, "embedding": False}
    symmetric = r"symmetric = false, int4: 50% of blocks/0/.* is zero.*symmetric=True"
    rotated = r"method = rotate, int4: 50% of blocks/0/.* is zero.*another method"
    for settings, said in (({"symmetric": False}, symmetric), ({"method": "hqq"}, symmetric),
                           ({"method": "rotate+gptq", "calibration": TOKENS}, rotated)):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            slm.quantize(sparse, "int4", **few, **settings)
    filled = slm.quantize(sparse, "int4", **few, symmetric=False, fill_zeros=True)
    kept = slm.quantize(sparse, "int4", **few)
    zeros = [float((dequantized(m.params)["blocks"]["0"]["mlp"]["up"]["kernel"] == 0).mean()) for m in (filled, kept)]
    assert zeros[0] < 0.2 < 0.5 <= zeros[1]
    slm.quantize(slm.dequantize(slm.quantize(model, "int4", **few)), "int4", **few, symmetric=False)  # not pruned


def test_smooth_inputs_lose_less_in_8_bits(spiky):
    schemes = {f"blocks/0/{path}/kernel": Scheme("int8") for path in MATRICES}
    smooth = smoothquant(spiky, schemes, TOKENS, 0.5, lambda done, all_: None)
    np.testing.assert_allclose(slm.logits(smooth, HELD_OUT), slm.logits(spiky, HELD_OUT), atol=2e-3)
    block, after = spiky.params["blocks"]["0"], smooth.params["blocks"]["0"]
    factors = np.asarray(block["mlp_norm"]["scale"] / after["mlp_norm"]["scale"])[0]
    # The first layer's inputs, watched, by the paper's equation 4.
    _, seen = spiky.transformer.watched(spiky.params, TOKENS, lambda path, module, inputs, output: (
        jnp.abs(inputs[0]).max((0, 1)) if path == "mlp/up" else None))  # fmt: skip
    largest = np.maximum(*(np.abs(np.asarray(block["mlp"][n]["kernel"][0])).max(1) for n in ("up", "gate")))
    np.testing.assert_allclose(factors, np.sqrt(np.asarray(seen[0]["mlp/up"]) / largest), rtol=1e-3)
    both = {"embedding": False, "activations": "int8", "calibration": TOKENS}
    plain, better = (slm.quantize(spiky, "int8", method=method, **both) for method in ("rtn", "smoothquant"))
    assert divergence(spiky, better) < 0.5 * divergence(spiky, plain)


@pytest.mark.parametrize("size", [1, 6, 24, 64])
def test_rotations_are_orthogonal_and_spread_what_is_large(size):
    Q = orthogonal(size)
    np.testing.assert_allclose(Q @ Q.T, np.eye(size), atol=1e-12)
    if size == 64:
        np.testing.assert_allclose(np.abs(Q), 1 / 8)


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"norm": "zero_centered_rmsnorm"}, {"residual": "parallel"}])
def test_a_rotated_model_is_the_same_function(changes):
    cfg = ModelConfig(
        **{"vocab_size": 64, "width": 24, "layers": 3, "heads": 4, "kv_heads": 2, "tied": False} | changes
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0.2, 0.5, a.shape), jnp.float32), shapes)
    before = LanguageModel(params, slm.Experiment(model=cfg), None)
    after = rotate(before)
    assert not after.config.model.tied
    assert not np.allclose(after.params["embed"]["embedding"], params["embed"]["embedding"], atol=0.1)
    want = np.asarray(slm.logits(before, TOKENS[:2, :32] % 64))
    np.testing.assert_allclose(slm.logits(after, TOKENS[:2, :32] % 64), want, atol=1e-4 * np.abs(want).max())


def test_rotation_takes_outliers_of_the_stream_away(model):
    loud = dict(model.params["embed"])
    loud["embedding"] = loud["embedding"] * jnp.ones(64).at[jnp.array([3, 17])].set(20.0)
    before = dataclasses.replace(model, params=model.params | {"embed": loud})

    def peak(one):
        return float(jnp.abs(one).max() / jnp.sqrt(jnp.square(one).mean()))

    assert peak(rotate(before).params["embed"]["embedding"]) < 0.5 * peak(loud["embedding"])


def test_a_wrong_feed_would_be_noticed(model, monkeypatch):
    """The table of what feeds what is checked on the model itself."""
    one = feeds(layers(model.config.model)[0], jax.tree.map(lambda a: a[0], model.params["blocks"]["0"]))
    assert [feed.source for feed in one] == ["attention_norm", "mlp_norm", "mixer/value", "mlp/up"]
    monkeypatch.setattr("slm.compress.folding.READERS", ("query", "key"))
    with pytest.raises(ConfigError, match=r"method = awq cannot change layers of softmax"):
        slm.quantize(model, "int4", embedding=False, method="awq", calibration=TOKENS)


def test_factors_of_shared_values_are_one_for_all_heads(model):
    layer, params = layers(model.config.model)[0], jax.tree.map(lambda a: a[0], model.params["blocks"]["0"])
    feed = feeds(layer, params)[2]
    factors = jnp.repeat(jnp.arange(1.0, 3.0), 32)  # two groups of two heads of 16
    folded = fold(layer, params, feed, factors)
    np.testing.assert_allclose(
        folded["mixer"]["value"]["kernel"][:, 16:], params["mixer"]["value"]["kernel"][:, 16:] / 2
    )
    np.testing.assert_allclose(folded["mixer"]["out"]["kernel"][32:], params["mixer"]["out"]["kernel"][32:] * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 24}, "group_size = 24 does not divide the 64 inputs of blocks/0/.*such as 16"),
        ({"method": "gptq"}, "method = gptq needs calibration"),
        ({"method": "gptq+awq"}, r"method = 'gptq\+awq': one of rtn, clip, gptq, hqq"),
        ({"method": "hqq", "symmetric": True}, "hqq chooses zero points"),
        ({"skip": ("nothing",)}, "quantize.skip = 'nothing' matches no matrix"),
        ({"method": "smoothquant", "calibration": TOKENS, "migration": 2.0}, "migration = 2.0"),
        ({"scheme": "int5"}, "scheme = 'int5'"),
        ({"scheme": None}, "give a scheme, or bits"),
        ({"budget_bits": 3.0}, "give a scheme, or bits"),
        ({"scheme": None, "budget_bits": 3.0}, "budget_bits needs calibration"),
        ({"scheme": None, "budget_bits": 1.0, "calibration": TOKENS}, "int2 already takes 2"),
    ],
)
def test_what_cannot_be_is_refused(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        slm.quantize(model, **{"scheme": "int4", "embedding": False} | settings)


def test_a_tied_embedding_needs_a_choice_and_quantized_models_are_not_quantized_again(model):
    tied = made("llama 3", model.tokenizer)
    with pytest.raises(ConfigError, match=r"quantize\.embedding: int4 with an embedding that is the head too"):
        slm.quantize(tied, "int4")
    small = slm.quantize(tied, "int8")
    assert is_quantized(small.params["embed"]["embedding"])
    with pytest.raises(ConfigError, match="for running only"):
        slm.quantize(small, "int8")
    with pytest.raises(ConfigError, match="rotate needs RMSNorm"):
        slm.quantize(made("gpt2", model.tokenizer), "int4", embedding=False, method="rotate")
