"""What ARCHITECTURE.md says about adding a mechanism is done here to a copy of the tree, literally."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def changed_tree(tmp_path_factory):
    """A copy of what the diff of ARCHITECTURE.md changes, with the diff applied."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("slm", "tests", "configs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tree)
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    # Outside of any repository, whose own root the paths would be taken from.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    subprocess.run(["git", "apply", "-C1", "-"], input=diff, text=True, cwd=tree, env=environment, check=True)
    return tree


def python(tree, *arguments):
    environment = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "SLM_CACHE": str(tree / "cache")}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_invariants_hold_for_it_without_another_line(changed_tree):
    out = python(changed_tree, "-m", "pytest", "tests/test_invariants.py", "-k", "fading", "-p", "no:cacheprovider")
    assert re.search(r"[1-9]\d* passed", out)


def test_its_config_trains(changed_tree):
    python(changed_tree, "train.py", "configs/fading.py", "--train.steps", "2", "--train.evaluate-sequences", "16",
           "--train.batch-size", "8")  # fmt: skip
    assert '"step": 2' in (changed_tree / "runs" / "fading" / "metrics.jsonl").read_text()
