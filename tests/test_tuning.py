"""Values chosen for each variant, basins over several seeds, transfer between sizes; budgets in tokens and seconds."""

import math
from types import SimpleNamespace

import pytest
from tiny_run import tiny, use_devices

import slm
from slm.config import override
from slm.errors import ConfigError, DivergenceError
from slm.study import budget, tuning, watching
from slm.study.cells import Cell
from slm.study.study import Study

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]


def told(folder, base, grid, seeds, loss):
    """A study whose losses are what `loss(config)` says; None: diverged."""
    cells = []
    for name, cfg in slm.study.configs(base, grid).items():
        for seed in seeds:
            one = override(cfg, {"name": f"{name} {seed}".replace("/", "-"), "dir": str(folder), "seed": seed})
            value = loss(one)
            cells.append(Cell(name, seed, one))
            facts = {"error": "step 3"} if value is None else {"loss": value, "parameters": one.model.width**2}
            cells[-1].finish("diverged" if value is None else "done", **facts)
    return Study(cells, cells[0].arm)


def bowl(best):
    return lambda cfg: 2 + 0.1 * math.log2(cfg.optim.learning_rate / best(cfg)) ** 2 + 0.001 * (-1) ** cfg.seed


def test_each_variant_gets_its_own_value(tmp_path, monkeypatch):
    rates = {"adamw": 4e-3, "lion": 1e-3, "muon": 8e-3}
    called = {}

    def ablate(base, grid, seeds, **how):
        called.update(how, seeds=tuple(seeds))
        return told(tmp_path, base, grid, seeds, bowl(lambda cfg: rates[cfg.optim.name]))

    monkeypatch.setattr(tuning, "ablate", ablate)
    base = tiny(tmp_path)
    best, found = slm.study.tune(base, {"optim.name": list(rates)}, RATES, tokens=100, folder="here")
    assert called == {"tokens": 100, "folder": "here", "seeds": (tuning.TUNING_SEED,)}
    assert {arm.name: arm.changes["optim.learning_rate"] for arm in best} == rates
    assert [arm.changes["optim.name"] for arm in best] == list(rates)
    assert {name: basin.at_edge for name, basin in found.items()} == {"adamw": False, "lion": True, "muon": False}
    assert found["adamw"].best == pytest.approx(4e-3)


def test_basins_over_seeds(tmp_path):
    def loss(cfg):
        return None if cfg.optim.learning_rate > 1e-2 and cfg.seed == 1 else bowl(lambda _: 3e-3)(cfg)

    grid = slm.study.grid({"optim.learning_rate": RATES})
    study = told(tmp_path, tiny(tmp_path), grid, (0, 1), loss)
    ((basin, losses),) = slm.study.basins(study).values()
    assert basin.best == pytest.approx(3e-3, rel=1e-6)
    assert losses[RATES[-1]] == math.inf  # one seed of two diverged
    assert losses[RATES[1]] == pytest.approx(2 + 0.1 * math.log2(1.5) ** 2)
    few = slm.study.grid({"model.width": [32, 64], "optim.learning_rate": RATES[:2]})
    few += slm.study.grid({"model.width": [32], "optim.learning_rate": RATES[2:]})
    study = told(tmp_path / "few", tiny(tmp_path), few, (0,), bowl(lambda _: 3e-3))
    with pytest.raises(ConfigError, match=r"width=64: 2 learning rates"):
        slm.study.basins(study)


@pytest.mark.parametrize("power", [0.0, -1.0])
def test_transfer_finds_the_power(tmp_path, power):
    grid = slm.study.grid({"model.width": [16, 32, 64], "optim.learning_rate": RATES})
    study = told(tmp_path, tiny(tmp_path), grid, (0, 1), bowl(lambda cfg: 8e-3 * (cfg.model.width / 16) ** power))
    found = slm.study.transfer(study)
    assert found.drift == pytest.approx(power, abs=1e-6)
    assert found.sizes == (16, 32, 64)
    # Two powers of two off, on a bowl of 0.1 times the square; and nothing if it transfers.
    assert found.loss == pytest.approx(0.4 if power else 0, abs=1e-6)
    assert slm.study.transfer(study, size="parameters").drift == pytest.approx(power / 2, abs=1e-6)
    assert not found.at_edge
    with pytest.raises(ConfigError, match="a field that is a number"):
        slm.study.transfer(study, size="optim.name")


def test_equal_tokens_whatever_the_batches(tmp_path, monkeypatch):
    seen = {}

    def make_cells(found, seeds, folder):
        seen.update({name: cfg.train for name, cfg in found.items()})
        return [Cell(name, 0, cfg) for name, cfg in found.items()]

    monkeypatch.setattr("slm.study.study.make_cells", make_cells)
    monkeypatch.setattr("slm.study.study.run_cells", lambda *_: [])
    base = tiny(tmp_path)
    length = base.data.sequence_length
    slm.study.ablate(base, {"train.batch_size": [4, 8]}, seeds=1, tokens=40 * 4 * length, show=False)
    assert [train.steps for train in seen.values()] == [40, 20]
    with pytest.raises(ConfigError, match="tokens and seconds"):
        slm.study.ablate(base, {"train.batch_size": [4, 8]}, tokens=1, seconds=1)
    with pytest.raises(ConfigError, match=r"an arm sets train\.steps, and so do tokens="):
        slm.study.ablate(base, {"train.steps": [4, 8]}, tokens=1e4)
    with pytest.raises(ConfigError, match="tokens = 0"):
        slm.study.ablate(base, {"train.batch_size": [4]}, tokens=0)


def test_equal_seconds(tmp_path, monkeypatch):
    speeds = {"softmax": 10.0, "gla": 4.0}
    calls = []

    def speed(cfg):
        calls.append(cfg.model.attention[0])
        return speeds[calls[-1]]

    monkeypatch.setattr(budget, "steps_per_second", speed)
    arms = slm.study.configs(tiny(tmp_path), {"model.attention": ["softmax", "gla"]})
    for _ in range(2):
        found = budget.with_seconds(arms, 30, tmp_path / "study")
        assert {name: cfg.train.steps for name, cfg in found.items()} == {"softmax": 300, "gla": 120}
    # Asked once; another rate or seed is no slower.
    budget.with_seconds({"x": override(arms["gla"], {"train.steps": 7, "seed": 9})}, 1, tmp_path / "study")
    budget.with_seconds({"x": override(arms["gla"], {"optim.learning_rate": 9e-3})}, 1, tmp_path / "study")
    assert calls == ["softmax", "gla"]


def test_an_arm_that_diverges_in_its_trial_is_left_to_the_study(tmp_path, monkeypatch):
    def speed(cfg):
        if cfg.model.width == 16:
            raise DivergenceError("step 3: the loss is nan")
        return 5.0

    monkeypatch.setattr(budget, "steps_per_second", speed)
    arms = slm.study.configs(tiny(tmp_path), {"model.width": [16, 32]})
    found = budget.with_seconds(arms, 30, tmp_path / "study")
    assert [cfg.train.steps for cfg in found.values()] == [budget.TRIAL_STEPS, 150]


def test_a_trial_tells_a_speed(tmp_path, monkeypatch):
    """In steps, however few of the targets are scored."""
    use_devices(monkeypatch, 1)
    cfg = tiny(tmp_path)
    assert budget.steps_per_second(cfg) > 0
    assert not cfg.run_dir.exists()
    rows = [{"step": 5 * i, "tokens": 20.0 * i, "tokens_per_second": 12.0} for i in range(1, 9)]
    run = SimpleNamespace(history=rows, finished=True)
    monkeypatch.setattr("slm.training.loop.train", lambda cfg: run)
    assert budget.steps_per_second(cfg) == 3.0  # four targets a step
    run.finished = False
    with pytest.raises(KeyboardInterrupt):
        budget.steps_per_second(cfg)


def test_what_is_left_is_told_by_steps(tmp_path, capsys, monkeypatch):
    cells = [
        Cell(f"arm {i}", 0, override(tiny(tmp_path), {"name": str(i), "train.steps": 100, "dir": str(tmp_path / "c")}))
        for i in range(3)
    ]
    clock = [1000.0]
    monkeypatch.setattr(watching.time, "time", lambda: clock[0])
    with watching.watched(cells, 2, show=True) as said:
        clock[0] += 60
        cells[0].finish("done")
        cells[1].config.run_dir.mkdir(parents=True)
        (cells[1].config.run_dir / "metrics.jsonl").write_text('{"step": 40}\n{"step": 50}\n')
        said("arm 0: done")
    # 150 steps of 300 in a minute.
    assert capsys.readouterr().out.splitlines() == ["2 of 5 runs are done already", "[1/3] arm 0: done; 60 s left"]
