"""Training throughput against PyTorch on this machine's CPU: same architecture, parameters, batch, precision.

    python benchmarks/training_speed.py [--sizes 10M 30M] [--precisions float32 bfloat16] [--rounds 7]
                                        [--torch-python PYTHON] [--json FILE]

All competitors are alive at once and take turns (A B C A B C); medians are compared. `--torch-python` names the
interpreter that has torch, if this one has not. Peak memory is the largest resident set of each process.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from turns import Worker

SIZES = {
    "10M": {"layers": 7, "width": 320, "heads": 5, "mlp_width": 864},
    "30M": {"layers": 9, "width": 512, "heads": 8, "mlp_width": 1376},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps in one turn")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--eager", action="store_true", help="also PyTorch without torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = Path(__file__).parent / "peers"
    root = str(Path(__file__).parents[1])
    results = []
    for size in options.sizes:
        for precision in options.precisions:
            job = SIZES[size] | {"vocab": 4096, "length": 256, "batch": 8, "precision": precision,
                                 "steps": options.steps, "threads": os.cpu_count()}  # fmt: skip
            ours = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
            workers = [Worker("slm", [sys.executable, str(peers / "slm_step.py"), json.dumps(job)], ours)]
            for name, compiled in [("torch.compile", True)] + [("torch eager", False)] * options.eager:
                command = [options.torch_python, str(peers / "torch_llama.py"), json.dumps(job | {"compile": compiled})]
                workers.append(Worker(name, command))
            for _ in range(options.rounds):
                for worker in workers:
                    worker.ask()
            results += [row(size, precision, job, worker) for worker in workers]
            for worker in workers:
                worker.close()
            report(results[-len(workers) :])
    if options.json:
        record = {"date": str(date.today()), "machine": machine(), "load_after": os.getloadavg(), "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def row(size, precision, job, worker):
    tokens = job["batch"] * job["length"] * job["steps"]
    rates = [tokens / turn["seconds"] for turn in worker.turns]
    return worker.prepared | {
        "size": size,
        "precision": precision,
        "who": worker.name,
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_range": [min(rates), max(rates)],
        "cpu_seconds_per_step": statistics.median(t["cpu_seconds"] for t in worker.turns) / job["steps"],
        "peak_mb": max(turn["peak_mb"] for turn in worker.turns),
        "seconds": [turn["seconds"] for turn in worker.turns],
        "loss": worker.turns[-1]["loss"],
    }


def report(rows):
    ours = rows[0]
    for r in rows:
        # Turn by turn: the ratio holds when the machine's speed drifts.
        ratio = statistics.median(theirs / mine for mine, theirs in zip(ours["seconds"], r["seconds"]))
        print(
            f"{r['size']} {r['precision']:9s} {r['who']:14s} {r['tokens_per_second']:6.0f} tokens/s"
            f" ({r['tokens_per_second_range'][0]:.0f}-{r['tokens_per_second_range'][1]:.0f})"
            f"  slm is {ratio:.2f}x  cpu {r['cpu_seconds_per_step']:.2f} s/step  peak {r['peak_mb']:.0f} MB"
            f"  first step {r['first_step_seconds']:.1f} s  {r['parameters']:,} parameters",
            flush=True,
        )


def machine():
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
    return {"processor": model[0] if model else platform.processor(), "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
