"""k steps + stop + k steps = 2k steps, bit for bit, whatever the mesh, the save interval and the number of stops."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kills import kill_until
from tiny_run import curve, stop_at, tiny, use_devices

import slm.training.run as runs
from slm.compress.schemes import Scheme
from slm.config import CheckpointConfig, Experiment, override, to_json
from slm.errors import CheckpointError, ConfigError, DataError
from slm.models.paths import flat
from slm.models.quantized import dequantized
from slm.training import loop, precision, step
from slm.training.checkpoint import Checkpoints
from slm.training.loop import train
from slm.training.metrics import read_rows
from slm.training.run import load

EVERYTHING = {
    "train.accumulation": 2,
    "train.precision": "bfloat16",
    "optim.ema_decay": 0.9,
    "train.steps": 12,
    "train.log_every": 1,
    "train.evaluate_every": 4,
    "checkpoint.every": 5,
    "checkpoint.keep": 10,
}


def part_of(run_dir, *names, step=None):
    """Fields of the state that was saved, as numpy trees; one name gives its tree alone."""
    checkpoints = Checkpoints(run_dir / "checkpoints", CheckpointConfig(), read_only=True)
    parts = checkpoints.restore_parts(names, step)
    checkpoints.close()
    return parts if len(names) > 1 else parts[names[0]]


def stored_state(run_dir, step):
    """Every leaf by its path."""
    parts = part_of(run_dir, "step", "params", "opt_state", "ema", "extra", "loss_scale", step=step)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parts)}


def assert_same_state(one, other, step):
    one, other = stored_state(one, step), stored_state(other, step)
    assert one.keys() == other.keys()
    assert len(one) > 30
    for path, leaf in one.items():
        assert np.array_equal(leaf, other[path]), path


@pytest.fixture
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


PRUNING = {"prune.sparsity": 0.5, "prune.criterion": "taylor", "prune.every": 2, "prune.end_step": 11}
FLOAT16 = {"train.precision": "float16"}
ROUNDING = {"quantize.scheme": "int4", "quantize.method": "lsq", "quantize.begin_step": 3}


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (1, {}),
        (4, {"mesh.fsdp": 2}),
        (1, PRUNING),
        (4, PRUNING | FLOAT16 | {"mesh.fsdp": 2}),
        (4, ROUNDING | {"mesh.fsdp": 2}),
    ],
)
def test_stopping_and_resuming_changes_nothing(tmp_path, monkeypatch, devices, changes):
    use_devices(monkeypatch, devices)
    # So that the loss scale of float16 moves, and the stops fall between its growths.
    monkeypatch.setattr(precision, "GROW_AFTER", 4)
    cfg = tiny(tmp_path, EVERYTHING | changes | {"train.batch_size": 8})
    whole = train(override(cfg, {"name": "whole"}))
    assert whole.finished
    # Neither stop is at a multiple of the save interval, of the evaluation interval, or of both.
    for stop in (6, 9):
        stop_at(monkeypatch, stop)
        part = train(cfg)
        assert not part.finished
        assert runs.latest_step(cfg.run_dir) == stop
    stop_at(monkeypatch, None)
    last = train(cfg)
    assert last.finished
    assert [row["step"] for row in last.history] == list(range(1, 13))
    assert curve(last.history) == curve(whole.history) == curve(read_rows(cfg.run_dir / "metrics.jsonl"))
    assert_same_state(whole.dir, last.dir, 12)
    shipped, average = last.model.params, part_of(last.dir, "ema")
    if "quantize.scheme" in changes:
        learned = flat(part_of(last.dir, "extra")["learned"]["quantize"]["change"])
        assert all(leaf.any() for leaf in learned.values())
        assert shipped["blocks"]["0"]["mlp"]["up"]["kernel"].scheme == "int4"
        shipped, average = (tree["embed"] for tree in (shipped, average))
    if "prune.sparsity" in changes:
        mask = part_of(last.dir, "extra")["transforms"]["mask"]["masks"]["blocks"]["0"]["mlp"]["up"]["kernel"]
        assert (~mask).mean() == pytest.approx(0.5, abs=1e-3)
        shipped, average = (tree["blocks"]["0"]["mlp"]["up"]["kernel"] for tree in (shipped, average))
        average = np.where(mask, average, 0)
    assert jax.tree.all(jax.tree.map(np.array_equal, shipped, average))
    assert last.model.config.model.vocab_size == last.model.tokenizer.vocab_size > 0
    if cfg.train.precision == "float16":
        scales = [part_of(last.dir, "loss_scale", step=step) for step in (5, 6, 9, 12)]
        assert [float(one["scale"]) / 2**15 for one in scales] == [2, 2, 4, 8]
        assert [int(one["good_steps"]) for one in scales] == [1, 2, 1, 0]
    # The two would also be equal if nothing were learnt.
    assert whole.history[-1]["validation_loss"] < whole.history[3]["validation_loss"]
    assert stored_state(last.dir, 9)["['step']"] == 9


SCHEDULE_FREE = {"optim.name": "schedule_free_adamw", "optim.schedule": "constant"}


@pytest.mark.parametrize("changes", [{}, {"quantize.scheme": "int4"}, {"optim.only": ("blocks/.*",)}])
def test_the_average_of_schedule_free_is_what_a_run_ships(tmp_path, one_device, changes):
    run = train(tiny(tmp_path, SCHEDULE_FREE | {"train.steps": 4} | changes))
    parts = part_of(run.dir, "params", "opt_state")
    (b1, z), params = (parts["opt_state"][name] for name in ("b1", "z")), flat(parts["params"])
    average = params | {name: (params[name] - (1 - b1) * leaf) / b1 for name, leaf in flat(z).items()}
    found = flat(dequantized(run.model.params))
    for name, leaf in average.items():
        if "quantize.scheme" in changes and name.startswith("blocks/") and name.endswith("/kernel"):
            leaf = Scheme("int4").fake(jnp.asarray(leaf), inputs=-2)
        np.testing.assert_allclose(found[name], leaf, atol=1e-6, err_msg=name)
    moved = "blocks/0/mlp/up/kernel"
    assert np.abs(params[moved] - average[moved]).max() > 1e-5


def test_a_stop_where_an_evaluation_and_a_save_are_due(tmp_path, monkeypatch, one_device):
    cfg = tiny(tmp_path)
    whole = train(override(cfg, {"name": "whole"}))
    stop_at(monkeypatch, 4)
    train(cfg)
    stop_at(monkeypatch, None)
    last = train(cfg)
    assert curve(last.history) == curve(whole.history)
    assert_same_state(whole.dir, last.dir, 8)


def test_resumes_on_another_mesh(tmp_path, monkeypatch):
    cfg = tiny(tmp_path, {"train.steps": 6, "train.log_every": 1})
    use_devices(monkeypatch, 1)
    whole = train(override(cfg, {"name": "whole"}))
    stop_at(monkeypatch, 3)
    train(cfg)
    stop_at(monkeypatch, None)
    use_devices(monkeypatch, 4)
    last = train(override(cfg, {"mesh.data": 2, "mesh.tensor": 2}))
    assert last.finished
    np.testing.assert_allclose([r["loss"] for r in last.history], [r["loss"] for r in whole.history], rtol=1e-4)
    assert curve(last.history)[:3] == curve(whole.history)[:3]


def test_a_finished_run_returns_at_once(tmp_path, monkeypatch, one_device):
    cfg = tiny(tmp_path)
    first = train(cfg)
    before = {path: path.stat().st_mtime_ns for path in cfg.run_dir.rglob("*")}
    monkeypatch.setattr("slm.data.pipeline.open_data", lambda *_: pytest.fail("a finished run opened its data"))
    again = train(cfg)
    assert again.finished
    assert again.history == first.history
    assert {path: path.stat().st_mtime_ns for path in cfg.run_dir.rglob("*")} == before


def test_more_steps_continue_a_finished_run(tmp_path, one_device):
    cfg = tiny(tmp_path, {"optim.schedule": "constant"})
    longer = override(cfg, {"train.steps": 12, "checkpoint.every": 3})
    whole = train(override(longer, {"name": "whole"}))
    train(cfg)
    continued = train(longer)
    assert [row["step"] for row in continued.history] == [2, 4, 6, 8, 10, 12]
    assert curve(continued.history) == curve(whole.history)


def test_another_config_is_refused_with_the_fields_and_the_ways_out(tmp_path, one_device):
    cfg = tiny(tmp_path)
    train(cfg)
    before = (cfg.run_dir / "config.json").read_text()
    other = override(cfg, {"optim.learning_rate": 1e-4, "model.width": 64, "train.steps": 20})
    with pytest.raises(ConfigError) as error:
        train(other)
    message = str(error.value)
    assert "optim.learning_rate was 0.003, now 0.0001" in message
    assert "model.width was 32, now 64" in message
    assert "train.steps" not in message
    assert "--name" in message
    assert "--train.overwrite True" in message
    assert (cfg.run_dir / "config.json").read_text() == before
    (cfg.run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    fresh = train(override(cfg, {"train.overwrite": True}))
    assert [row["step"] for row in fresh.history] == [2, 4, 6, 8]


def test_changed_text_is_refused(tmp_path, one_device):
    cfg = tiny(tmp_path)
    train(cfg)
    text = Path(cfg.data.source[0])
    text.write_text(text.read_text() + "and one more line\n" * 20)
    with pytest.raises(DataError, match="has changed since"):
        train(override(cfg, {"train.steps": 12}))


# Orbax leaves the reads that it gave up unawaited.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")
def test_a_truncated_checkpoint_names_the_older_one(tmp_path, one_device):
    cfg = tiny(tmp_path)
    whole = train(cfg)
    latest = cfg.run_dir / "checkpoints" / "8"
    (data,) = (latest / "state" / "d").iterdir()
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"checkpoints/8 is damaged .* continue from step 4"):
        train(override(cfg, {"train.steps": 12}))
    with pytest.raises(CheckpointError, match="damaged"):
        load(cfg.run_dir)
    latest.rename(tmp_path / "moved")
    again = train(cfg)
    assert curve(again.history) == curve(whole.history)


def test_only_runs_are_overwritten(tmp_path, one_device):
    cfg = tiny(tmp_path, {"train.overwrite": True})
    cfg.run_dir.mkdir(parents=True)
    (cfg.run_dir / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run"):
        train(cfg)
    assert (cfg.run_dir / "thesis.txt").read_text() == "years of work"


def test_load_gives_the_average_of_schedule_free(tmp_path, monkeypatch, one_device):
    seen = []

    def watching(cfg, mesh, techniques):
        program = step.build(cfg, mesh, techniques)

        def averaged(state):
            seen.append(jax.device_get(program.evaluation_params(state)))
            return seen[-1]

        return dataclasses.replace(program, evaluation_params=averaged)

    monkeypatch.setattr(loop, "build", watching)
    run = train(tiny(tmp_path, {"optim.name": "schedule_free_adamw", "optim.schedule": "constant"}))
    assert jax.tree.all(jax.tree.map(np.array_equal, run.model.params, seen[-1]))
    assert not np.array_equal(run.model.params["embed"]["embedding"], part_of(run.dir, "params")["embed"]["embedding"])


def test_load_refuses_a_config_that_is_not_the_checkpoints(tmp_path, one_device):
    run = train(tiny(tmp_path))
    assert jax.tree.all(jax.tree.map(np.array_equal, load(run.dir).params, part_of(run.dir, "params")))
    config = run.dir / "config.json"
    config.write_text(config.read_text().replace('"layers": 2', '"layers": 3'))
    with pytest.raises(CheckpointError, match=r"is \(2, .* the model wants \(3, "):
        load(run.dir)


def test_loading_what_is_no_run_names_those_that_are(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text(to_json(Experiment()))
    with pytest.raises(CheckpointError, match=r"fist is not a run.*runs there: first"):
        load(tmp_path / "fist")
    with pytest.raises(CheckpointError, match=r"first has no tokenizer.json"):
        load(tmp_path / "first")


def test_killed_at_random_moments_nothing_is_lost_but_the_steps_since_the_last_checkpoint(tmp_path):
    report = kill_until(tmp_path, kills=3, seed=0)
    assert report.kills == 3
    assert report.same_as_uninterrupted
