"""Cells of a study: done once, found again, packed, isolated from each other's failures, resumed after a stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import TIMINGS, stop_at, tiny, use_devices

from slm.config import override, to_json
from slm.data.cache import locked
from slm.errors import ConfigError
from slm.study import packing, running
from slm.study.cells import RESULT, make_cells
from slm.study.running import Stopped, run_cells
from slm.training import loop


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


def cells_of(folder, arms, seeds=(0, 1), **changes):
    base = tiny(folder, {"train.log_every": 1} | {key.replace("__", "."): value for key, value in changes.items()})
    return make_cells({name: override(base, fields) for name, fields in arms.items()}, seeds, folder / "study")


RATES = {"slow": {"optim.learning_rate": 1e-3}, "fast": {"optim.learning_rate": 3e-3}}


def test_done_once_and_found_again(tmp_path, monkeypatch):
    cells = cells_of(tmp_path, RATES)
    assert run_cells(cells, show=False) == [[0, 1, 2, 3]]
    first = [cell.result() for cell in cells]
    assert {result["status"] for result in first} == {"done"}
    assert {result["packed"] for result in first} == {4}
    assert len({result["loss"] for result in first}) == 4
    for result in first:
        assert result["parameters"] > result["non_embedding"] > 0
        assert {"bits_per_byte", "training_loss", "state_bytes", "flops_per_token", "tokens"} <= result.keys()

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("slm.study.running.train_pack", never)
    monkeypatch.setattr(loop, "train", never)
    assert run_cells(cells_of(tmp_path, RATES), show=False) == []
    assert [cell.result() for cell in cells_of(tmp_path, RATES)] == first


def test_a_name_says_what_decides(tmp_path):
    (one,) = cells_of(tmp_path, {"x": {}}, (0,))
    same = cells_of(tmp_path, {"other name": {"log.console": True}}, (0,))[0]
    assert one.config.name == same.config.name
    others = cells_of(tmp_path, {"a": {"train.steps": 9}, "b": {"optim.b2": 0.9}}, (0,)) + cells_of(
        tmp_path, {"x": {}}, (1,)
    )
    (tmp_path / "text.txt").write_text("other text. " * 2000)
    others += cells_of(tmp_path, {"x": {}}, (0,))
    assert len({one.config.name, *(cell.config.name for cell in others)}) == 5
    # What it is scored on, when it counts as lost, and what it costs.
    more = {"x": {}, "all": {"train.evaluate_sequences": 0}, "max": {"train.max_loss": 50.0}}
    more["parts"] = {"model.scan": False}
    assert len({cell.config.name for cell in cells_of(tmp_path, more, (0,))}) == 4
    assert cells_of(tmp_path, {"x": {}}, np.arange(2)) == cells_of(tmp_path, {"x": {}})
    assert not cells_of(tmp_path, {"x": {"train.overwrite": True}}, (0,))[0].config.train.overwrite


def test_another_teacher_under_the_same_name_makes_another_cell(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "weights").write_bytes(bytes(200_000))

    def name():
        return cells_of(tmp_path, {"x": {"distill.teacher": str(teacher)}}, (0,))[0].config.name

    first = name()
    (teacher / "result.json").write_text("{}")  # what a study says of it
    assert name() == first
    (teacher / "weights").write_bytes(bytes(199_999) + b"1")
    assert name() != first


@pytest.mark.parametrize(("arms", "message"), [
    ({"a": {"optim.b2": 0.9}, "b": {"optim.b2": 0.9}}, "arms 'a' and 'b' have one and the same config"),
    ({"a": {"seed": 1}, "b": {"seed": 2}}, "differ only in seed, which .*seeds vary by seeds="),
    ({"a": {}, "b": {"train.log_every": 3}}, r"differ only in train\.log_every"),
])  # fmt: skip
def test_one_run_under_two_names_is_refused(tmp_path, arms, message):
    with pytest.raises(ConfigError, match=message):
        cells_of(tmp_path, arms)


def test_what_fails_is_a_row(tmp_path):
    arms = {
        "good": {"model.width": 16},
        "diverges": {"optim.learning_rate": 1e7, "optim.clip_norm": None, "model.layers": 1},
        "impossible": {"mesh.fsdp": 3},
    }
    cells = cells_of(tmp_path, arms, (0,))
    run_cells(cells, show=False)
    assert [cell.result()["status"] for cell in cells] == ["done", "diverged", "failed"]
    assert "step " in cells[1].result()["error"]
    assert "mesh" in cells[2].result()["error"]
    # What failed is tried again, what diverged would only diverge again.
    groups = run_cells(cells, show=False)
    assert groups == [[2]]


def test_an_error_of_any_kind_is_a_row_and_says_where(tmp_path, monkeypatch):
    cells = cells_of(tmp_path, {"wrong": {"model.width": 16}, "lost": {"model.width": 24}, "good": {}}, (0,))
    train = loop.train

    def train_or_not(cfg):
        if cfg.model.width == 16:
            {}["missing"]
        return train(cfg)

    monkeypatch.setattr(loop, "train", train_or_not)
    facts = {cells[1].config.name: {"bits_per_byte": None, "loss": 1.0}}  # NaN in a row is null
    monkeypatch.setattr(running, "measured", lambda cell, n: facts.get(cell.config.name, {"loss": 1.0}))
    run_cells(cells, show=False)
    wrong, lost, good = (cell.result() for cell in cells)
    assert wrong["status"] == "failed"
    assert wrong["error"].startswith("KeyError: 'missing' (test_study_running.py, line ")
    assert lost["status"] == "diverged"
    assert lost["error"] == "its last bits_per_byte is not a finite number"
    assert good["status"] == "done"


def test_the_arrays_of_a_pack_that_failed_are_gone_when_its_runs_train_alone(tmp_path, monkeypatch):
    alive = []

    class Arrays:
        pass

    def too_large(cfgs, show):
        arrays = Arrays()
        alive.append(weakref.ref(arrays))
        raise MemoryError("no room")

    def train(cfg):
        assert alive[0]() is None
        raise MemoryError("seen")

    monkeypatch.setattr(running, "train_pack", too_large)
    monkeypatch.setattr(loop, "train", train)
    cells = cells_of(tmp_path, RATES, (0,))
    run_cells(cells, show=False)
    assert [cell.result()["error"] for cell in cells] == ["MemoryError: seen"] * 2


def test_long_runs_train_alone_on_a_cpu(tmp_path, monkeypatch):
    short = [cell.config for cell in cells_of(tmp_path, RATES)]
    long = [cell.config for cell in cells_of(tmp_path, RATES, train__steps=10**7)]
    assert running._packs(long + short, None) == [[0], [1], [2], [3], [4, 5, 6, 7]]
    assert running._packs(long, 3) == [[0, 1, 2], [3]]
    monkeypatch.setattr(running.jax, "default_backend", lambda: "gpu")
    assert running._packs(long, None) == [[0, 1, 2, 3]]


def test_packing_in_words():
    assert running.packing_of([[0] * 4] * 2 + [[0] * 3] + [[0]] * 2) == "2 programs of 4 runs, 1 of 3, 2 runs alone"
    assert running.packing_of([[0]]) == "1 run alone"


def test_too_large_together_is_tried_alone(tmp_path, monkeypatch):
    def too_large(cfgs, show):
        raise MemoryError("no room")

    monkeypatch.setattr("slm.study.running.train_pack", too_large)
    cells = cells_of(tmp_path, RATES, (0,))
    run_cells(cells, show=False)
    assert [cell.result()["status"] for cell in cells] == ["done"] * 2


def test_a_stop_keeps_what_is_done(tmp_path, monkeypatch):
    whole = cells_of(tmp_path, RATES | {"narrow": {"model.width": 16}}, (0,))
    run_cells(whole, pack=1, show=False)
    want = [cell.history()[-1] for cell in whole]
    for cell in whole:
        (cell.folder / RESULT).unlink()
        subprocess.run(["rm", "-r", str(cell.folder)], check=True)
    stop_at(monkeypatch, 3)
    monkeypatch.setattr(packing, "StopRequest", loop.StopRequest)
    with pytest.raises(Stopped):
        run_cells(whole, show=False)
    stop_at(monkeypatch, None)
    monkeypatch.setattr(packing, "StopRequest", loop.StopRequest)
    run_cells(whole, show=False)
    for cell, row in zip(whole, want):
        last = cell.history()[-1]
        for name in row.keys() - TIMINGS:
            assert last[name] == (row[name] if isinstance(row[name], str) else pytest.approx(row[name], rel=2e-4)), name


def test_a_stop_at_the_end_of_a_run_is_for_what_follows(tmp_path, monkeypatch):
    cells = cells_of(tmp_path, {"a": {}, "b": {"model.width": 16}}, (0,))
    stop_at(monkeypatch, cells[0].config.train.steps)
    with pytest.raises(Stopped):
        run_cells(cells, show=False)
    assert cells[0].result()["status"] == "done"
    assert not cells[1].folder.exists()


def test_a_pool_that_is_told_to_end(tmp_path, monkeypatch):
    """SIGTERM, as a scheduler sends it: processes save and end, and nothing counts as failed."""
    monkeypatch.setenv("XLA_FLAGS", "")
    cells = cells_of(tmp_path, {"a": {}, "b": {"model.width": 16}}, (0,), train__steps=100_000, checkpoint__every=50)
    cells[0].finish("failed", error="of old")

    def end():
        until = time.time() + 120
        while not cells[0].history() and time.time() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end).start()
    with pytest.raises(Stopped):
        run_cells(cells, processes=1, show=False)
    assert [cell.result() for cell in cells] == [None, None]
    assert cells[0].history()[-1]["step"] < 100_000
    assert not cells[1].folder.exists()


def test_workers_end_with_the_process_that_wanted_their_work(tmp_path):
    """Even if that was killed: they save, and leave the machine to others."""
    (cell,) = cells_of(tmp_path, {"a": {}}, (0,), train__steps=100_000, checkpoint__every=50)
    row = {"arm": "a", "seed": 0, "config": json.loads(to_json(cell.config))}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    script = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'slm.study.running', sys.argv[1], str(os.getpid())])\n"
        "time.sleep(100)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "rows.json")]
    parent = subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": ""})
    until = time.time() + 120
    while not cell.history() and time.time() < until:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    with locked(cell.folder):  # waits for the worker
        assert 0 < cell.history()[-1]["step"] < 100_000
    assert cell.result() is None


def test_a_pack_that_the_kernel_kills_is_tried_one_by_one(tmp_path, monkeypatch):
    cells = cells_of(tmp_path, RATES, (0,))
    given = []

    class Killed:
        returncode = -9

        def __init__(self, command, **_):
            rows = json.loads(Path(command[-2]).read_text())
            given.append([row["arm"] for row in rows])
            if given[-1] == ["slow"]:
                self.returncode = 0
                cells[0].finish("done", loss=1.0, seconds=1.0)

        def communicate(self):
            return "", "Killed"

    monkeypatch.setattr(running.subprocess, "Popen", Killed)
    run_cells(cells, processes=1, show=False)
    assert given == [["slow", "fast"], ["slow"], ["fast"]]
    assert [cell.result()["status"] for cell in cells] == ["done", "failed"]
    assert cells[1].result()["error"] == "its process ended with exit code -9: Killed"


def test_workers_get_gpus_that_this_process_may_see(monkeypatch):
    gpus = [SimpleNamespace(id=i, platform="gpu") for i in range(2)]
    monkeypatch.setattr(running.jax, "local_devices", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [running._environment(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [running._environment(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4", "7"]


def test_killed_in_another_process_and_run_again(tmp_path, monkeypatch):
    """SIGKILL in the middle of a study: a second call ends it, and no step that was saved is done twice."""
    cells = cells_of(tmp_path, {"a": {}, "b": {"model.width": 16}}, (0,), train__steps=40, checkpoint__every=2)
    script = tmp_path / "study.py"
    rows = [{"arm": c.arm, "seed": c.seed, "config": json.loads(to_json(c.config))} for c in cells]
    script.write_text(
        "import json\nfrom slm.config import from_json\nfrom slm.study.cells import Cell\n"
        "from slm.study.running import run_cells\n"
        f"rows = json.loads({json.dumps(json.dumps(rows))})\n"
        "run_cells([Cell(r['arm'], r['seed'], from_json(json.dumps(r['config']))) for r in rows])\n"
    )
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, there and in the pool below
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ, stdout=subprocess.DEVNULL)
    metrics = cells[0].folder / "metrics.jsonl"
    until = time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 6) and time.time() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(cell.result() is None for cell in cells)
    run_cells(cells, processes=2, show=False)
    for cell in cells:
        assert cell.result()["status"] == "done"
        assert [row["step"] for row in cell.history()] == list(range(1, 41))
