"""Character-level Shakespeare at nanoGPT's published CPU setting: what optimizer and architecture bring.

    python benchmarks/shakespeare.py PATH_TO/input.txt [--arms NAME ...] [--seeds 0 1 2] [--json FILE]

Setting (nanoGPT's readme, "I only have a macbook"): 4 layers, 4 heads, width 128, context 64, batch 12, 2000 steps, no
dropout, first 90 % to train, last 10 % to validate. Published validation loss: 1.88 nats a character. Here the whole
validation part is scored once, in windows of 64 without overlap.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import slm
from slm.models.counts import parameter_counts

NANOGPT = {
    "model.norm": "layernorm",
    "model.norm_eps": 1e-5,
    "model.mlp": "gelu",
    "model.mlp_width": 512,
    "model.position": "learned",
    "model.mixer.qk_norm": "none",
    "optim.name": "adamw",
    "optim.learning_rate": 1e-3,
    "optim.schedule": "cosine",
    "optim.final_ratio": 0.1,
    "optim.b2": 0.99,
}
MODERN = {path: value for path, value in NANOGPT.items() if path.startswith("optim.")}
ARMS = {
    "nanoGPT's recipe": NANOGPT,
    "modern architecture": MODERN,
    "modern architecture, AdamW at 2e-3": MODERN
    | {"optim.learning_rate": 2e-3, "optim.schedule": "linear", "optim.final_ratio": 0.0},
    "nanoGPT's architecture, Muon": NANOGPT
    | {
        "optim.name": "muon",
        "optim.learning_rate": 1e-2,
        "optim.schedule": "linear",
        "optim.final_ratio": 0.0,
    },
    "configs/shakespeare_char.py": {},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tinyshakespeare's input.txt")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change every arm (JSON values)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = slm.load_config(Path(__file__).parents[1] / "configs/shakespeare_char.py")
    changes = {path: json.loads(value) for path, value in (item.split("=", 1) for item in options.set)}
    rows = []
    for arm in options.arms:
        losses, seconds = [], []
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                always = {"data.source": options.text, "dir": folder, "seed": seed, "log.console": False}
                cfg = slm.override(base, ARMS[arm] | always | changes)
                start = time.perf_counter()
                run = slm.train(cfg)
                seconds.append(time.perf_counter() - start)
                losses.append(run.history[-1]["validation_loss"])
                parameters = parameter_counts(run.model.config.model)["total"]
        rows.append(
            {
                "arm": arm,
                "parameters": parameters,
                "seeds": options.seeds,
                "validation_loss": losses,
                "mean": statistics.mean(losses),
                "seconds": statistics.mean(seconds),
            }
        )
        spread = f" ± {statistics.stdev(losses) / len(losses) ** 0.5:.4f}" if len(losses) > 1 else ""
        print(
            f"{arm:34s} {parameters:9,d} parameters   {rows[-1]['mean']:.4f}{spread} nats/char"
            f"   {rows[-1]['seconds']:.0f} s",
            flush=True,
        )
    if options.json:
        record = {"date": str(date.today()), "cores": os.cpu_count(), "changes": changes, "results": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
