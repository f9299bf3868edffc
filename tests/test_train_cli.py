"""train.py: every field from the command line, one clear error and exit code 2 for what is wrong, and dry runs."""

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tiny_run import tiny, use_devices

from slm.cli import parse, train_command
from slm.config import DataConfig, Experiment, ModelConfig, field_paths, to_json
from slm.errors import ConfigError
from slm.training.metrics import read_rows
from slm.training.run import latest_step

ROOT = Path(__file__).parent.parent
# Without optimisation XLA compiles in half the time.
ONE_DEVICE = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.fixture
def config(tmp_path):
    """A config file: the tiny experiment as JSON."""
    path = tmp_path / "config.json"
    path.write_text(to_json(tiny(tmp_path, {"model.attention": ("window", "softmax")})))
    return str(path)


def train_py(*arguments, timeout=240):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def test_fields_of_every_kind(config):
    cfg = parse(
        [
            config,
            *("--model.attention", "softmax"),
            *("--model.tied", "False"),
            *("--optim.clip-norm", "None"),
            *("--optim.learning_rate", "2e-4"),
            "--data.sequence-length=8",
            *("--model.kv-heads", "1"),
            *("--log.profile", "3", "4"),
            *("--name", "other"),
        ]
    ).experiment
    assert cfg.model.attention == ("softmax",)
    assert (cfg.model.tied, cfg.optim.clip_norm, cfg.optim.learning_rate) == (False, None, 2e-4)
    assert (cfg.data.sequence_length, cfg.model.kv_heads, cfg.log.profile, cfg.name) == (8, 1, (3, 4), "other")
    assert cfg.model.width == 32  # from the file
    two = parse([config, "--model.attention", "window", "softmax", "--dry-run", "--devices", "4"])
    assert two.experiment.model.attention == ("window", "softmax")
    assert (two.dry_run, two.devices) == (True, 4)
    small = ("--model.init-from", "runs/large", "--shrink.mlp-width", "8", "16", "--shrink.kv-heads", "1")
    shrink = parse([config, *small]).experiment.shrink
    assert (shrink.mlp_width, shrink.kv_heads) == ((8, 16), 1)


def test_a_python_config(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from slm.config import *\nconfig = Experiment(name='mine', train=TrainConfig(steps=3))\n")
    command = parse([str(file), "--train.batch-size", "2"])
    assert (command.experiment.name, command.experiment.train.steps, command.experiment.train.batch_size) == (
        "mine", 3, 2,
    )  # fmt: skip


def test_a_model_on_the_command_line_takes_the_place_of_the_configs(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from slm.config import *\nconfig = Experiment(model=ModelConfig(width=64, remat='full'),"
        "data=DataConfig(tokenizer='chars', sequence_length=32))\n"
    )
    cfg = parse([str(file), "--model.init-from", "runs/other"]).experiment
    assert (cfg.model.width, cfg.model.remat, cfg.model.init_from) == (ModelConfig().width, "full", "runs/other")
    assert (cfg.data.tokenizer, cfg.data.sequence_length) == (DataConfig().tokenizer, 32)
    assert parse([str(file), "--model.init-from=m", "--model.width", "8"]).experiment.model.width == 8


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    # Boxes and line breaks come from the width of the terminal.
    shown = re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))
    for path in field_paths():
        assert f"--{path.replace('_', '-')}" in shown, path
    for words in ("--dry-run", "--devices", "Peak learning rate.", "Copies of the model", "Configs here: configs/"):
        assert words in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optim.learning-rte", "1e-3"], "--optim.learning-rate"),
        (["--learning-rate", "1e-3"], "--optim.learning-rate"),
        (["--optim.learning-rate", "fast"], "'fast'"),
        (["--model.layers", "1.5"], "--model.layers"),
        (["--optim.name", "adam"], "adamw"),
        (["--train.steps"], "--train.steps"),
    ],
)
def test_unknown_and_ill_typed_fields_are_refused_with_the_nearest_name(config, capsys, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        train_command([config, *arguments])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["configs/quickstrat.py"], "no config file configs/quickstrat.py"),
        ([], "which config?"),
        (["{config}", "--model.heads", "3"], "model.width = 32 is not divisible by model.heads = 3"),
        (["{config}", "--train.accumulation", "3"], "train.accumulation = 3"),
        (["{config}", "--dry-run", "--data.tokenizer", "chars"], "set model.vocab_size"),
        (["{config}", "--dry-run", "--mesh.fsdp", "3", "--devices", "4"], "the 4 devices"),
        (["{config}", "--dry-run", "--devices", "0"], "--devices 0"),
        (["{config}", "--model.init-from", "nowhere"], "model.init_from = 'nowhere': no folder nowhere"),
        (
            ["{config}", "--distill.teacher", "nowhere", "--train.batch-size", "8"],
            "distill.teacher = 'nowhere': nowhere is not a run",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(config, capsys, arguments, expected):
    assert train_command([argument.format(config=config) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert expected in printed.err


def test_a_full_disk_anywhere_is_one_line(config, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("slm.training.loop.train", full)
    assert train_command([config]) == 2
    assert capsys.readouterr().err == "error: No space left on device: somewhere\n"


def test_bugs_keep_their_traceback(config, monkeypatch):
    def bug(*_):
        raise FileNotFoundError(2, "a bug", "somewhere")

    monkeypatch.setattr("slm.training.loop.train", bug)
    with pytest.raises(FileNotFoundError):
        train_command([config])


def test_training_from_the_command_line_is_safe_to_repeat(config, tmp_path, monkeypatch, capsys):
    use_devices(monkeypatch, 1)
    arguments = [config, "--train.steps", "2", "--log.console", "True"]
    assert train_command(arguments) == 0
    assert "step 2/2" in capsys.readouterr().out
    assert train_command(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_dry_run_prints_the_price_and_touches_nothing(config, tmp_path, capsys):
    arguments = ["--dry-run", "--devices", "4", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    # No text is read: the tokenizer's size is in its name.
    assert train_command([config, *arguments, "--data.source", "nowhere.txt", "--data.tokenizer", "bpe:512"]) == 0
    printed = capsys.readouterr().out
    parameters = 512 * 32 + 26_848  # embedding, and what does not depend on the vocabulary
    assert f"{parameters:,} parameters" in printed
    assert "data 1, fsdp 2, tensor 2 on 4" in printed
    assert re.search(r"memory +[\d.]+ [kM]B a device: arguments .* temporaries", printed)
    assert "FLOP a token" in printed
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()


def test_dry_run_of_a_large_model_in_a_fresh_process(tmp_path):
    """16 devices that do not exist and 1.3 billion parameters that are never made."""
    path = tmp_path / "config.json"
    path.write_text(to_json(Experiment()))
    size = {"layers": 24, "width": 2048, "heads": 16, "vocab-size": 49_152, "remat": "full"}
    arguments = [f"--model.{name}={value}" for name, value in size.items()]
    result = train_py(path, "--dry-run", "--devices=16", "--mesh.fsdp=16", *arguments)
    assert result.returncode == 0, result.stderr
    assert re.search(r"1,3\d\d,\d{3},\d{3} parameters", result.stdout)
    assert "fsdp 16" in result.stdout
    # Parameters and two moments, float32, in 16 shares: 1.31e9 * 12 / 16 bytes.
    assert re.search(r"arguments 98\d MB", result.stdout)


def test_sigterm_from_outside_saves_and_leaves_with_zero(tmp_path):
    cfg = tiny(tmp_path, {"train.steps": 100_000, "log.console": True, "checkpoint.every": 0})
    config = tmp_path / "config.json"
    config.write_text(to_json(cfg))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), str(config)],
        cwd=ROOT, env=ONE_DEVICE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "run the same command again to resume" in out
    assert "Traceback" not in err
    step = latest_step(cfg.run_dir)
    assert step > 0
    assert step - cfg.train.log_every < read_rows(cfg.run_dir / "metrics.jsonl")[-1]["step"] <= step


def test_a_truncated_checkpoint_is_one_line_in_a_fresh_process(config, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    assert train_command([config]) == 0
    (data,) = (tmp_path / "runs" / "run" / "checkpoints" / "8" / "state" / "d").iterdir()
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    result = train_py(config, "--train.steps=12")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "checkpoints/8 is damaged" in result.stderr


def test_a_forgotten_config_lists_those_that_are_here():
    with pytest.raises(ConfigError, match=r"which config\? .*Configs here: configs/"):
        parse(["--train.steps", "3"])


def test_warnings_are_one_line(config, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("slm.training.loop.train", lambda cfg: None)
    assert train_command([config]) == 0
    assert warnings.formatwarning(UserWarning("odd but possible"), UserWarning, "x.py", 1) == (
        "warning: odd but possible\n"
    )
