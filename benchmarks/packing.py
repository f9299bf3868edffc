"""How many small runs an hour: one after the other, in processes, and many in one program.

    python benchmarks/packing.py [--runs 1 2 4 8 16 32] [--steps 100] [--width 64] [--json FILE]

The same runs each time: a small model of the sources of Python's library, seeds 0, 1, ..., each with a learning rate of
its own. Runs an hour are of training alone, and of all, compilation and checkpoints included, which longer runs do not
notice. Memory is the peak of this process, or of all workers together. `worst` is the largest relative difference of a
loss from that of the same run alone.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
WAYS = ("sequential", "processes", "packed")


def configs(options, folder: Path):
    import slm

    base = slm.Experiment(
        dir=str(folder / "runs"),
        model=slm.ModelConfig(layers=options.layers, width=options.width, heads=4),
        data=slm.DataConfig(source=("cpython",), tokenizer="bytes", sequence_length=64, cache=str(folder / "cache")),
        optim=slm.OptimConfig(warmup_steps=10),
        train=slm.TrainConfig(steps=options.steps, batch_size=options.batch, log_every=5, evaluate_every=0,
                              evaluate_sequences=8),
        log=slm.LogConfig(console=False),
    )  # fmt: skip
    rates = np.geomspace(1e-3, 1e-2, max(options.runs))
    return [slm.override(base, {"seed": i, "optim.learning_rate": float(rates[i])}) for i in range(max(options.runs))]


def measure(job: dict) -> dict:
    """One way, in this process (and its workers)."""
    options, folder = argparse.Namespace(**job["options"]), Path(job["folder"])
    from slm.study.cells import Cell
    from slm.study.running import run_cells

    cfgs = configs(options, Path(job["shared"]))[: job["runs"]]
    cells = [
        Cell("arm", i, __import__("slm").override(cfg, {"name": f"{i}", "dir": str(folder)}))
        for i, cfg in enumerate(cfgs)
    ]
    start = time.perf_counter()
    run_cells(cells, processes=job["processes"], pack=job["pack"], show=False)
    seconds = time.perf_counter() - start
    curves, spent = [], []
    for cell in cells:
        result, rows = cell.result(), cell.history()
        assert result["status"] == "done", result
        curves.append([row["loss"] for row in rows])
        rate = sorted(row["tokens_per_second"] for row in rows[1:])
        spent.append(options.steps * options.batch * 64 / rate[len(rate) // 2])
    # Packed runs, and those of several processes, share their seconds.
    together = max(1, job["processes"]) if job["pack"] == 1 else job["runs"]
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = peaks[0] + peaks[1] * min(job["processes"], job["runs"]) if job["processes"] else peaks[0]
    return {
        "seconds": seconds, "training_seconds": sum(spent) / together, "curves": curves, "peak_mb": peak / 1024,
        "runs_per_hour": job["runs"] * 3600 * together / sum(spent), "runs_per_hour_with_compilation":
        job["runs"] * 3600 / seconds,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(json.loads(options.job))))
        return
    from pool import machine

    settings = {name: getattr(options, name) for name in ("runs", "steps", "width", "layers", "batch", "processes")}
    record = {"settings": settings, "rows": [], "machine": machine(), "date": str(date.today())}
    with tempfile.TemporaryDirectory() as shared:
        for runs in options.runs:
            separate = None
            for way in options.ways:
                folder = Path(shared) / f"{way}{runs}"
                job = {"options": settings, "shared": shared, "folder": str(folder), "runs": runs,
                       "processes": options.processes if way == "processes" else 0,
                       "pack": runs if way == "packed" else 1}  # fmt: skip
                done = subprocess.run(
                    [sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True
                )
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                row = {"way": way, "n": runs} | json.loads(done.stdout.splitlines()[-1])
                curves = row.pop("curves")
                separate = separate or curves
                pairs = [(a, b) for one, other in zip(curves, separate) for a, b in zip(one, other, strict=True)]
                row["worst"] = max(abs(a - b) / b for a, b in pairs)
                record["rows"].append(row)
                shutil.rmtree(folder)
                print(f"{runs:3d} runs  {way:11s} {row['runs_per_hour']:9.0f} an hour of training, "
                      f"{row['runs_per_hour_with_compilation']:7.0f} in all  {row['peak_mb']:6.0f} MB  "
                      f"worst {row['worst']:.1e}", flush=True)  # fmt: skip
                if options.json:
                    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
