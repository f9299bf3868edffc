"""Looking into models: maps, influence, context, norms, against what can be computed otherwise."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slm
from slm.config import Experiment, MixerConfig, ModelConfig
from slm.errors import ConfigError, DataError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.mixers import layers, mixer
from slm.models.paths import flat
from slm.models.transformer import Transformer
from slm.study.inside import _streams, attention_map, effective_context, influence, norms

TEXT = np.random.default_rng(0).integers(0, 40, 12)


def made(attention, layers=2, **switches):
    cfg = ModelConfig(
        vocab_size=40, layers=layers, width=16, heads=2, kv_heads=1, attention=attention,
        mixer=MixerConfig(**switches),
    )  # fmt: skip
    params = Transformer(cfg).init(jax.random.key(0))
    # Larger than initial weights, so that attention is not flat.
    params = jax.tree.map(lambda a: 4 * a if a.ndim > 2 else a, params)
    return LanguageModel(params, Experiment(model=cfg), None)


def mixer_of(model, layer):
    """(a function from the inputs (T, D) of a mixer to its outputs, these inputs)."""
    kind, place = layers(model.config.model)[layer], layerwise.places(model.transformer)[layer]
    own = layerwise.layer_params(model.params, place)["mixer"]
    context = model.transformer.context(jnp.arange(len(TEXT))[None], None)
    here = context.replace(rope=context.local_rope if kind.local else context.rope, local_rope=None, layer=layer)
    module = mixer(kind.mechanism, kind.cfg, model.dtype)
    return lambda x: module.apply({"params": own}, x[None], here, None)[0][0], _streams(model, TEXT)[layer]["mixer"][0]


@pytest.mark.parametrize("attention", [("softmax",), ("gla",)])
def test_influence_is_the_norm_of_the_derivative(attention):
    model = made(attention)
    apply, x = mixer_of(model, 1)
    jacobian = np.asarray(jax.jacobian(apply)(x))  # (T, D, T, D)
    want = np.sqrt(np.square(jacobian).sum((1, 3)))
    want /= want.sum(1, keepdims=True)
    found = influence(model, TEXT, 1, probes=24)
    np.testing.assert_allclose(found, want, atol=0.08)
    assert not np.triu(found, 1).any()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_a_window_has_no_influence_from_beyond():
    found = influence(made(("window",), window=3), TEXT, 0)
    at = np.arange(len(TEXT))
    inside = (at[:, None] - at >= 0) & (at[:, None] - at < 3)
    assert not found[~inside].any()
    assert (found[inside] > 0).all()


@pytest.mark.parametrize("switches", [{}, {"window": 4}])
def test_a_map_makes_the_output_from_the_values(switches):
    model = made(("window",) if switches else ("softmax",), **switches)
    weights = attention_map(model, TEXT, 1)
    assert weights.shape == (2, 12, 12)
    apply, x = mixer_of(model, 1)
    leaves = flat(layerwise.layer_params(model.params, layerwise.places(model.transformer)[1]))
    values = x @ leaves["mixer/value/kernel"]  # one group, shared by both heads
    heads = np.concatenate([head @ values for head in weights], -1)
    np.testing.assert_allclose(heads @ leaves["mixer/out/kernel"], apply(x), atol=2e-5)


def test_context_beyond_a_window_changes_nothing():
    model = made(("window",), layers=1, window=8)
    text = np.random.default_rng(1).integers(0, 40, 80)
    enough, losses = effective_context(model, text, tolerance=1e-4)
    assert list(losses) == [1, 2, 4, 8, 16, 32]
    assert losses[8] == pytest.approx(losses[32], rel=1e-5)
    assert losses[4] != pytest.approx(losses[32], rel=1e-4)
    assert enough == min(context for context in losses if losses[context] <= losses[32] + 1e-4)
    with pytest.raises(DataError, match="too few"):
        effective_context(model, text, contexts=[100])


def test_norms_are_those_of_the_derivative():
    model = made(("softmax",))
    found = norms(model, TEXT)
    name = "blocks/0/mlp/up/kernel"
    assert list(found["stream"]) == [-1, 0, 1]
    leaf = flat(model.params)[name]

    def loss(leaf):
        params = slm.models.paths.nested(flat(model.params) | {name: leaf})
        log_p = jax.nn.log_softmax(
            model.transformer.answer(params, model.transformer.hidden(params, TEXT[None, :-1])[0], None)
        )
        return -jnp.take_along_axis(log_p[0], TEXT[1:, None], -1).mean()

    grad = np.asarray(jax.grad(loss)(leaf), np.float64)
    np.testing.assert_allclose(found["gradients"][name], np.sqrt(np.square(grad).sum((1, 2))), rtol=1e-4)
    np.testing.assert_allclose(found["weights"][name], np.sqrt(np.square(leaf).sum((1, 2))), rtol=1e-5)


def test_what_cannot_be_shown_is_said():
    with pytest.raises(ConfigError, match=r"see slm\.study\.influence"):
        attention_map(made(("gla",)), TEXT, 0)
    with pytest.raises(ConfigError, match="layer = 2: the model has layers 0 to 1"):
        influence(made(("gla",)), TEXT, 2)
    text = slm.study.overview(made(("gla",)))
    assert "embed/embedding" in text
    assert text.splitlines()[-1].startswith("all")
    assert repr(slm.study.browse(made(("gla",)))) == text


def test_treescope_where_it_is(monkeypatch):
    assert "treescope" in slm.study.browse(made(("gla",)))._repr_html_()
    monkeypatch.setitem(sys.modules, "treescope", None)
    assert slm.study.browse(made(("gla",)))._repr_html_() is None


def test_a_picture(tmp_path):
    figure = slm.study.draw_map(attention_map(made(("softmax",)), TEXT, 0)[0], [str(i) for i in TEXT], "layer 0")
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
