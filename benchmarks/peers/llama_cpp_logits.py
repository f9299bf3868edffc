"""Logits of a GGUF file by llama.cpp: python llama_cpp_logits.py JOB.json, with llama-cpp-python and numpy.

The job: {"model": FILE.gguf, "tokens": FILE.npy (N, T) int32, "logits": FILE.npy to write (N, T, vocab) float32 or
null, "cache": "F32" or "F16", "threads": int, "text": text to tokenise or null}. Prints one line of JSON: versions, the
tokens of `text`, and nll (N,): the sum over each row's tokens but the first.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

job = json.loads(Path(sys.argv[1]).read_text())
tokens = np.load(job["tokens"])
N, T = tokens.shape
kind = {"F32": llama_cpp.GGML_TYPE_F32, "F16": llama_cpp.GGML_TYPE_F16}[job["cache"]]
model = llama_cpp.Llama(
    job["model"], n_ctx=max(T, 64), n_batch=T, n_ubatch=T, logits_all=True, n_threads=job["threads"],
    n_threads_batch=job["threads"], type_k=kind, type_v=kind, flash_attn=False, verbose=False,
)  # fmt: skip
ids = model.tokenize(job["text"].encode(), add_bos=False, special=False) if job.get("text") else None
out = None
if job.get("logits"):
    out = np.lib.format.open_memmap(job["logits"], "w+", np.float32, (N, T, model.n_vocab()))
nll = []
for row in range(N):
    model.reset()
    model.eval(tokens[row].tolist())
    logits = np.asarray(model.scores[:T], np.float32)
    if out is not None:
        out[row] = logits
    top = logits[:-1].max(-1, keepdims=True)
    log_sum = np.log(np.exp((logits[:-1] - top).astype(np.float64)).sum(-1)) + top[:, 0]
    nll.append(float((log_sum - logits[np.arange(T - 1), tokens[row, 1:]]).sum()))
if out is not None:
    out.flush()
print(json.dumps({"version": f"llama-cpp-python {llama_cpp.__version__}", "nll": nll, "ids": ids}))
