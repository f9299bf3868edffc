"""Three studies with slm.study, at a scale that two cores can afford: what README says of them comes from here.

    python benchmarks/studies.py attention|optimizers|order [--seeds 5] [--folder studies] [--processes 0]

attention: token mixers at equal parameters (the feed-forward's width is solved for), tokens and batches.
optimizers: optimizers by learning-rate schedules, softmax.
order: a model of half the layers, half of its weights zero, all in 4 bits, taught by the whole one for a fixed number
  of steps: which comes first?

In the first two every arm has a learning rate of its own, chosen on a seed that the comparison does not use. Text: the
sources of Python's library and their documentation, which every Python carries; bits a byte on its held-out documents.
Stopped, a study goes on where it was. Writes study_NAME.json (every run, the table, the basins) and study_NAME.html.
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from pool import machine  # noqa: E402

import slm  # noqa: E402

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
SMALL = slm.Experiment(
    model=slm.ModelConfig(layers=4, width=64, heads=2, mlp_width=192),
    data=slm.DataConfig(source=("cpython",), tokenizer="bpe:512", sequence_length=128),
    optim=slm.OptimConfig(warmup_steps=30, schedule="linear", final_ratio=0.0),
    train=slm.TrainConfig(steps=400, batch_size=16, evaluate_every=100, evaluate_sequences=256, log_every=20),
    checkpoint=slm.CheckpointConfig(every=200, keep=1),
)
MIXERS = ["softmax", "forgetting", "window", "linear", "gla", "mamba2", "gated_delta", "qwen3_next"]


def attention(how: dict, seeds: int):
    # A window of a quarter of the training length, so that it is a constraint at this scale.
    windowed = slm.study.when({"model.attention": "window"}, {"model.mixer.window": [32]})
    variants = slm.study.grid({"model.attention": MIXERS}) * windowed
    variants = slm.study.arms({arm.changes["model.attention"][0]: dict(arm.changes) for arm in variants})
    equal = {"match": "parameters", "solve": "model.mlp_width"}
    best, basins = slm.study.tune(SMALL, variants, RATES[1:5], metric="bits_per_byte", **how, **equal)
    return slm.study.ablate(SMALL, best, seeds=seeds, **how, **equal), basins


def optimizers(how: dict, seeds: int):
    names = ["adamw", "muon", "lion", "adafactor"]
    variants = slm.study.grid({"optim.name": names, "optim.schedule": ["linear", "cosine", "wsd"]})
    variants += slm.study.arms(
        {"schedule-free constant": {"optim.name": "schedule_free_adamw", "optim.schedule": "constant"}}
    )
    best, basins = slm.study.tune(SMALL, variants, RATES, metric="bits_per_byte", **how)
    return slm.study.ablate(SMALL, best, seeds=seeds, **how), basins


def order(how: dict, seeds: int):
    steps = 200
    whole = slm.study.ablate(
        slm.override(SMALL, {"optim.learning_rate": 4e-3, "train.steps": 1200}), slm.study.arms({"whole": {}}),
        seeds=[7], **how,
    )  # fmt: skip
    teacher = str(whole.cell("whole").folder)
    base = slm.override(SMALL, {
        "model": slm.ModelConfig(init_from=teacher), "shrink.keep_layers": (0, 3), "distill.teacher": teacher,
        "optim.learning_rate": 2e-3, "optim.warmup_steps": 10, "train.steps": steps, "train.evaluate_every": 50,
    })  # fmt: skip
    zeros = {"prune.sparsity": 0.5, "prune.schedule": "one_shot"}
    bits = {"quantize.scheme": "int4", "quantize.group_size": 32}
    first, middle, last = 0, steps // 2, steps - 1
    arms = {
        "distil, prune, quantize": (last, last), "prune, distil, quantize": (first, last),
        "quantize, distil, prune": (last, first), "prune, quantize, distil": (first, first),
        "distil, prune, distil, quantize": (middle, last), "distil, prune, distil, quantize, distil": (middle, middle),
    }  # fmt: skip
    arms = {
        name: zeros | bits | {"prune.begin_step": pruned, "quantize.begin_step": rounded}
        for name, (pruned, rounded) in arms.items()
    }
    arms["prune gradually, quantize, distil"] = bits | {
        "prune.sparsity": 0.5, "prune.schedule": "cubic", "prune.end_step": 3 * steps // 4,
        "quantize.begin_step": middle,
    }  # fmt: skip
    arms["prune, quantize, text alone"] = arms["prune, quantize, distil"] | {"distill.alpha": 0.0}
    arms["distil, neither pruned nor quantized"] = {}
    return slm.study.ablate(base, slm.study.arms(arms), seeds=seeds, **how), {}


STUDIES = {"attention": attention, "optimizers": optimizers, "order": order}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", default="studies")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    how = {"folder": options.folder, "processes": options.processes}
    runs, basins = STUDIES[options.study](how, options.seeds)
    metrics = ("bits_per_byte", "params", "state_bytes", "flops_per_token")
    table = runs.table(*metrics)
    print(table)
    for name, basin in basins.items():
        print(f"{name}: {basin}")
    kept = ("arm", "seed", "status", "error", "tokens", "loss", "training_loss", "seconds", "packed", "peak_bytes")
    rows = [{name: row[name] for name in (*metrics, *kept, "parameters") if name in row} for row in runs.rows()]
    record = {
        "runs": rows, "table": json.loads(table.json()), "basins": {name: vars(one) for name, one in basins.items()},
        "rates": {arm: runs.cell(arm).config.optim.learning_rate for arm in runs.arms},
        "matched": {name: str(one) for name, one in runs.matches.items()},
        "machine": machine(), "date": str(date.today()),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"study_{options.study}.json").write_text(json.dumps(record, indent=1) + "\n")
    runs.report(options.out / f"study_{options.study}.html", f"Study: {options.study}", metrics)


if __name__ == "__main__":
    main()
