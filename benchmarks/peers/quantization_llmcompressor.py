"""llmcompressor's GPTQ and AWQ for quantization.py: python quantization_llmcompressor.py JOB, a JSON object."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def modifier(method: str, group_size: int):
    """The recipe: int4 around zero in groups, for all matrices of layers; the head stays, as in slm."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "awq":
        return AWQModifier(config_groups=groups, ignore=["re:.*lm_head"])
    # Inputs in their order, as slm's gptq takes them unless told otherwise.
    return GPTQModifier(config_groups=groups, ignore=["re:.*lm_head"], dampening_frac=0.01, actorder=None)


def log_probabilities(model, rows):
    """(windows, T, V)."""
    import torch

    with torch.no_grad():
        return [model(row[None]).logits[0].log_softmax(-1) for row in rows]


def main(job: dict) -> dict:
    import datasets
    import llmcompressor
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    where = Path(job["folder"]) / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    test, valid = (np.load(Path(job["folder"]) / f"{part}.npy") for part in ("test", "valid"))
    rows = torch.tensor(test, dtype=torch.long)
    reference = log_probabilities(model, rows)
    data = datasets.Dataset.from_dict({"input_ids": valid.tolist(), "attention_mask": np.ones_like(valid).tolist()})
    data.set_format("torch")
    start = time.perf_counter()
    llmcompressor.oneshot(
        model=model, processor=tokenizer, dataset=data, recipe=[modifier(job["method"], job["group_size"])],
        max_seq_length=valid.shape[1], num_calibration_samples=len(valid), shuffle_calibration_samples=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    found = log_probabilities(model, rows)
    nats = [-q[:-1].gather(1, row[1:, None]).mean() for q, row in zip(found, rows)]
    kl = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(reference, found)]
    same = [(p.argmax(-1) == q.argmax(-1)).float().mean() for p, q in zip(reference, found)]
    version = f"llmcompressor {llmcompressor.__version__}, torch {torch.__version__}"
    result = {"perplexity": float(np.exp(np.mean(nats))), "kl": float(np.mean(kl)), "agreement": float(np.mean(same))}
    return result | {"seconds_to_quantize": seconds, "version": version}


if __name__ == "__main__":
    # Its log goes to standard output, where the result alone should be.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(main(json.loads(sys.argv[1]))), file=out, flush=True)
