"""metrics.jsonl survives kills and resumes; trackers are optional and say what is missing."""

import json
import sys
import types

import pytest

from slm.config import LogConfig
from slm.errors import ConfigError, SlmError
from slm.training.metrics import History, read_rows, trackers


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_reach_the_file_at_once(tmp_path):
    history = History(tmp_path / "run" / "metrics.jsonl", 0)
    history.append({"step": 1, "loss": 2.5})
    assert rows_in(history.path) == [{"step": 1, "loss": 2.5}] == history.rows
    history.close()


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    history = History(path, 2)
    assert rows_in(path) == [{"step": 1}, {"step": 2}]
    history.append({"step": 3, "loss": 1.0})
    history.close()
    assert rows_in(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_start_drops_everything(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    history = History(path, 0)
    history.close()
    assert history.rows == []
    assert path.read_text() == ""


def test_only_the_writing_process_touches_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    other = History(path, 1, write=False)
    other.append({"step": 2})
    other.close()
    assert other.rows == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert read_rows(tmp_path / "missing.jsonl") == []


def test_numbers_that_json_lacks_become_null(tmp_path):
    history = History(tmp_path / "metrics.jsonl", 0)
    history.append({"step": 1, "bits_per_byte": float("nan"), "scale": float("inf")})
    history.close()
    assert rows_in(history.path) == [{"step": 1, "bits_per_byte": None, "scale": None}]


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(SlmError, match=r"metrics.jsonl, line 2, is not JSON"):
        History(path, 3)
    assert "rubbish" in path.read_text()


def test_an_unwritable_file_is_one_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(SlmError, match=r"metrics\.jsonl: Is a directory"):
        History(tmp_path / "metrics.jsonl", 0)


def test_no_trackers_by_default(tmp_path):
    assert trackers(LogConfig(), tmp_path, 0, {}) == []


@pytest.mark.parametrize(("cfg", "package"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": "p"}, "wandb")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, cfg, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}: .*slm\[track\]"):
        trackers(LogConfig(**cfg), tmp_path, 0, {})


def test_tensorboard_hides_what_will_be_made_again(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *values):
            calls.append(values)

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    (board,) = trackers(LogConfig(tensorboard=True), tmp_path, 5, {})
    board.write(6, {"loss": 1.5})
    board.close()
    assert calls == [(str(tmp_path / "tensorboard"), 6), ("loss", 1.5, 6), "closed"]


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    started = []

    def init(**settings):
        started.append(settings)
        return types.SimpleNamespace(log=lambda row, step: started.append((row, step)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        (run,) = trackers(LogConfig(wandb="project"), tmp_path, 0, {"seed": 1})
        run.write(1, {"loss": 2.0})
        run.close()
    first, row, second, _ = started
    assert first["id"] == second["id"]
    assert first["project"] == "project"
    assert first["config"] == {"seed": 1}
    assert row == ({"loss": 2.0}, 1)
