"""Every page of notebooks/ runs from top to bottom, on a toy; its own assertions are the test."""

import json
from pathlib import Path

import pytest
from tiny_run import use_devices
from tiny_talker import write_talker

PAGES = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLM_FAST", "1")
    monkeypatch.setenv("SLM_MODEL", str(write_talker(tmp_path / "toy", width=32)))
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    assert len(cells) < 30
    names = {"__name__": "__main__"}  # as a kernel has it
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{page.name} {cell['id']}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_stored_with_what_it_printed(page):
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"], f"{cell['id']} was not run"
            assert not any(output["output_type"] == "error" for output in cell["outputs"])
