"""Studies from the command line: the cells of the notebook, and its table."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import tiny, use_devices

import slm
from slm.config import to_json
from slm.errors import ConfigError
from slm.evaluation.cli import evaluate_command
from slm.study.comparing import compare_runs
from slm.study.sweep import fields, sweep


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, Study, what was printed)."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        base = tiny(folder)
        return base, sweep(base, "optim.learning-rate=1e-3,1e-2", seeds=2, folder=folder / "studies")


def test_the_same_cells_as_in_a_notebook(made, monkeypatch):
    base, study = made
    monkeypatch.setattr("slm.study.running.run_group", lambda *_: pytest.fail("trained again"))
    folder = study.cells[0].folder.parent.parent
    again = slm.study.ablate(base, {"optim.learning_rate": [1e-3, 1e-2]}, seeds=2, folder=folder, show=False)
    assert [cell.folder for cell in again.cells] == [cell.folder for cell in study.cells]
    assert str(again.table()) == str(study.table())


def test_fields():
    grid = fields("model.attention=softmax,gla+gla+softmax optim.learning-rate=1e-3,3 optim.clip-norm=2,None")
    assert len(grid) == 8
    assert grid[0].changes == {"model.attention": ("softmax",), "optim.learning_rate": 1e-3, "optim.clip_norm": 2}
    assert grid[-1].changes == {
        "model.attention": ("gla", "gla", "softmax"),
        "optim.learning_rate": 3,
        "optim.clip_norm": None,
    }
    for text in ("", "model.width", "model.width=", "a=1 a=2", "=3"):
        with pytest.raises(ConfigError, match="--sweep"):
            fields(text)


def test_runs_beside_each_other(made, tmp_path, capsys):
    _, study = made
    folders = [str(cell.folder) for cell in study.cells]
    file = tmp_path / "table.json"
    assert evaluate_command(["--compare", *folders, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    table = compare_runs(folders)
    assert printed.strip() == str(table).strip()
    # Runs that differ in their seed alone are one arm, named after its first run.
    assert table.arms == (study.cells[0].config.name, study.cells[2].config.name)
    for arm, cells in zip(table.arms, (study.cells[:2], study.cells[2:])):
        mean = sum(cell.result()["bits_per_byte"] for cell in cells) / 2
        found = {row["arm"]: row for row in json.loads(file.read_text())["cells"] if row["metric"] == "bits_per_byte"}
        # Runs are scored on a part of their text while they train.
        assert found[arm]["mean"] == pytest.approx(mean, rel=0.05)
        assert table.cells[arm, "bits_per_byte"].n == 2
    assert table.cells[table.arms[1], "parameters"].difference.mean == 0


def test_a_longer_run_is_no_further_seed(made, tmp_path):
    _, study = made
    one, other = (cell.folder for cell in study.cells[:2])
    longer = Path(shutil.copytree(other, tmp_path / "longer"))
    config = json.loads((longer / "config.json").read_text())
    config["train"]["steps"] += 1
    (longer / "config.json").write_text(json.dumps(config))
    assert compare_runs([one, longer]).arms == (one.name, "longer")


def test_what_cannot_be_compared(made, capsys):
    _, study = made
    one, other = (str(cell.folder) for cell in study.cells[:2])
    assert evaluate_command(["--compare", one, other]) == 2
    assert "differ in more than their seed" in capsys.readouterr().err
    assert evaluate_command([]) == 2
    assert "which model?" in capsys.readouterr().err
    assert evaluate_command(["--compare", one, other, "--sequence-length", "8"]) == 2
    assert "--sequence-length cannot go with --compare" in capsys.readouterr().err
    assert evaluate_command(["--compare", one, other, "--json", "nowhere/table.json"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err


def test_the_command(made, tmp_path, monkeypatch, capsys):
    from slm.cli import train_command

    base, _ = made
    use_devices(monkeypatch, 1)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.py"
    config.write_text(f"from slm.config import from_json\nconfig = from_json({to_json(base)!r})\n")
    assert train_command([str(config), "--sweep", "train.steps=2", "--seeds", "1"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    assert len(list((tmp_path / "studies" / "cells").glob("*/result.json"))) == 1
    assert train_command([str(config), "--sweep", "train.stps=2"]) == 2
    assert "did you mean train.steps" in capsys.readouterr().err
