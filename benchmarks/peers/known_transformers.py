"""transformers on a GGUF file (dequantised) or a folder: python known_transformers.py JOB.json, with torch."""

import json
import time
from pathlib import Path

import numpy as np
from known import Scores, job, loaded, peak_mb
from turns import serve

job = job()


def prepare():
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])


def version() -> str:
    import torch
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def opened(cls: str = "AutoModelForCausalLM"):
    import torch
    import transformers

    path = Path(job["model"])
    where = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return getattr(transformers, cls).from_pretrained(**where, dtype=getattr(torch, job["dtype"])).eval()


def logits():
    import torch

    prepare()
    model = opened()
    scores = Scores(job, model.config.vocab_size)
    with torch.inference_mode():
        for row in scores.tokens:
            scores.add(model(torch.from_numpy(row[None]).long()).logits[0].float().numpy())
    scores.answer(version=version())


def embed():
    """Means over the tokens that the mask keeps, of length one."""
    import torch
    import transformers

    prepare()
    model = opened("AutoModel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    batch = tokenizer(job["sentences"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.save(job["vectors"], vectors.numpy())
    print(json.dumps({"version": version(), "ids": [x[: int(m.sum())].tolist() for x, m in
                      zip(batch["input_ids"], batch["attention_mask"])]}))  # fmt: skip


def load():
    def read():
        import torch

        with torch.inference_mode():
            for parameter in opened().parameters():  # files may be mapped: reading is part of loading
                parameter.sum()

    print(json.dumps(loaded(prepare, read, version)))


def speed():
    import torch

    prepare()
    model = opened()
    prompt = torch.from_numpy(np.load(job["tokens"])[:1]).long()

    @torch.inference_mode()
    def turn():
        start = time.perf_counter()
        model(prompt[:, : job["prefill"]], use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        out = model(prompt[:, : job["prompt"]], use_cache=True, logits_to_keep=1)
        token = prompt[:, job["prompt"], None]
        start = time.perf_counter()
        for _ in range(job["decode"]):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return {"prefill_seconds": prefill, "decode_seconds": time.perf_counter() - start, "peak_mb": peak_mb()}

    turn()
    serve({"version": version()}, turn)


{"logits": logits, "embed": embed, "load": load, "speed": speed}[job["task"]]()
