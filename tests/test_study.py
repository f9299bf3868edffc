"""The notebook's face: arms by seeds in one call, a table, pictures, a page, the best model."""

import re

import numpy as np
import pytest
from tiny_run import tiny, use_devices

import slm
from slm.errors import ConfigError
from slm.study import drawing, running


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    lost = {"optim.learning_rate": 1e7, "optim.clip_norm": None}
    grid = slm.study.arms({"base": {}, "faster": {"optim.learning_rate": 1e-2}, "lost": lost})
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        base = tiny(folder, {"train.steps": 20, "train.evaluate_every": 5})
        return slm.study.ablate(base, grid, seeds=2, tokens=20 * 64, folder=folder / "cells", show=False)


def test_what_came_of_it(runs):
    assert (runs.arms, runs.seeds, runs.base) == (("base", "faster", "lost"), (0, 1), "base")
    rows = runs.rows()
    assert [row["status"] for row in rows] == ["done"] * 4 + ["diverged"] * 2
    assert "2 of" not in repr(runs).splitlines()[0]
    assert "lost, seed 1: diverged: step " in repr(runs)
    table = runs.table("loss", "params", "tokens_per_s")
    values = runs.values("loss")
    assert table.cells["faster", "loss"].mean == pytest.approx(np.mean(list(values["faster"].values())))
    paired = [values["faster"][seed] - values["base"][seed] for seed in (0, 1)]
    assert table.cells["faster", "loss"].difference.mean == pytest.approx(np.mean(paired))
    assert values["lost"] == {0: None, 1: None}
    assert table.cells["base", "params"].n == 0  # no seed changes it
    # All trained in one program, whose speed is measured once, whatever each run's file says.
    assert table.cells["faster", "tokens_per_s"].n == 0
    assert np.isnan(table.cells["faster", "tokens_per_s"].difference.p)
    assert "lost" in str(table)


def test_the_best_is_the_best(runs):
    values = {arm: by for arm, by in runs.values("loss").items() if arm != "lost"}
    arm = min(values, key=lambda arm: np.mean(list(values[arm].values())))
    seed = min(values[arm], key=values[arm].get)
    assert runs.best("loss").config.run_dir == runs.cell(arm, seed).folder
    with pytest.raises(ConfigError, match="no run has the metric 'bits'"):
        runs.values("bits")
    with pytest.raises(ConfigError, match="no cell of arm 'worse'"):
        runs.model("worse")


def test_pictures(runs, tmp_path):
    figure = runs.plot("loss", path=tmp_path / "curves.png")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert {"base", "faster"} <= lines.keys()
    curves = runs.curve("loss")["base"]
    want = (curves[0][:, 1] + curves[1][:, 1]) / 2
    np.testing.assert_allclose(lines["base"].get_ydata(), want)
    assert len(want) == 4
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for
    runs.plot("loss", x="params", path=tmp_path / "points.svg")
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "points.svg"}


def test_curves_of_runs_that_saw_different_numbers_of_tokens(tmp_path):
    runs = {0: np.array([[10, 4.0], [20, 2.0]]), 1: np.array([[12, 3.0], [22, 1.0]])}
    name = "_a$x_{$"
    figure = drawing.curves({name: runs, "apart": {0: runs[0], 1: runs[1] + [50, 0]}}, "loss", "tokens")
    (axes,) = figure.axes
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_xydata(), [[12, (3.6 + 3) / 2], [20, (2 + 1.4) / 2]])
    figure.savefig(tmp_path / "curves.png")
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == [r"_a\$x_{\$"]


def test_a_study_of_failures_has_a_page(tmp_path):
    runs = slm.study.ablate(tiny(tmp_path), {"mesh.fsdp": [3]}, seeds=1, folder=tmp_path / "cells", show=False)
    text = runs.report(tmp_path / "page.html").read_text()
    assert "No run is done" in text
    assert "mesh" in text
    with pytest.raises(ConfigError, match="no run of 1 is done"):
        runs.table()


def test_a_size_that_was_right_leaves_the_arm_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("slm.study.study.run_cells", lambda *_: [])
    base = tiny(tmp_path, {"model.mlp_width": None})
    grid = slm.study.arms({"first": {"model.attention": "gla"}, "base": {}})
    how = {"match": "parameters", "solve": "model.mlp_width", "folder": tmp_path / "cells"}
    assert slm.study.ablate(base, grid, seeds=1, **how).base == "base"


def test_the_page_needs_nothing(runs, tmp_path):
    text = runs.report(tmp_path / "page.html", "A <title>", ("loss", "params")).read_text()
    assert "A &lt;title&gt;" in text
    assert set(re.findall(r"(?:src|href)=(.{6})", text)) == {"'data:"}
    assert "data:image/png;base64," in text
    assert text.count("diverged") == 4  # two among the runs, two among those not done
    assert "optim.learning_rate = 0.01" in text
    assert "optim.learning_rate = 1e+07, optim.clip_norm = None" in text
    # Words stand at the left and may break, numbers at the right.
    assert text.count("<td class=words>diverged</td>") == 4
    assert re.search(r"<td class=words>base</td><td>0</td><td class=words>done</td><td>[\d.]+</td>", text)


def test_nothing_is_trained_for_a_study_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "run_group", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="learning_rate"):
        slm.study.ablate(tiny(tmp_path), {"optim.learning_rte": [1e-3]}, seeds=1, folder=tmp_path / "cells")
    with pytest.raises(ConfigError, match="seeds"):
        slm.study.ablate(tiny(tmp_path), {"optim.learning_rate": [1e-3]}, seeds=0, folder=tmp_path / "cells")
