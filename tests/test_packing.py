"""Runs that train together are the runs that they would be alone: rows, checkpoints, resumption, divergence."""

import json

import jax
import numpy as np
import pytest
from tiny_run import stop_at, tiny, use_devices

import slm
from slm.config import override
from slm.study import packing
from slm.study.packing import packs, train_pack
from slm.training import loop
from slm.training.loop import train

ARMS = {
    "a": {"seed": 1},
    "b": {"seed": 2},
    "c": {"seed": 1, "optim.learning_rate": 1e-3},
    "d": {"seed": 1, "optim.weight_decay": 0.5, "optim.b2": 0.9},
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


def arms(folder, extra=None, names=ARMS):
    return [tiny(folder, {"name": name, "train.log_every": 1} | ARMS[name] | (extra or {})) for name in names]


def rows(cfg):
    lines = (cfg.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def assert_same_run(one, other):
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            want = theirs[name] if isinstance(theirs[name], str) else pytest.approx(theirs[name], rel=2e-4)
            assert mine[name] == want, (name, mine["step"])
    a, b = (slm.load(cfg.run_dir).params for cfg in (one, other))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), a, b)


def test_together_as_alone(tmp_path):
    alone = [override(cfg, {"name": f"{cfg.name}_alone"}) for cfg in arms(tmp_path)]
    for cfg in alone:
        train(cfg)
    together = arms(tmp_path)
    assert packs(together) == [[0, 1, 2, 3]]
    outcomes = train_pack(together)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert all(outcome.run.finished for outcome in outcomes)
    for one, other in zip(together, alone):
        assert_same_run(one, other)
    ends = [rows(cfg)[-1]["loss"] for cfg in together]
    assert len(set(ends)) == 4  # none is a copy of another


def test_students_of_one_teacher(tmp_path):
    teacher = train(
        tiny(tmp_path, {"name": "teacher", "model.width": 48, "train.steps": 30, "train.evaluate_every": 0})
    )
    distil = {"distill.teacher": str(teacher.dir), "distill.loss": "jsd"}
    together = [
        tiny(tmp_path, {"name": f"t{number}", "train.log_every": 1} | distil | changes)
        for number, changes in enumerate(({}, {"distill.temperature": 3.0}, {"distill.alpha": 0.2, "seed": 1}))
    ]
    assert packs(together) == [[0, 1, 2]]
    for other in ({"distill.hidden": 0.1}, {"distill.alpha_end": 0.0}, {"distill.temperature_end": 2.0}):
        assert packs([together[0], override(together[1], other)]) == [[0], [1]], other
    alone = [override(cfg, {"name": f"{cfg.name}_alone"}) for cfg in together]
    for cfg in alone:
        train(cfg)
    assert all(outcome.run.finished for outcome in train_pack(together))
    for one, other in zip(together, alone):
        assert_same_run(one, other)
    assert len({rows(cfg)[-1]["divergence"] for cfg in together}) == 3


def test_resumed_together_or_alone(tmp_path, monkeypatch):
    whole = [override(cfg, {"name": f"{cfg.name}_whole"}) for cfg in arms(tmp_path, names="ab")]
    train_pack(whole)
    parts = arms(tmp_path, names="ab")
    stop_at(monkeypatch, 5)
    monkeypatch.setattr(packing, "StopRequest", loop.StopRequest)
    assert not any(outcome.run.finished for outcome in train_pack(parts))
    stop_at(monkeypatch, None)
    monkeypatch.setattr(packing, "StopRequest", loop.StopRequest)
    assert train(parts[0]).finished  # alone
    assert all(outcome.run.finished for outcome in train_pack(parts))  # of the first nothing is left to do
    for one, other in zip(parts, whole):
        assert_same_run(one, other)


def test_runs_that_a_kill_left_at_different_steps(tmp_path, monkeypatch):
    def stop(step):
        stop_at(monkeypatch, step)
        monkeypatch.setattr(packing, "StopRequest", loop.StopRequest)

    whole = [override(cfg, {"name": f"{cfg.name}_whole"}) for cfg in arms(tmp_path, names="ab")]
    train_pack(whole)
    parts = arms(tmp_path, names="ab")
    stop(5)
    train_pack(parts[:1])
    stop(7)
    assert not any(outcome.run.finished for outcome in train_pack(parts))  # b from 0 to 7; a, at 5, must wait
    assert [rows(cfg)[-1]["step"] for cfg in parts] == [5, 7]
    stop(None)
    assert all(outcome.run.finished for outcome in train_pack(parts))
    for one, other in zip(parts, whole):
        assert_same_run(one, other)


def test_a_divergence_ends_one_run(tmp_path):
    cfgs = arms(tmp_path, names="ab")
    cfgs[1] = override(cfgs[1], {"optim.learning_rate": 1e6, "optim.clip_norm": None})
    good, bad = train_pack(cfgs)
    assert good.error is None
    assert good.run.finished
    assert "step " in bad.error
    assert not bad.run.finished


@pytest.mark.parametrize("changes", [
    {"model.width": 64}, {"optim.name": "lion"}, {"train.steps": 9}, {"prune.sparsity": 0.5},
    {"data.sequence_length": 8},
])  # fmt: skip
def test_what_differs_more_trains_apart(tmp_path, changes):
    a, b = arms(tmp_path, names="ab")
    assert packs([a, override(b, changes), b]) == [[0, 2], [1]]
    assert packs([a, b, a, b, a], most=2) == [[0, 1], [2, 3], [4]]
    seen = [override(one, {"log.tensorboard": True}) for one in (a, b)]
    assert packs([a, *seen]) == [[0], [1], [2]]  # a pack has no trackers


def test_lanes_spread_over_devices(tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    together = arms(tmp_path)
    outcomes = train_pack(together)
    assert jax.local_device_count() >= 4
    assert all(outcome.run.finished for outcome in outcomes)
