"""llmcompressor's Wanda and SparseGPT for pruning.py: python pruning_llmcompressor.py JOB, a JSON object."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from known import peak_mb


def modifier(row: dict):
    """The recipe of a row; outputs of the model stay dense, as in slm."""
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[row["criterion"]]
    pattern = "0:0" if row["pattern"] == "unstructured" else row["pattern"]
    return kind(sparsity=row["sparsity"], mask_structure=pattern, targets=["Linear"], ignore=["re:.*lm_head"])


def main(job: dict) -> dict:
    import datasets
    import llmcompressor
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    row, where = job["row"], Path(job["folder"]) / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    tokens = {part: np.load(Path(job["folder"]) / f"{part}.npy") for part in ("test", "valid")}
    before, start = peak_mb(), time.perf_counter()
    if row["criterion"] != "dense":
        ids = tokens["valid"].tolist()
        data = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": np.ones_like(tokens["valid"]).tolist()})
        data.set_format("torch")
        llmcompressor.oneshot(
            model=model, processor=tokenizer, dataset=data, recipe=[modifier(row)], max_seq_length=len(ids[0]),
            num_calibration_samples=len(ids), shuffle_calibration_samples=False,
        )  # fmt: skip
    result = {"seconds": time.perf_counter() - start, "before_mb": before, "peak_mb": peak_mb()}
    layers = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    shares = [float((weight == 0).float().mean()) for weight in layers]
    if row["criterion"] != "dense":
        result |= {"zeros": float(np.mean(shares)), "gap": max(abs(share - row["sparsity"]) for share in shares)}
    nll = []
    with torch.no_grad():
        for window in torch.tensor(tokens["test"], dtype=torch.long):
            logits = model(window[None]).logits[0, :-1]
            nll.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    version = f"llmcompressor {llmcompressor.__version__}, torch {torch.__version__}"
    return result | {"nll": float(np.mean(nll)), "perplexity": float(np.exp(np.mean(nll))), "version": version}


if __name__ == "__main__":
    # Its log goes to standard output, where the result alone should be.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(main(json.loads(sys.argv[1]))), file=out, flush=True)
