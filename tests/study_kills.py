"""SIGKILL a study at random moments, run it again, and see that its table is that of a study that nobody touched.

    python tests/study_kills.py --kills 20

No run that had ended may be trained again, and none may be missing.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys, slm
from slm.config import from_json
base = from_json(open(sys.argv[1]).read())
grid = {"model.width": [16, 32], "optim.learning_rate": [1e-3, 3e-3]}
slm.study.ablate(base, grid, seeds=2, folder=sys.argv[2], pack=int(sys.argv[3]), show=False)
"""


@dataclass
class Report:
    kills: int
    ended_before: int
    """Runs that had ended before the last life of the study."""
    trained_again: int
    """Of these, how many were touched later."""
    largest_difference: float
    """Between a number of the table and that of the study that nobody touched, relative."""


def kill_until(folder: Path, kills: int, seed: int = 0, pack: int = 4, steps: int = 60) -> Report:
    """Raises AssertionError if a life fails by itself."""
    from tiny_run import tiny

    import slm
    from slm.config import from_json, override, to_json

    chance = random.Random(seed)
    base = tiny(folder, {"train.steps": steps, "train.log_every": 5, "train.evaluate_every": 20, "checkpoint.every": 5})
    base = override(base, {"data.cache": str(folder / "cache")})
    (folder / "base.json").write_text(to_json(base))
    (folder / "study.py").write_text(SCRIPT)

    def life(where: str) -> subprocess.Popen:
        command = [sys.executable, str(folder / "study.py"), str(folder / "base.json"), str(folder / where), str(pack)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    untouched = life("untouched")
    assert untouched.wait() == 0, untouched.stderr.read().decode()[-2000:]
    # Some lives end within their first row, some outlive a program, so that some runs have ended before the last kill.
    most = max(1, int(1.6 * _rows(folder / "untouched") / kills))
    ended: dict[Path, int] = {}
    done = 0
    while done < kills:
        process = life("killed")
        until = _rows(folder / "killed") + chance.randint(0, most)
        while process.poll() is None and _rows(folder / "killed") <= until:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            done += 1
        else:  # it got to its end, and nothing is left to kill
            assert process.returncode == 0, process.stderr.read().decode()[-2000:]
            break
        process.wait()
        for result in (folder / "killed").glob("cells/*/result.json"):
            ended.setdefault(result, (result.parent / "metrics.jsonl").stat().st_mtime_ns)
    last = life("killed")
    assert last.wait() == 0, last.stderr.read().decode()[-2000:]
    again = sum((result.parent / "metrics.jsonl").stat().st_mtime_ns != when for result, when in ended.items())
    base = from_json((folder / "base.json").read_text())
    grid = {"model.width": [16, 32], "optim.learning_rate": [1e-3, 3e-3]}
    tables = [
        json.loads(slm.study.ablate(base, grid, seeds=2, folder=folder / name, show=False).table("loss").json())
        for name in ("untouched", "killed")
    ]
    worst = max(abs(a["mean"] - b["mean"]) / a["mean"] for a, b in zip(*(table["cells"] for table in tables)))
    return Report(done, len(ended), again, worst)


def _rows(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("cells/*/metrics.jsonl"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        print(kill_until(Path(folder), options.kills, options.seed, steps=options.steps))
