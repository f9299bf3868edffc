"""Attention operations against what a user would take instead on this machine's CPU, side by side.

    python benchmarks/attention_speed.py [--operations NAME ...] [--lengths 1024 ...] [--rounds 5]
                                         [--torch-python PYTHON] [--json FILE]

Forward and backward in float32 on the same sizes, `--tokens` in all; A B A B, medians. `--torch-python` names the
interpreter that has torch, transformers, einops and the sources of flash-linear-attention (installed without its
dependencies: fla-core), if this one has not. What the peers are: peers/torch_attention.py.
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

PEERS = Path(__file__).parent / "peers"
OPERATIONS = {
    "softmax": "SDPA",
    "window": "SDPA with a mask",
    "linear": "fla, chunked torch",
    "decay": "fla simple_gla, chunked torch",
    "delta": "fla, chunked torch",
    "gated_delta": "transformers, chunked torch",
    "kda": "fla, chunked torch",
    "dplr": "fla, chunked torch",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="K = V of a head")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ours = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    results = []
    print("| operation | T | slm s (range) | peer s (range) | slm is | peer |\n|---|---|---|---|---|---|")
    for operation in options.operations:
        for length in options.lengths:
            job = {"operation": operation, "length": length, "batch": max(1, options.tokens // length),
                   "heads": options.heads, "size": options.size, "window": options.window,
                   "threads": os.cpu_count()}  # fmt: skip
            workers = [
                Worker("slm", [sys.executable, str(PEERS / "slm_attention.py"), json.dumps(job)], ours),
                Worker("torch", [options.torch_python, str(PEERS / "torch_attention.py"), json.dumps(job)]),
            ]
            for _ in range(options.rounds):
                for worker in workers:
                    worker.ask()
            row = job | {"peer": OPERATIONS[operation]}
            for worker in workers:
                worker.close()
                row[worker.name] = worker.prepared | {"seconds": [t["seconds"] for t in worker.turns],
                                                      "cpu_seconds": [t["cpu_seconds"] for t in worker.turns],
                                                      "peak_mb": worker.turns[-1]["peak_mb"]}  # fmt: skip
            ratios = [b / a for a, b in zip(row["slm"]["seconds"], row["torch"]["seconds"])]
            row["times_faster"] = statistics.median(ratios)
            results.append(row)
            print(f"| {operation} | {length} | {spread(row['slm'])} | {spread(row['torch'])} | "
                  f"{row['times_faster']:.2f}x | {row['peer']} |", flush=True)  # fmt: skip
            if options.json:
                machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
                record = {"date": str(date.today()), "machine": machine, "load": os.getloadavg(), "results": results}
                options.json.write_text(json.dumps(record, indent=1) + "\n")


def spread(side: dict) -> str:
    seconds = side["seconds"]
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"


if __name__ == "__main__":
    main()
