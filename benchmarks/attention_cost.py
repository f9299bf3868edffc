"""What each mechanism costs on this machine: time, memory and products of one mixer layer against the length.

    python benchmarks/attention_cost.py [--mechanisms NAME ...] [--lengths 512 ... 32768] [--tokens 32768] [--rounds 3]
                                        [--json FILE] [--plot FILE] [--from-json FILE ...]

Forward and backward of one mixer, its projections included, with gradients of parameters and input; float32; the
number of tokens is fixed, so a cost that is linear in the length is a level line. All lengths of a mechanism take
turns. Time is the median of rounds; memory is what the compiled program needs besides its inputs; products are counted
in the traced program. `softmax xla` is the naive form; beyond --limit FLOPs a program is compiled, to know its memory,
but not run.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp

from slm.config import MixerConfig, ModelConfig
from slm.models.counts import product_flops
from slm.models.mixers import MIXERS, configured
from slm.models.transformer import Transformer
from slm.training.step import compiler_options

NAIVE = "softmax xla"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", nargs="+", default=[NAIVE, *MIXERS])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512 * 2**i for i in range(7)])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=3e12, help="most FLOPs of a program that is run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--from-json", type=Path, nargs="+", default=[], help="rows measured before, instead of new ones"
    )
    options = parser.parse_args()
    rows = [row for path in options.from_json for row in json.loads(path.read_text())["rows"]]
    for name in [] if rows else options.mechanisms:
        rows += measure(name, options)
        report(rows, name)
        if options.json:
            options.json.write_text(json.dumps(record(options, rows), indent=1) + "\n")
    summary(rows)
    if options.plot:
        plot(rows, options.plot)


def layer(name: str, options):
    """((parameters, x) -> sum, abstract (parameters, x) at a length) of one mixer."""
    mechanism, _, implementation = name.partition(" ")
    row = MIXERS[mechanism]
    horizon = max(options.lengths) if row.defaults.horizon else None
    cfg = ModelConfig(vocab_size=8, layers=1, width=options.width, heads=options.heads, attention=(mechanism,),
                      mixer=MixerConfig(implementation=implementation or None, horizon=horizon))  # fmt: skip
    transformer = Transformer(cfg)
    mixer = row.mixer(configured(row, cfg), jnp.float32)
    params = jax.jit(transformer.init)(jax.random.key(0))["blocks"]["0"]["mixer"]
    params = jax.tree.map(lambda leaf: leaf[0], params)

    def loss(params, x_BxTxD):
        B, T, _ = x_BxTxD.shape
        context = transformer._context(jnp.broadcast_to(jnp.arange(T), (B, T)), None)
        y, _ = mixer.apply({"params": params}, x_BxTxD, context)
        return (y * jnp.sin(jnp.arange(y.shape[-1]))).sum()

    return loss, params


def measure(name: str, options) -> list[dict]:
    loss, params = layer(name, options)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows, programs = [], []
    for length in options.lengths:
        x = jax.ShapeDtypeStruct((options.tokens // length, length, options.width), jnp.float32)
        step = jax.grad(loss, argnums=(0, 1))
        flops = product_flops(step, params, x)
        began = time.perf_counter()
        program = jax.jit(step, compiler_options=compiler_options(jax.default_backend())).lower(params, x).compile()
        needs = program.memory_analysis()
        rows.append(
            {
                "mechanism": name,
                "length": length,
                "flops": flops,
                "temporary_bytes": needs.temp_size_in_bytes + needs.output_size_in_bytes,
                "compile_seconds": time.perf_counter() - began,
                "seconds": [],
                "cpu_seconds": [],
            }
        )
        programs.append(program)
    for turn in range(options.rounds + 1):  # the first is a warm-up
        for row, program in zip(rows, programs):
            too_much = row["flops"] > options.limit or row["temporary_bytes"] > memory / 2
            if too_much or (turn > 1 and row["seconds"][0] > 20):
                continue
            x = jax.random.normal(jax.random.key(1), (options.tokens // row["length"], row["length"], options.width))
            jax.block_until_ready(x)
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(params, x))
            if turn:
                row["seconds"].append(time.perf_counter() - wall)
                row["cpu_seconds"].append(time.process_time() - cpu)
    return rows


def median(row: dict) -> float:
    return statistics.median(row["seconds"]) if row["seconds"] else math.nan


def report(rows: list[dict], name: str) -> None:
    for row in rows:
        if row["mechanism"] == name:
            print(
                f"{name:18} T {row['length']:6} {median(row):8.3f} s  {row['temporary_bytes'] / 2**20:9.1f} MB  "
                f"{row['flops'] / 1e9:9.1f} GFLOP  compiled in {row['compile_seconds']:.1f} s",
                flush=True,
            )


def slope(rows: list[dict]) -> float:
    """Growth of log time with log length at a fixed number of tokens, plus one: 1 is linear, 2 quadratic."""
    points = [(math.log(row["length"]), math.log(median(row))) for row in rows if row["seconds"]]
    if len(points) < 2:
        return math.nan
    x, y = (statistics.mean(values) for values in zip(*points))
    return 1 + sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def summary(rows: list[dict]) -> None:
    """A table in Markdown: times by length, slope, and the first length from which on the best softmax is slower."""
    lengths = sorted({row["length"] for row in rows})
    names = list(dict.fromkeys(row["mechanism"] for row in rows))
    table = {name: {row["length"]: row for row in rows if row["mechanism"] == name} for name in names}
    best = {}
    for length in lengths:
        times = [median(table[name][length]) for name in ("softmax", NAIVE) if length in table.get(name, {})]
        best[length] = min((t for t in times if not math.isnan(t)), default=math.inf)
    print("\n| mechanism | " + " | ".join(map(str, lengths)) + " | slope | ahead from | MB at the longest |")
    print("|---|" + "---|" * (len(lengths) + 3))
    for name in names:
        times = {length: median(row) for length, row in table[name].items()}
        ahead = [all(times.get(b, math.nan) < best[b] for b in lengths if b >= a) for a in lengths]
        crossover = next((str(a) for a, yes in zip(lengths, ahead) if yes), "-")
        cells = [f"{times[a]:.2f}" if a in times and not math.isnan(times[a]) else "" for a in lengths]
        memory = table[name][max(table[name])]["temporary_bytes"] / 2**20
        print(
            f"| {name} | "
            + " | ".join(cells)
            + f" | {slope(list(table[name].values())):.2f} | {crossover} | {memory:.0f} |"
        )


FAMILIES = {
    "exact, or chosen by content": ("softmax", "latent", "forgetting", "differential", "selection"),
    "windows, patterns, convolutions": ("sparse", "conv"),
    "feature maps, decay": ("linear", "decay"),
    "delta rule, RWKV, state spaces": ("delta", "rwkv", "mamba", "rglru"),
}
"""Title of a panel to modules of slm.models.mixers; windows of softmax attention belong to the second."""


def family(name: str) -> str:
    row = MIXERS[name.partition(" ")[0]]
    module = row.mixer.__module__.rpartition(".")[2]
    module = "sparse" if module == "softmax" and row.defaults.window else module
    return next(title for title, modules in FAMILIES.items() if module in modules)


def plot(rows: list[dict], path: Path) -> None:
    """Times in a panel for each family, exact softmax attention in all of them; memory and products of all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    exact = [name for name in (NAIVE, "softmax") if any(row["mechanism"] == name for row in rows)]
    names = [name for name in dict.fromkeys(row["mechanism"] for row in rows) if name not in exact]
    styles = [(colour, line) for line in ("-", "--") for colour in plt.get_cmap("tab10").colors]
    figure, axes = plt.subplots(2, 3, figsize=(19, 11), sharex=True)

    def draw(axis, name, value, **style):
        mine = [row for row in rows if row["mechanism"] == name]
        axis.loglog([row["length"] for row in mine], [value(row) for row in mine], **style)

    def bounds(axis, value):
        for name, line in zip(exact, ("k:", "k-")):
            draw(axis, name, value, color="k", ls=line[1:], lw=3, label="softmax, naive" if name == NAIVE else name)

    for axis, title in zip((axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1]), FAMILIES):
        bounds(axis, median)
        for name, (colour, line) in zip((name for name in names if family(name) == title), styles):
            draw(axis, name, median, color=colour, ls=line, lw=1.5, marker=".", label=name)
        axis.set_title(f"seconds: {title}")
        axis.set_ylim(0.1, 40)
        axis.legend(fontsize=8, ncol=2, loc="upper left")
    quantities = (
        ("memory besides inputs, MB", lambda row: row["temporary_bytes"] / 2**20),
        ("matrix products, GFLOP", lambda row: row["flops"] / 1e9),
    )
    for axis, (title, value) in zip(axes[:, 2], quantities):
        bounds(axis, value)
        for colour, shown in zip(plt.get_cmap("tab10").colors, FAMILIES):
            for number, name in enumerate(name for name in names if family(name) == shown):
                draw(axis, name, value, color=colour, lw=1, label=None if number else shown)
        axis.set_title(title)
        axis.legend(fontsize=8)
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("length T")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def record(options, rows: list[dict]) -> dict:
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "plot", "from_json")}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__,
               "device": jax.devices()[0].device_kind, "python": platform.python_version()}  # fmt: skip
    return {
        "date": str(date.today()),
        "machine": machine,
        "load_after": os.getloadavg(),
        "settings": settings,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
