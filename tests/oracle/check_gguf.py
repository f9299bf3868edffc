"""llama.cpp runs the GGUF files that slm writes: one tiny model of each architecture, logits compared.

    python tests/oracle/check_gguf.py --llama-python PYTHON [--kind F32] [NAME ...]     (PYTHON has llama-cpp-python)

Prints, for each, the largest KL divergence of a position's next-token distribution and the largest difference of
logits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from tiny_gguf import MODELS, TEXT, made, pieces  # noqa: E402

import slm  # noqa: E402
from slm.data.tokenizers import Tokenizer, build_tokenizer  # noqa: E402
from slm.interop.gguf_tokenizer import read_tokenizer  # noqa: E402

HARD = TEXT[:100] + "  Two  spaces, don't; naïve 東京 ½ x²\n\n\tTABS 12345 CATS'LL mat </s>"
LIMITS = {"F32": 1e-5, "F16": 1e-3, "Q8_0": 0.05}
"""Nats. What is left of F32 is llama.cpp's GELU, a table in float16; with Q8_0 it rounds activations to 8 bits too."""


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--kind", default="F32", choices=LIMITS)
    parser.add_argument("names", nargs="*", default=[])
    options = parser.parse_args()
    tokenizer = build_tokenizer("bpe:280", lambda: iter([TEXT]))
    tokens = np.random.default_rng(1).integers(0, 280, (2, 40)).astype(np.int32)
    bad = []
    for name in options.names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            np.save(folder / "tokens.npy", tokens)
            from_pieces = Tokenizer(Backend.from_str(json.dumps(read_tokenizer(pieces()))))
            own = from_pieces if "pieces" in name else tokenizer
            model = made(name, own)
            file = slm.save_gguf(model, folder / "model.gguf", options.kind)
            job = {"task": "logits", "keep": len(tokens), "model": str(file), "cache": "F32", "threads": 2,
                   "tokens": str(folder / "tokens.npy"), "logits": str(folder / "logits.npy"),
                   "text": HARD}  # fmt: skip
            (folder / "job.json").write_text(json.dumps(job))
            peer = ROOT / "benchmarks" / "peers" / "known_llama_cpp.py"
            done = subprocess.run(
                [options.llama_python, str(peer), str(folder / "job.json")], capture_output=True, text=True
            )
            if done.returncode:
                print(f"{name:30} llama.cpp failed: {done.stderr.strip()[-800:]}")
                bad.append(name)
                continue
            theirs = np.load(folder / "logits.npy")
            ids = json.loads(done.stdout.splitlines()[-1])["ids"]
        ours = np.asarray(slm.logits(model, tokens))
        p, q = (log_softmax(x.astype(np.float64)) for x in (ours, theirs))
        kl = (np.exp(p) * (p - q)).sum(-1).max()
        same_ids = ids == own.encode(HARD).tolist()
        print(f"{name:30} KL {kl:.1e}  logits {np.abs(ours - theirs).max():.1e} of {ours.std():.2f}  ids {same_ids}")
        if not (kl < LIMITS[options.kind] and same_ids and ours.std() > 0.3):
            bad.append(name)
    sys.exit(f"disagree: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
