"""slm on a folder or a GGUF file: python known_slm.py JOB.json."""

import json
import time
from pathlib import Path

import numpy as np
from known import Scores, job, loaded, peak_mb
from turns import serve

job = job()


def version() -> str:
    import jax

    return f"jax {jax.__version__}"


def opened(path=None):
    import jax
    import jax.numpy as jnp

    import slm

    int8 = job["dtype"] == "int8"
    model = slm.from_pretrained(path or job["model"], dtype=jnp.float32 if int8 else getattr(jnp, job["dtype"]))
    model = slm.quantize(model, "int8") if int8 else model
    jax.block_until_ready(model.params)
    return model


def export():
    """Writes what the other engines read: tokens, GGUF files, folders of safetensors."""
    import slm

    model, folder = opened(), Path(job["folder"])
    ids = model.tokenizer.encode(Path(job["text_file"]).read_text(encoding="utf-8"))
    count, T = job["windows"], job["length"]
    np.save(folder / "tokens.npy", ids[: count * T].reshape(count, T))
    for kind in job["gguf"]:
        slm.save_gguf(model, folder / f"{kind}.gguf", kind)
    for kind in job["folders"]:
        slm.save_pretrained(model, folder / kind, dtype=kind)
    print(json.dumps({"version": version(), "tokens": len(ids)}))


def logits():
    import jax

    import slm

    model = opened()
    scores = Scores(job, model.config.model.vocab_size)

    @jax.jit
    def forward(params, tokens_BxT):
        return slm.logits(slm.LanguageModel(params, model.config, None, model.dtype), tokens_BxT)

    for row in scores.tokens:
        scores.add(np.asarray(forward(model.params, row[None])[0]))
    scores.answer(version=version())


def embed():
    """Ids come from the folder's own tokenizer.json, with its [CLS] and [SEP]."""
    import slm

    model = opened()
    backend = model.tokenizer.backend
    ids = [backend.encode(text, add_special_tokens=True).ids for text in job["sentences"]]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    mask = np.zeros_like(tokens)
    for row, found in enumerate(ids):
        tokens[row, : len(found)], mask[row, : len(found)] = found, 1
    np.save(job["vectors"], np.asarray(slm.logits(model, tokens, attention_mask=mask)))
    print(json.dumps({"version": version(), "ids": ids}))


def load():
    def prepare():
        import jax

        import slm

        jax.devices(), slm.from_pretrained

    print(json.dumps(loaded(prepare, opened, version)))


def floor():
    """safetensors alone: every tensor of the folder, read once."""

    def prepare():
        import safetensors.numpy  # noqa: F401

    def read():
        import ml_dtypes  # noqa: F401  (bfloat16 in numpy)
        from safetensors import safe_open

        for file in sorted(Path(job["model"]).glob("*.safetensors")):
            with safe_open(file, framework="numpy") as tensors:
                held = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
        return held

    def version():
        import safetensors

        return f"safetensors {safetensors.__version__}"

    print(json.dumps(loaded(prepare, read, version)))


def speed():
    """Decoding is what slm.generate runs, greedy: `decode` tokens after the one that the prompt gives."""
    from slm.evaluation.decoding import Decoding
    from slm.evaluation.sampling import make_sampling

    model = opened()
    prompt = np.load(job["tokens"])[0]
    sampling = make_sampling(temperature=0.0)

    def started(length: int, count: int) -> Decoding:
        import jax

        one = Decoding(model.transformer, model.params, [prompt[:length]], max_new_tokens=count, sampling=sampling)
        jax.block_until_ready(one._state[1])
        return one

    def turn():
        start = time.perf_counter()
        started(job["prefill"], 1)
        prefill = time.perf_counter() - start
        decoding = started(job["prompt"], job["decode"] + 1)
        start = time.perf_counter()
        decoding.advance(job["decode"] + 1)
        return {"prefill_seconds": prefill, "decode_seconds": time.perf_counter() - start, "peak_mb": peak_mb()}

    turn()
    serve({"version": version()}, turn)


TASKS = {"export": export, "logits": logits, "embed": embed, "load": load, "floor": floor, "speed": speed}
TASKS[job["task"]]()
