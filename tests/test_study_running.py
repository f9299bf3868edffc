"""Cells of a study: done once, found again, packed, isolated from each other's failures, resumed after a stop."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import TIMINGS, stop_at, tiny, use_devices

from slm.config import override, to_json
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
