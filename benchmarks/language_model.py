"""Language models that differ in their attention only: equal parameters, tokens and data, several seeds.

    python benchmarks/language_model.py --text FOLDER_OF_TXT --json FILE [--models NAME ...] [--seeds 3]
                                        [--rates 4e-3 8e-3] [--plot FILE] [--report]

Each model is a layer pattern over six layers; its feed-forward width is chosen so that all have the parameters of
softmax within 1 %. The learning rate is chosen per model on seed 0 by validation loss, the other seeds use it. The file
of --text that comes last by name is held out whole. Reported: bits a byte, mean over seeds and its standard error over
seeds; and bits a token by position, in windows of up to four times the training length. Interrupted runs go on where
they stopped. --report runs nothing: it takes the file as it is, and of each model the rate that is best on seed 0.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

from pool import run_jobs

import slm
from slm.models.counts import cache_bytes, flops_per_token, parameter_counts, with_parameters

LENGTH, LAYERS, STEPS = 128, 6, 300
MODELS = {
    # mechanisms, in all layers
    "softmax": "softmax", "forgetting": "forgetting", "differential": "differential", "mla": "mla", "window": "window",
    "streaming": "streaming", "longformer": "longformer", "moba": "moba", "nsa": "nsa", "linear": "linear",
    "performer": "performer", "based": "based", "retnet": "retnet", "gla": "gla", "hgrn2": "hgrn2", "mamba2": "mamba2",
    "rglru": "rglru", "rwkv7": "rwkv7", "delta": "delta", "gated_delta": "gated_delta", "kda": "kda",
    "log_linear": "log_linear_mamba2",
    # hybrids
    "gated_delta + softmax 3:1": "qwen3_next", "kda + mla 3:1": "kimi_linear", "window + softmax 5:1": "gemma3",
    "rg-lru + window 2:1": "recurrent_gemma",
}  # fmt: skip


def experiment(pattern: str, rate: float, seed: int, folder: str, text: str) -> slm.Experiment:
    files = sorted(map(str, Path(text).glob("*.txt")))
    model = slm.ModelConfig(vocab_size=512, layers=LAYERS, width=64, heads=2)
    total = parameter_counts(model)["total"]
    # Windows of a quarter of the training length, and blocks to match, so that they are constraints at this scale.
    windowed = ("window", "streaming", "nsa", "gemma3", "recurrent_gemma")
    switches = slm.MixerConfig(
        window=LENGTH // 4 if pattern in windowed else None,
        block_size=LENGTH // 8 if pattern in ("moba", "nsa") else None,
    )
    model = dataclasses.replace(model, attention=(pattern,), mixer=switches)
    return slm.Experiment(
        name="run",
        dir=folder,
        seed=seed,
        model=equal_size(model, total),
        data=slm.DataConfig(source=tuple(files[:-1]), validation=(files[-1],), tokenizer="bpe:512",
                            sequence_length=LENGTH),
        optim=slm.OptimConfig(learning_rate=rate, warmup_steps=40, schedule="linear", final_ratio=0.0),
        train=slm.TrainConfig(steps=STEPS, batch_size=16, evaluate_every=0),
        checkpoint=slm.CheckpointConfig(every=0),
        log=slm.LogConfig(console=False),
    )  # fmt: skip


def equal_size(model: slm.ModelConfig, total: int) -> slm.ModelConfig:
    """`model` with a feed-forward, if possible of a multiple of 8, that brings it within 1 % of `total` parameters."""
    try:
        return with_parameters(model, total)
    except slm.SlmError:
        return with_parameters(model, total, multiple=2)


def work(job: dict, text: str) -> dict:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        cfg = experiment(job["pattern"], job["rate"], job["seed"], folder, text)
        run = slm.train(cfg)
        source = cfg.data.validation[0]
        short = slm.evaluate(run.model, source, batch_size=16)
        long = slm.evaluate(run.model, source, batch_size=4, sequence_length=4 * LENGTH, by_position=True)
    return {
        "parameters": parameter_counts(cfg.model)["total"],
        "mlp_width": cfg.model.mlp_width,
        "cache_bytes": cache_bytes(cfg.model, 1, LENGTH),
        "cache_bytes_long": cache_bytes(cfg.model, 1, 16 * LENGTH),
        "flops_per_token": flops_per_token(cfg.model, LENGTH)["train"],
        "bits_per_byte": short["bits_per_byte"],
        "bits_per_byte_stderr": short["bits_per_byte_stderr"],
        "bits_per_byte_long": long["bits_per_byte"],
        "bits_by_position": buckets(long),
    }


def buckets(scores: dict, size: int = LENGTH // 4) -> list[float]:
    """Mean bits a token of each quarter of a training length, in windows of 4 T."""
    losses, tokens = scores["loss_by_position"], scores["tokens_by_position"]
    found = []
    for start in range(0, 4 * LENGTH, size):
        part = [(x, n) for x, n in zip(losses[start : start + size], tokens[start : start + size]) if n]
        found.append(sum(x * n for x, n in part) / sum(n for _, n in part) / math.log(2))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="folder of .txt files")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 8e-3])
    parser.add_argument("--cores", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(work(options.job, options.text)))
        return
    if options.report:
        rows = best_rates(json.loads(options.json.read_text())["rows"])
        report(rows)
        if options.plot:
            plot(rows, options.plot)
        return
    if not options.text or not list(Path(options.text).glob("*.txt")):
        sys.exit("language_model.py needs --text, a folder with at least two .txt files")

    def job(model, rate, seed):
        return {"model": model, "pattern": MODELS[model], "rate": rate, "seed": seed}

    first = [job(model, rate, 0) for model in options.models for rate in options.rates]
    rows = run_jobs(__file__, first, options.json, options.cores, ["--text", options.text])
    best = {}
    for model in options.models:
        mine = [row for row in rows if row["job"]["model"] == model]
        if mine:
            best[model] = min(mine, key=lambda row: row["result"]["bits_per_byte"])["job"]["rate"]
    more = [job(model, rate, seed) for seed in range(options.seeds) for model, rate in best.items()]
    rows = run_jobs(__file__, more, options.json, options.cores, ["--text", options.text])
    report(rows)
    if options.plot:
        plot(rows, options.plot)


def best_rates(rows: list[dict]) -> list[dict]:
    """The rows of each model's best rate on seed 0."""
    first = sorted((row for row in rows if row["job"]["seed"] == 0), key=lambda row: -row["result"]["bits_per_byte"])
    best = {row["job"]["model"]: row["job"]["rate"] for row in first}
    return [row for row in rows if row["job"]["rate"] == best[row["job"]["model"]]]


def by_model(rows: list[dict]) -> dict[str, list[dict]]:
    """Model to its rows, best mean first."""
    groups = {}
    for row in rows:
        groups.setdefault(row["job"]["model"], []).append(row)
    return dict(sorted(groups.items(), key=lambda item: mean_stderr(item[1], "bits_per_byte")[0]))


def mean_stderr(rows: list[dict], name: str) -> tuple[float, float]:
    values = [row["result"][name] for row in rows]
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def report(rows: list[dict]) -> None:
    print("| model | rate | parameters | state bytes at 4k | bits/byte | at 4x length | seeds | tie with |")
    print("|---|---|---|---|---|---|---|---|")
    groups = by_model(rows)
    scores = {name: mean_stderr(group, "bits_per_byte") for name, group in groups.items()}
    order = list(groups)
    for name, group in groups.items():
        mean, error = scores[name]
        # Two means differ if their difference is above twice its standard error.
        ties = [other for other in order if other != name
                and abs(scores[other][0] - mean) <= 2 * math.hypot(error, scores[other][1])]  # fmt: skip
        result = group[0]["result"]
        print(f"| {name} | {group[0]['job']['rate']:g} | {result['parameters']:,} | {result['cache_bytes_long']:,} | "
              f"{mean:.4f} ± {error:.4f} | {mean_stderr(group, 'bits_per_byte_long')[0]:.4f} | {len(group)} | "
              f"{', '.join(ties)} |")  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_model(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 7))
    names = list(groups)[::-1]
    scores = [mean_stderr(groups[name], "bits_per_byte") for name in names]
    left.errorbar([m for m, _ in scores], range(len(names)), xerr=[2 * e for _, e in scores], fmt="o", capsize=3)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("bits a byte, mean and two standard errors over seeds")
    left.grid(alpha=0.3)
    styles = [(colour, line) for line in ("-", "--", ":") for colour in plt.get_cmap("tab10").colors]
    for name, (colour, line) in zip(groups, styles):
        tables = [row["result"]["bits_by_position"] for row in groups[name]]
        means = [statistics.mean(column) for column in zip(*tables)]
        at = [(i + 0.5) * LENGTH // 4 for i in range(len(means))]
        right.plot(at, means, line, color=colour, label=name)
    right.axvline(LENGTH, color="grey", lw=1)
    right.set_xlabel("position in the window (training length marked)")
    right.set_ylabel("bits a token")
    right.legend(fontsize=7, ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
