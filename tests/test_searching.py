"""Searching: the best is found, what diverges is avoided, a second call proposes the same and trains nothing."""

import math

import pytest
from test_tuning import told
from tiny_run import tiny

import slm
from slm.errors import ConfigError
from slm.study import searching

SPACE = {"optim.learning_rate": (1e-4, 1e-1), "model.layers": (1, 4), "optim.name": ["adamw", "lion"]}


def loss(cfg):
    """Lowest, 2, at a rate of 3e-3 with 3 layers of adamw; none above 3e-2."""
    if cfg.optim.learning_rate > 3e-2:
        return None
    off = 0.1 * math.log2(cfg.optim.learning_rate / 3e-3) ** 2 + 0.3 * abs(cfg.model.layers - 3)
    return 2 + off + 0.5 * (cfg.optim.name == "lion")


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Arms of every call of ablate."""
    calls = []

    def ablate(base, grid, seeds, **how):
        calls.append({arm.name: dict(arm.changes) for arm in grid})
        return told(tmp_path, base, grid, range(seeds), loss)

    monkeypatch.setattr(searching, "ablate", ablate)
    return calls


def test_finds_the_best(tmp_path, asked):
    found = slm.study.search(tiny(tmp_path), SPACE, trials=40, at_once=4)
    assert [len(call) for call in asked] == [4] * 10
    assert found.best["optim.name"] == "adamw"
    assert found.best["model.layers"] == 3
    assert found.value == pytest.approx(loss(slm.override(tiny(tmp_path), found.best)))
    assert found.value < 2.1
    assert len(found.runs.arms) == 40
    rates = [arm["optim.learning_rate"] for call in asked for arm in call.values()]
    assert min(rates) >= 1e-4
    assert max(rates) <= 1e-1
    # The sampler learns: where runs diverge it looks less and less.
    assert sum(rate > 3e-2 for rate in rates[20:]) < sum(rate > 3e-2 for rate in rates[:20]) + 2
    again = list(asked)
    asked.clear()
    assert slm.study.search(tiny(tmp_path), SPACE, trials=40, at_once=4).best == found.best
    assert asked == again


def test_more_is_better_for_some_metrics(tmp_path, asked, monkeypatch):
    monkeypatch.setitem(searching.SHORT, "speed", "loss")
    monkeypatch.setattr(searching, "HIGHER_IS_BETTER", ("loss",))
    found = slm.study.search(tiny(tmp_path), {"model.layers": (1, 4)}, trials=12, metric="speed")
    assert found.best == {"model.layers": 1}


@pytest.mark.parametrize(("space", "says"), [
    ({"model.layers": (4, 1)}, r"model.layers = \(4, 1\)"),
    ({"model.layers": []}, r"give \(lowest, highest\), or a list"),
    ({"model.layer": (1, 2)}, "model.layers"),
])  # fmt: skip
def test_what_cannot_be_searched(tmp_path, asked, space, says):
    with pytest.raises(ConfigError, match=says):
        slm.study.search(tiny(tmp_path), space, trials=2)
    with pytest.raises(ConfigError, match="trials = 0"):
        slm.study.search(tiny(tmp_path), space, trials=0)


def test_nothing_but_divergences(tmp_path, asked):
    with pytest.raises(ConfigError, match="no trial of the search has a loss"):
        slm.study.search(tiny(tmp_path), {"optim.learning_rate": (0.05, 0.09)}, trials=3)
