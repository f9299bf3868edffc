"""Statistics of a model's inside, against a forward pass that is watched as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.compress.calibrate import calibration_tokens, gram, squares, sweep
from slm.config import Experiment, ModelConfig
from slm.errors import DataError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer


class Letters:
    def encode(self, text):
        return [ord(c) % 50 for c in text]


@pytest.fixture(scope="module")
def model():
    cfg = ModelConfig(vocab_size=50, layers=3, width=16, heads=4, kv_heads=2, attention=("window", "softmax"))
    return LanguageModel(Transformer(cfg).init(jax.random.key(0)), Experiment(model=cfg), Letters())


TOKENS = np.arange(6 * 12).reshape(6, 12) * 7 % 50


def test_statistics_of_unchanged_layers_are_those_of_the_whole_model(model):
    found = {}

    def keep(number, layer, stats):
        found[number] = stats
        return layer

    params = sweep(model, TOKENS, gram, keep)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, model.params))
    _, whole = model.transformer.watched(model.params, TOKENS, gram)
    assert set(found[0]) == {f"mixer/{n}" for n in ("query", "key", "value", "out")} | {
        f"mlp/{n}" for n in ("gate", "up", "down")
    }
    for number, one in enumerate(whole):
        for path, value in one.items():
            np.testing.assert_allclose(found[number][path], value, rtol=1e-4, atol=1e-4)
    sweep(model, TOKENS, squares, keep)
    for number, one in enumerate(whole):
        for path, value in one.items():
            np.testing.assert_allclose(found[number][path], jnp.diag(value), rtol=1e-4, atol=1e-4)


def test_later_layers_see_what_changed_layers_say(model):
    seen = {}

    def change(number, layer, stats):
        seen[number] = stats["mixer/query"]
        return jax.tree.map(jnp.zeros_like, layer) if number == 0 else layer

    before = model.params["blocks"]["0"]["mlp"]["down"]["kernel"].copy()
    params = sweep(model, TOKENS, squares, change)
    changed = LanguageModel(params, model.config, None)
    _, whole = changed.transformer.watched(params, TOKENS, squares)
    for number in (1, 2):
        np.testing.assert_allclose(seen[number], whole[number]["mixer/query"], rtol=1e-4)
    assert not np.any(params["blocks"]["0"]["mlp"]["down"]["kernel"][0])
    np.testing.assert_array_equal(model.params["blocks"]["0"]["mlp"]["down"]["kernel"], before)


def test_layers_are_found_where_they_lie(model):
    where = layerwise.places(model.transformer)
    assert [(p.group, p.number, p.index) for p in where] == [("blocks", "0", 0), ("blocks", "1", 0), ("tail", "0", 0)]


def test_text_becomes_windows_of_it(model):
    text = "abcdefghijklmnopqrstuvwxyz" * 4
    tokens = calibration_tokens(model, text, 5, 10)
    assert tokens.shape == (5, 10)
    joined = bytes(Letters().encode(text))
    assert all(bytes(row.tolist()) in joined for row in tokens)
    assert calibration_tokens(model, TOKENS, 4, 8).shape == (4, 8)
    with pytest.raises(DataError, match="104 tokens: give at least 200"):
        calibration_tokens(model, text, 1, 100)
