"""Time of block-sparse attention against the share of blocks that its pattern keeps.

    python benchmarks/sparse_density.py [--length 8192] [--rounds 5] [--json FILE]

Forward and backward in float32, one sequence. Of the causal blocks a random share is kept, the diagonal ones always;
"window" keeps about as many as the nearest ones. Ideal is the time of the same engine with all blocks, times the share;
exact softmax attention (blocked) is measured beside it. All take turns; medians.
"""

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slm.attention import softmax_attention, sparse_attention
from slm.attention.patterns import Explicit, causal, window
from slm.attention.sparse import blocks_computed
from slm.training.step import compiler_options


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="K = V of a head")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    T, b = options.length, options.block
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (1, T, options.heads, options.size)) for key in keys]
    patterns = {"all": causal}
    for share in (2, 4, 8, 16):
        patterns[f"random 1/{share}"] = random_blocks(T // b, b, 1 / share)
        patterns[f"window 1/{share}"] = causal & window(max(b, T // 2 // share - b // 2))
    functions = {"exact softmax": lambda q, k, v: softmax_attention(q, k, v, implementation="blocked")}
    for name, pattern in patterns.items():
        functions[name] = lambda q, k, v, pattern=pattern: sparse_attention(q, k, v, pattern=pattern, block=b)
    programs = {name: compiled(f, arrays) for name, f in functions.items()}
    seconds = {name: [] for name in programs}
    for turn in range(options.rounds + 1):  # the first is a warm-up
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            if turn:
                seconds[name].append(time.perf_counter() - began)
    N, rows = T // b, []
    whole = statistics.median(seconds["all"])
    print("| pattern | share of causal blocks | seconds | times ideal |\n|---|---|---|---|")
    for name, times in seconds.items():
        kept = blocks_computed(patterns[name], T, block=b) / (N * (N + 1) / 2) if name in patterns else 1.0
        median = statistics.median(times)
        rows.append({"pattern": name, "share": kept, "seconds": times, "times_ideal": median / (whole * kept)})
        print(
            f"| {name} | {kept:.4f} | {median:.3f} ({min(times):.3f}-{max(times):.3f}) | {median / whole / kept:.2f} |"
        )
    if options.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__}
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        record = {"date": str(date.today()), "machine": machine, "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def random_blocks(N: int, b: int, share: float) -> Explicit:
    """The diagonal blocks, causal inside, and as many whole ones below as make up the share."""
    keep = np.eye(N, dtype=bool)
    below = np.flatnonzero(np.tril(np.ones((N, N), bool), -1))
    count = max(0, round(share * N * (N + 1) / 2) - N)
    keep.reshape(-1)[np.random.default_rng(0).choice(below, count, replace=False)] = True
    return Explicit.of(np.repeat(np.repeat(keep, b, 0), b, 1) & np.tri(N * b, dtype=bool))


def compiled(f, arrays):
    step = jax.grad(lambda q, k, v: (f(q, k, v) * jnp.sin(jnp.arange(v.shape[-1]))).sum(), argnums=(0, 1, 2))
    return jax.jit(step, compiler_options=compiler_options(jax.default_backend())).lower(*arrays).compile()


if __name__ == "__main__":
    main()
