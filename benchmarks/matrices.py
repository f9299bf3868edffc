"""What one product with a matrix costs in each form that slm has of it: milliseconds, of matrices alone.

    python benchmarks/matrices.py [--sizes 576 2048] [--rows 1 16 256] [--rounds 20] [--json FILE]

D x D matrices and M rows of inputs. Forms: float32; bfloat16; int8 weights with one scale an output; the same with
inputs rounded too, so that products are of integers (W8A8); int4, two codes a byte, in groups of 32; and float32 with
half the columns, as a shrunk model has. Each form is compiled by itself with its matrix as an argument, and checked
against float32; then all take turns, and the best of the rounds counts: of the clock, and of the time that all threads
took together, which other processes disturb less.
"""

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pool import machine

from slm.compress.schemes import Scheme
from slm.models.quantized import stored_bytes
from slm.models.quantized_products import quantized_product

FORMS = {
    "float32": lambda w: w,
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
    "int8": Scheme("int8").pack,
    "int8 x int8": Scheme("int8", activations="int8").pack,
    "int4 g32": Scheme("int4", 32).pack,
    "half the columns": lambda w: w[:, : w.shape[1] // 2],
}
"""Name to what makes the form of a float32 matrix (in, out)."""
ERROR = {
    "float32": 1e-5,
    "bfloat16": 1e-2,
    "int8": 1e-2,
    "int8 x int8": 2e-2,
    "int4 g32": 0.15,
    "half the columns": 1e-5,
}
"""Largest relative error of a product, in the mean square."""


@jax.jit
def product(x, matrix):
    return x @ matrix if isinstance(matrix, jax.Array) else quantized_product(x, matrix)


def measure(size: int, rows: int, rounds: int) -> dict[str, dict]:
    """Name of a form to its milliseconds, bytes and relative error."""
    rng = np.random.default_rng(size + rows)
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((size, size), (rows, size)))
    wanted, calls, found = np.asarray(x @ w), {}, {}
    for name, form in FORMS.items():
        matrix, given = form(w), x.astype(jnp.bfloat16) if name == "bfloat16" else x
        got = np.asarray(product(given, matrix), np.float32)
        right = wanted[:, : got.shape[1]]
        error = float(np.sqrt(np.square(got - right).mean() / np.square(right).mean()))
        if not error < ERROR[name]:
            raise SystemExit(f"{name}, {size} x {size}, {rows} rows: wrong by {error:.3g}")
        calls[name] = (given, matrix)
        found[name] = {"ms": np.inf, "cpu_ms": np.inf, "bytes": stored_bytes(matrix), "error": error}
    for _ in range(rounds):
        for name, arguments in calls.items():
            clocks = {"ms": time.perf_counter, "cpu_ms": time.process_time}
            starts = {key: clock() for key, clock in clocks.items()}
            product(*arguments).block_until_ready()
            for key, clock in clocks.items():
                found[name][key] = min(found[name][key], (clock() - starts[key]) * 1e3)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = {"date": str(date.today()), "machine": machine(), "jax": jax.__version__, "rounds": options.rounds}
    record |= {"device": jax.devices()[0].device_kind, "load_before": os.getloadavg(), "rows": []}
    print("milliseconds by the clock, and of all threads together")
    print(f"{'':18}" + "".join(f"{name:>18}" for name in FORMS))
    for size in options.sizes:
        for rows in options.rows:
            found = measure(size, rows, options.rounds)
            print(
                f"{f'{size}, {rows} rows':18}"
                + "".join(f"{one['ms']:9.2f}{one['cpu_ms']:9.2f}" for one in found.values()),
                flush=True,
            )
            record["rows"].append({"size": size, "rows": rows, "forms": found})
            record["load_after"] = os.getloadavg()
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
