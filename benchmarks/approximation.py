"""How well linear, sparse and low-rank attention approximate exact softmax attention, against what they read.

    python benchmarks/approximation.py [--run RUN_DIR] [--length 256] [--head-dim 32] [--sequences 4] [--heads 2]
                                       [--families NAME ...] [--json FILE] [--plot FILE] [--from-json FILE]

On scores of controlled spread, with a needle for each query, and with locality; with --run also on the queries and
keys of each layer of a trained softmax model, on its own held-out text (windows that lie within one document). Nothing
is fitted: a model trained with a mechanism learns queries and keys that suit it. What is measured:
slm.study.approximation. Standard errors are over sequences, each with draws of its own.
"""

import argparse
import json
import math
import os
import platform
import time
from datetime import date
from pathlib import Path

# Many small programs that run a few times each: compiling them is what takes time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np

import slm
from slm.study.approximation import FAMILIES, approximations, compare, plot
from slm.study.scores import capture_qk, controlled_qk, describe

DISTRIBUTIONS = {f"score std {std:g}": {"std": std} for std in (0.25, 0.5, 1, 2, 4)} | {
    "needle": {"std": 1, "needle": 8},
    "local": {"std": 1, "locality": 6},
}
DRAWN = ("score std 0.5", "score std 1", "score std 2")
"""Which of them --plot shows, besides the last layer of the trained model."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder of a model with softmax layers")
    parser.add_argument("--length", type=int, default=256, help="T, a multiple of 32")
    parser.add_argument("--head-dim", type=int, default=32, help="K of the controlled distributions")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--heads", type=int, default=2, help="of the controlled distributions")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from-json", type=Path, help="results measured before, instead of new ones")
    options = parser.parse_args()
    began = time.perf_counter()
    results = read(options.from_json) if options.from_json else study(options)
    print(f"{time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(record(options, results)) + "\n")
    if options.plot:
        plot({r["title"]: r["rows"] for r in results if r["name"] in DRAWN or r is results[-1]}, options.plot)


def study(options) -> list[dict]:
    results = []
    tried = approximations(options.length, options.head_dim, options.families)
    for i, (name, spread) in enumerate(DISTRIBUTIONS.items()):
        shape = {"batch": options.sequences, "heads": options.heads}
        qkv = controlled_qk(jax.random.key(i), options.length, options.head_dim, **spread, **shape)
        results.append(measure(name, qkv, tried))
    if options.run:
        model = slm.load(options.run)
        captured = capture_qk(model, held_out(model, options.length, options.sequences))
        tried = approximations(options.length, next(iter(captured.values()))[0].shape[-1], options.families)
        for layer, qkv in captured.items():
            results.append(measure(f"{model.config.name}, layer {layer}", qkv, tried))
    return results


def held_out(model, length: int, sequences: int) -> np.ndarray:
    """(sequences, length) tokens that the model was not trained on, each of one document."""
    from slm.data.pipeline import open_data

    data = slm.override(model.config, {"data.sequence_length": length}).data
    found = []
    for batch in open_data(data, model.config.seed, model.tokenizer).validation_batches(16):
        whole = (batch["segment_ids"] == batch["segment_ids"][:, :1]).all(1) & (batch["segment_ids"] > 0).all(1)
        found += list(batch["tokens"][whole])
    if len(found) < sequences:
        raise SystemExit(f"only {len(found)} of {sequences} held-out windows of {length} tokens lie in one document")
    # Spread over all documents.
    return np.stack([found[i * len(found) // sequences] for i in range(sequences)])


def measure(name: str, qkv, tried) -> dict:
    scores = describe(*qkv[:2])
    spread = "scores' std {score_std:.2f}, entropy {entropy:.2f} nats, largest weight {top_weight:.2f}"
    print(f"\n{name}: of a query, {spread.format(**scores)}")
    rows = compare(*qkv, tried)
    print("| approximation | size | floats read | output error | KL(a, e) | KL(e, a) | top-1 |\n|" + "---|" * 7)
    for row in rows:
        cells = [f"{row[x]:.3f} ± {row[x + '_stderr']:.3f}" for x in ("output_error", "reverse_kl", "kl", "top1")]
        print(f"| {row['family']} | {row['size']} | {row['read']:.0f} | " + " | ".join(cells) + " |", flush=True)
    title = "{}\nentropy {:.1f} nats".format(name, scores["entropy"])
    return {"name": name, "title": title, "scores": scores, "rows": rows}


def record(options, results: list[dict]) -> dict:
    """Rows as lists below the names of their columns; rounded, and null where a number is not defined."""

    def tidy(x):
        return (float(f"{x:.3g}") if math.isfinite(x) else None) if isinstance(x, float) else x

    columns = list(results[0]["rows"][0])
    tables = [
        result | {"rows": [[tidy(row[name]) for name in columns] for row in result["rows"]]} for result in results
    ]
    settings = {
        name: str(value) for name, value in vars(options).items() if name not in ("json", "plot", "from_json", "run")
    }
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__,
               "device": jax.devices()[0].device_kind, "python": platform.python_version()}  # fmt: skip
    return {
        "date": str(date.today()),
        "machine": machine,
        "settings": settings,
        "columns": columns,
        "results": tables,
    }


def read(path: Path) -> list[dict]:
    """The results of which `record` was written."""
    stored = json.loads(path.read_text())
    return [
        result | {"rows": [dict(zip(stored["columns"], row)) for row in result["rows"]]} for result in stored["results"]
    ]


if __name__ == "__main__":
    main()
