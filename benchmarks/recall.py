"""Associative recall against the bytes that decoding carries: reduced MQAR, several seeds.

    python benchmarks/recall.py --json FILE [--models NAME ...] [--seeds 3] [--rates 3e-3 1e-2 3e-2] [--plot FILE]

configs/mqar_reduced.py with another second layer: BaseConv, then the mechanism, no feed-forward, no positions but the
mechanism's own. The learning rate is chosen per model on seed 0, the other seeds use it. Bytes are those of both layers
for a text of 128 tokens, everything in float32. configs/mqar.py is the published setting. Interrupted runs go on where
they stopped.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
from pool import run_jobs

import slm
from slm.models.counts import cache_bytes, parameter_counts

CONFIG = Path(__file__).parents[1] / "configs" / "mqar_reduced.py"
LENGTH, STEPS = 128, 2000
SIZES = {
    "window": [{"mixer.window": W} for W in (8, 16, 32)],
    "mamba2": [{"mixer.expand_k": k, "mixer.expand_v": 1.0} for k in (0.5, 1.0, 2.0)],
    "gla": [{"mixer.expand_k": k} for k in (0.5, 1.0, 2.0)],
    "based": [{"mixer.feature_dim": d} for d in (4, 6, 8)],
    "delta": [{"mixer.expand_k": k} for k in (0.5, 1.0, 2.0)],
    "gated_delta": [{"mixer.expand_k": k, "mixer.expand_v": 1.0} for k in (0.5, 1.0, 2.0)],
    "softmax": [{}],
}
MODELS = {f"{name} {number}": (name, changes) for name, sizes in SIZES.items() for number, changes in enumerate(sizes)}


def experiment(mechanism: str, changes: dict, rate: float, seed: int, folder: str) -> slm.Experiment:
    changes = {f"model.{name}": value for name, value in changes.items()}
    return slm.override(
        slm.load_config(CONFIG),
        changes | {
            "name": "run", "dir": folder, "seed": seed, "model.attention": ("base_conv", mechanism),
            "optim.learning_rate": rate, "train.steps": STEPS, "train.evaluate_every": 0, "checkpoint.every": 0,
            "log.console": False,
        },
    )  # fmt: skip


def work(job: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = slm.train(experiment(job["mechanism"], job["changes"], job["rate"], job["seed"], folder))
        model = run.model.config.model
    last = [row for row in run.history if "validation_accuracy" in row][-1]
    return {
        "accuracy": last["validation_accuracy"],
        "by_source": {name: scores["accuracy"] for name, scores in last["validation_by_source"].items()},
        "state_bytes": cache_bytes(model, 1, LENGTH, jnp.float32),
        "parameters": parameter_counts(model)["total"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--cores", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(work(options.job)))
        return

    def job(model, rate, seed):
        mechanism, changes = MODELS[model]
        return {"model": model, "mechanism": mechanism, "changes": changes, "rate": rate, "seed": seed}

    rows = run_jobs(
        __file__,
        [job(model, rate, 0) for model in options.models for rate in options.rates],
        options.json,
        options.cores,
    )
    best = {}
    for model in options.models:
        if mine := [row for row in rows if row["job"]["model"] == model]:
            best[model] = max(mine, key=lambda row: row["result"]["accuracy"])["job"]["rate"]
    more = [job(model, rate, seed) for seed in range(options.seeds) for model, rate in best.items()]
    rows = run_jobs(__file__, more, options.json, options.cores)
    report(rows)
    if options.plot:
        plot(rows, options.plot)


def points(rows: list[dict]) -> list[dict]:
    """One for each model: mechanism, bytes, mean accuracy and its standard error over seeds."""
    found = {}
    for row in rows:
        found.setdefault(row["job"]["model"], []).append(row)
    table = []
    for model, mine in found.items():
        values = [row["result"]["accuracy"] for row in mine]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
        table.append({"model": model, "mechanism": mine[0]["job"]["mechanism"], "rate": mine[0]["job"]["rate"],
                      "bytes": mine[0]["result"]["state_bytes"], "parameters": mine[0]["result"]["parameters"],
                      "accuracy": statistics.mean(values), "error": error, "seeds": len(values)})  # fmt: skip
    return sorted(table, key=lambda point: (point["mechanism"], point["bytes"]))


def report(rows: list[dict]) -> None:
    print(
        "| mechanism | switches | state bytes | parameters | rate | accuracy | seeds |\n|---|---|---|---|---|---|---|"
    )
    for p in points(rows):
        switches = ", ".join(f"{name} {value}" for name, value in MODELS[p["model"]][1].items())
        print(f"| {p['mechanism']} | {switches} | {p['bytes']:,} | {p['parameters']:,} | {p['rate']:g} | "
              f"{p['accuracy']:.3f} ± {p['error']:.3f} | {p['seeds']} |")  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5.5))
    table = points(rows)
    for mechanism in SIZES:
        mine = [p for p in table if p["mechanism"] == mechanism]
        if mine:
            axis.errorbar([p["bytes"] / 1000 for p in mine], [p["accuracy"] for p in mine],
                          yerr=[2 * p["error"] for p in mine], marker="o", capsize=3, label=mechanism)  # fmt: skip
    axis.set_xlabel("kB carried in decoding, both layers, 128 tokens")
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1.03)
    axis.set_ylabel("accuracy, mean and two standard errors over seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
