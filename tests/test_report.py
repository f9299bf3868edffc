"""Two models side by side: numbers that are those of the models, intervals that hold, no claim that is not measured."""

import json

import jax
import numpy as np
import pytest
from test_quantized import made

import slm
from slm.errors import ConfigError
from slm.evaluation.report import non_zero, paired_bootstrap, plot_sizes

TEXTS = ["some text to read " * 3 + str(i) for i in range(24)]


@pytest.fixture(scope="module")
def model():
    return made(vocab_size=320)


def test_a_smaller_model_beside_a_larger_one(model, tmp_path):
    small = slm.shrink(model, mlp_width=16, criterion="random")
    found = slm.compare(model, small, TEXTS, prompt_tokens=16, new_tokens=4, rounds=2)
    for one, m in ((found.first, model), (found.second, small)):
        count = sum(a.size for a in jax.tree.leaves(m.params))
        assert one.parameters == one.non_zero == count
        assert one.bytes_in_memory == 4 * count
        assert 4 * count < one.bytes_on_disk < 4 * count + 60_000  # the tokenizer and the config come along
        assert one.prefill > 0 < one.decode
    scores = [slm.evaluate(m, TEXTS)["bits_per_byte"] for m in (model, small)]
    assert found.difference == pytest.approx(scores[1] - scores[0], rel=1e-5)
    low, high = found.interval
    assert low < found.difference < high
    assert found.second.flops_per_token < found.first.flops_per_token
    found.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["second"]["parameters"] == found.second.parameters
    assert "parameters" in str(found)
    assert "bits per byte" in str(found)
    assert repr(found) == str(found)


def test_masks_are_called_what_they_are(model):
    sparse = slm.prune(model, 0.5)
    found = slm.compare(model, sparse, rounds=0, names=("dense", "half"))
    assert str(found).split("\n")[0].split() == ["dense", "half"]
    assert any(note.startswith("half: ") for note in found.notes)
    assert found.second.parameters == found.first.parameters
    assert found.second.non_zero < 0.8 * found.first.non_zero
    assert found.second.bytes_in_memory == found.first.bytes_in_memory
    assert any("no speed-up and no less memory" in note for note in found.notes)
    assert found.difference is None
    assert found.first.decode is None


def test_numbers_of_quantized_models(model):
    small = slm.quantize(model, "int4", embedding=True)
    found = slm.compare(model, small, TEXTS, rounds=0)
    assert found.second.bytes_in_memory < 0.3 * found.first.bytes_in_memory
    assert non_zero(small.params) > 0.8 * found.first.non_zero
    assert not any("multiplied like others" in note for note in found.notes)


def test_a_model_and_itself_are_a_tie(model):
    found = slm.compare(model, model, TEXTS, rounds=0)
    assert found.difference == 0
    assert found.interval == (0, 0)
    assert any("a tie" in note for note in found.notes)


def test_intervals_hold_as_often_as_they_say():
    """The true difference, of nats that two models share but for noise, is inside in 95 % of draws."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        bytes_ = rng.integers(50, 200, 40).astype(float)
        common = rng.normal(1.0, 0.3, 40) * bytes_
        first = common + rng.normal(0, 0.02, 40) * bytes_
        second = common + rng.normal(0.01, 0.02, 40) * bytes_
        _, (low, high) = paired_bootstrap(np.stack([first, bytes_], 1), np.stack([second, bytes_], 1))
        inside += low <= 0.01 / np.log(2) <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_pairs_must_be_pairs():
    one = np.ones((5, 2))
    with pytest.raises(ConfigError, match="scores cannot be paired"):
        paired_bootstrap(one, np.ones((4, 2)))


def test_a_plot_of_quality_against_size(model, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    found = slm.compare(model, slm.quantize(model, "int8"), TEXTS, rounds=0)
    plot_sizes([found.first, found.second], tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 5000
