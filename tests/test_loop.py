"""Cadence, order, divergence, signals, and refusals before anything is touched."""

import dataclasses
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import stop_at, tiny, use_devices

from slm.config import override
from slm.errors import CheckpointError, ConfigError, DataError, DivergenceError, SlmError
from slm.training import loop
from slm.training.checkpoint import Checkpoints
from slm.training.loop import train
from slm.training.metrics import History, read_rows
from slm.training.precision import STUCK_AFTER
from slm.training.progress import Progress, si
from slm.training.recorder import Recorder, due
from slm.training.run import latest_step
from slm.training.signals import StopRequest


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.mark.parametrize(
    ("every", "last", "expected"),
    [(4, 8, [4, 8]), (3, 8, [3, 6, 8]), (0, 8, [8]), (100, 8, [8]), (1, 3, [1, 2, 3]), (7, 1, [1])],
)
def test_due_always_fires_at_the_end_and_never_at_0(every, last, expected):
    assert [step for step in range(last + 1) if due(step, every, last)] == expected


def test_a_run_leaves_everything_behind_in_order(tmp_path, monkeypatch):
    """6 updates, evaluations every 4 and saves every 5: the last step is evaluated and saved although none divides."""
    order = []
    save = Checkpoints.save

    def watching(self, state, step, meta, metrics):
        order.append(("save", step, meta["tokens"], "loss" in metrics))
        return save(self, state, step, meta, metrics)

    monkeypatch.setattr(Checkpoints, "save", watching)
    append = History.append
    monkeypatch.setattr(History, "append", lambda self, row: (order.append(("row", row["step"])), append(self, row)))
    cfg = tiny(tmp_path, {"train.steps": 6, "train.log_every": 4, "checkpoint.every": 5, "checkpoint.keep": 9})
    run = train(cfg)

    tokens = 6 * 4 * 16
    assert order == [("row", 4), ("save", 5, tokens * 5 / 6, False), ("row", 6), ("save", 6, tokens, True)]
    assert run.finished
    assert sorted(path.name for path in run.dir.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "plan.json", "tokenizer.json",
    ]  # fmt: skip
    assert run.history == read_rows(run.dir / "metrics.jsonl")
    for row in run.history:
        assert row.keys() > {"step", "tokens", "loss", "accuracy", "grad_norm", "learning_rate", "tokens_per_second"}
        assert row.keys() > {"validation_loss", "validation_bits_per_byte", "validation_bits_per_byte_stderr"}
    assert run.history[-1]["tokens"] == tokens
    assert abs(run.history[0]["loss"] - math.log(257)) < 0.5
    stored = json.loads((run.dir / "config.json").read_text())
    assert stored["model"]["vocab_size"] == 257
    assert stored["train"]["steps"] == 6


def test_without_held_out_text_it_trains_and_says_nothing_of_validation(tmp_path):
    run = train(tiny(tmp_path, {"data.validation_fraction": 0.0}))
    assert [row["step"] for row in run.history] == [2, 4, 6, 8]
    assert not any(name.startswith("validation") for row in run.history for name in row)


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    changes = {"optim.learning_rate": 1e6, "optim.clip_norm": None, "checkpoint.every": 1, "train.log_every": 1}
    cfg = tiny(tmp_path, changes | {"optim.warmup_steps": 0, "train.steps": 50, "model.mixer.qk_norm": "none"})
    with pytest.raises(DivergenceError, match=r"step \d+: .* The last good checkpoint, step \d+, .*learning_rate"):
        train(cfg)
    kept = latest_step(cfg.run_dir)
    checkpoints = Checkpoints(cfg.run_dir / "checkpoints", cfg.checkpoint, read_only=True)
    params = checkpoints.restore_parts(("params",), kept)["params"]
    checkpoints.close()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_state_with_a_nan_is_never_saved(tmp_path, monkeypatch):
    """The loss of a step is computed before its update, so a broken update shows in the state first."""
    make_plan = loop.make_plan

    def broken(cfg, program):
        plan = make_plan(cfg, program)

        def step(state, batch):
            state, metrics = plan.compiled(state, batch)
            if int(state.step) == 8:
                state = state.replace(params=jax.tree.map(lambda a: a * jnp.nan, state.params))
            return state, metrics

        return dataclasses.replace(plan, compiled=step)

    monkeypatch.setattr(loop, "make_plan", broken)
    monkeypatch.setattr(loop, "_evaluator", lambda *_: lambda state: {})
    cfg = tiny(tmp_path)
    with pytest.raises(DivergenceError, match=r"step 8: the parameters .* last good checkpoint, step 4"):
        train(cfg)
    assert latest_step(cfg.run_dir) == 4


class Silent:
    """Stands in for the progress display and for a tracker."""

    def __init__(self):
        self.rows = []

    def step(self, step): ...

    def row(self, row):
        self.rows.append(row)

    def write(self, step, row):
        self.rows.append(row)


def recorder(tmp_path, **train_fields):
    cfg = override(tiny(tmp_path), {f"train.{name}": value for name, value in train_fields.items()})
    silent = Silent()
    history = History(tmp_path / "metrics.jsonl", 0)
    return Recorder(cfg.train, 5.0, 10.0, 1e9, (100.0, 3.0), history, [silent], silent), history


def metrics(loss=1.0, **more):
    return {name: np.float32(value) for name, value in ({"loss": loss, "tokens": 10.0} | more).items()}


def test_rows_are_written_late_and_only_when_due(tmp_path):
    record, history = recorder(tmp_path, steps=8, log_every=2, evaluate_every=4)
    for step in range(1, 6):
        record.push(step, metrics(loss=step / 10))
        record.settle(step - 2)
    assert [row["step"] for row in history.rows] == [2]
    record.settle(5)
    assert [row["step"] for row in history.rows] == [2]  # 4 waits for its evaluation
    record.evaluated(4, {"loss": 0.5, "stderr_clustered_by": "window", "loss_stderr": None})
    row = history.rows[-1]
    assert (row["step"], row["tokens"], row["validation_loss"]) == (4, 140.0, 0.5)
    assert row["loss"] == pytest.approx(0.4)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 10 / 1e9)
    assert record.tokens == 150.0


def test_pauses_do_not_count_as_training_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("slm.training.recorder.time.perf_counter", lambda: now[0])
    record, history = recorder(tmp_path, log_every=1, evaluate_every=0)
    now[0] = 2.0
    with record.pause():
        now[0] = 60.0
    now[0] = 63.0
    record.push(1, metrics())
    record.settle(1)
    assert history.rows[0]["tokens_per_second"] == pytest.approx(10 / 5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (metrics(math.nan), "step 1: the loss is nan"),
        (metrics(math.inf), "step 1: the loss is inf"),
        (metrics(5.5), r"step 1: the loss 5.5 is above train.max_loss = 5"),
        (metrics(1.0, skipped_in_a_row=STUCK_AFTER), "step 1: float16 gradients overflowed in the last"),
    ],
)
def test_divergence_is_seen_at_any_step(tmp_path, bad, message):
    record, _ = recorder(tmp_path, log_every=100)
    record.push(1, bad)
    with pytest.raises(DivergenceError, match=message):
        record.settle(1)


def test_a_skipped_float16_step_is_not_a_divergence(tmp_path):
    record, _ = recorder(tmp_path, log_every=100)
    record.push(1, metrics(math.inf, skipped_in_a_row=1.0))
    record.settle(1)


def test_a_second_interrupt_does_not_wait():
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell started the tests in the background
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed(3, 10)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_twice_is_like_once():
    with StopRequest() as stop:
        assert not stop.agreed(3, 10)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed(3, 10)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 3, signal.SIGINT)
    monkeypatch.setenv("COLUMNS", "140")  # pytest-xdist's workers claim 80, which would fold the names
    cfg = tiny(tmp_path, {"log.console": True})
    run = train(cfg)
    assert not run.finished
    assert latest_step(cfg.run_dir) == 3
    printed = capsys.readouterr().out
    assert "SIGINT: at step 3" in printed
    assert "run the same command again to resume" in printed
    # The tables before step 0.
    for expected in ("parameters", "blocks/0/mixer/query/kernel", "adamw", "FLOP", "a device", "mesh", "compiled"):
        assert expected in printed


def test_stopped_at_step_0_nothing_is_said_to_be_saved(tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 0)
    monkeypatch.setenv("COLUMNS", "140")
    cfg = tiny(tmp_path, {"log.console": True})
    assert not train(cfg).finished
    assert latest_step(cfg.run_dir) is None
    printed = capsys.readouterr().out
    assert "nothing was saved" in printed
    assert "stopped and saved" not in printed


def test_checkpoints_without_a_config_are_left_alone(tmp_path):
    cfg = tiny(tmp_path)
    (cfg.run_dir / "checkpoints" / "4").mkdir(parents=True)
    (cfg.run_dir / "tokenizer.json").write_text("theirs")
    with pytest.raises(CheckpointError, match=r"has checkpoints but no config\.json.*copy config\.json back"):
        train(cfg)
    assert (cfg.run_dir / "tokenizer.json").read_text() == "theirs"


def test_a_failed_save_does_not_hide_a_divergence():
    class Failing:
        folder = "folder"

        def wait(self):
            raise CheckpointError("the disk is full")

        def latest(self):
            return 4

    advice = loop._advice(Failing())
    assert "last good checkpoint, step 4" in advice
    assert advice.endswith("Besides, the disk is full")


def test_a_quiet_run_prints_nothing(tmp_path, capsys):
    train(tiny(tmp_path))
    assert capsys.readouterr().out == ""


def test_profile_writes_a_trace(tmp_path):
    run = train(tiny(tmp_path, {"log.profile": (3, 4)}))
    assert list((run.dir / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mesh.tensor": 3}, ConfigError, "mesh.tensor = 3"),
        ({"data.source": ("missing.txt",)}, DataError, "missing.txt"),
        ({"model.vocab_size": 100}, ConfigError, "vocab"),
        ({"train.batch_size": 4000}, DataError, "fewer than one batch"),
        ({"model.attention": ("softmaxx",)}, ConfigError, "did you mean softmax"),
        (
            {"model.attention": ("dsa",), "train.precision": "float16"},
            ConfigError,
            "dsa layers have a loss of their own",
        ),
        ({"train.batch_size": 6, "train.accumulation": 4}, ConfigError, "train.accumulation"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, error, message):
    cfg = tiny(tmp_path, changes)
    with pytest.raises(error, match=message):
        train(cfg)
    assert not cfg.run_dir.exists()


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(DataError, match=r"text\.txt"):
        train(tiny(tmp_path))


def test_an_unwritable_run_folder_is_one_clear_error(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(SlmError, match="cannot write the run folder"):
        train(tiny(tmp_path))


def test_plain_lines_where_no_terminal_listens(capsys):
    with Progress(True, 0, 100) as progress:
        progress.step(9)
        progress.row(
            {"step": 10, "loss": 2.0, "tokens_per_second": 1234.5, "mfu": 0.25, "validation_bits_per_byte": 1.5}
        )
    line = capsys.readouterr().out
    assert line.startswith("step 10/100  loss 2.0000  1.23 k tokens/s  MFU 25.0%  bits/byte 1.5000  ETA ")
    assert line.count("\n") == 1
    with Progress(True, 0, 100) as progress:
        progress.row({"step": 10, "loss": 2.0, "tokens_per_second": 136.2})
    assert "  136 tokens/s" in capsys.readouterr().out


def test_si():
    assert [si(x) for x in (0, 999, 1000, 12_345, 3.2e9)] == ["0 ", "999 ", "1 k", "12.3 k", "3.2 G"]
