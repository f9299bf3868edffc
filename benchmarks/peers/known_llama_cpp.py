"""llama.cpp on a GGUF file: python known_llama_cpp.py JOB.json, with llama-cpp-python and numpy."""

import json
import time

import numpy as np
from known import Scores, job, loaded, peak_mb
from turns import serve

job = job()


def opened(context: int, **more):
    import llama_cpp

    kind = {"F32": llama_cpp.GGML_TYPE_F32, "F16": llama_cpp.GGML_TYPE_F16}[job.get("cache", "F16")]
    return llama_cpp.Llama(
        job["model"], n_ctx=context, n_batch=context, n_ubatch=context, n_threads=job["threads"],
        n_threads_batch=job["threads"], type_k=kind, type_v=kind, verbose=False, **more,
    )  # fmt: skip


def version() -> str:
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}"


def logits():
    """`ids`: how the file's tokenizer reads the job's text."""
    T = np.load(job["tokens"]).shape[1]
    model = opened(max(T, 64), logits_all=True)
    scores = Scores(job, model.n_vocab())
    for row in scores.tokens:
        model.reset()
        model.eval(row.tolist())
        scores.add(np.asarray(model.scores[:T], np.float32))
    text = job.get("text")
    ids = model.tokenize(text.encode(), add_bos=False, special=False) if text else None
    scores.answer(version=version(), ids=ids)


def load():
    def prepare():
        import llama_cpp  # noqa: F401

    print(json.dumps(loaded(prepare, lambda: opened(512), version)))


def speed():
    prompt = np.load(job["tokens"])[0].tolist()
    model = opened(job["prefill"] + 8)

    def turn():
        model.reset()
        start = time.perf_counter()
        model.eval(prompt[: job["prefill"]])
        prefill = time.perf_counter() - start
        model.reset()
        model.eval(prompt[: job["prompt"]])
        token = prompt[job["prompt"]]
        start = time.perf_counter()
        for _ in range(job["decode"]):
            model.eval([token])
            token = int(np.argmax(model._ctx.get_logits_ith(-1)[: model.n_vocab()]))
        return {"prefill_seconds": prefill, "decode_seconds": time.perf_counter() - start, "peak_mb": peak_mb()}

    turn()
    serve({"version": version()}, turn)


{"logits": logits, "load": load, "speed": speed}[job["task"]]()
