"""Does transformers load what slm saves, with equal logits and no tensor missing? Two steps, in two environments:

    PYTHONPATH=.:tests python tests/oracle/check_saved.py write FOLDER     (needs slm)
    python tests/oracle/check_saved.py read FOLDER                         (needs torch and transformers 5)

Every decoder of tests/oracle is loaded, forgets where it came from, and is saved as a model made here would be.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

ENCODERS = ("bert", "distilbert", "albert", "modernbert", "mobilebert")


def write(out: Path) -> None:
    from oracle.weights import ORACLE, weights_of
    from safetensors.numpy import save_file

    import slm

    for path in sorted(ORACLE.glob("*.npz")):
        record = json.loads(path.with_suffix(".json").read_text())
        if record["config"].get("model_type") in (*ENCODERS, "openelm"):
            continue
        source, target = out / "source" / path.stem, out / path.stem
        source.mkdir(parents=True, exist_ok=True)
        (source / "config.json").write_text(json.dumps(record["config"]))
        save_file(weights_of(record["shapes"]), source / "model.safetensors")
        model = dataclasses.replace(slm.from_pretrained(source), origin=None)
        slm.save_pretrained(model, target)
        tokens = np.load(path)["tokens"][:1]
        np.savez(target / "expected.npz", tokens=tokens, logits=np.asarray(slm.logits(model, tokens)))


def read(out: Path) -> None:
    import torch
    import transformers

    for path in sorted(out.glob("*/expected.npz")):
        expected = np.load(path)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, about = load(path.parent, output_loading_info=True, attn_implementation="eager")
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(expected["tokens"])).logits.numpy()
        problems = {name: found for name, found in about.items() if found}
        print(path.parent.name, type(model).__name__, f"{np.abs(logits - expected['logits']).max():.1e}", problems)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
