"""Three studies with slm.study, at a scale that two cores can afford: what README says of them comes from here.

    python benchmarks/studies.py attention|optimizers|order|chance [--seeds 3] [--folder studies] [--processes 2]

attention: token mixers at equal parameters (the feed-forward's width is solved for), tokens and batches.
optimizers: optimizers by learning-rate schedules, softmax, at two thirds of the tokens.
order: a model of half the layers, half of its weights zero, all in 4 bits, taught by the whole one for a fixed number
  of steps: which comes first?
chance: does the table cry wolf? 20 seeds of one config split in two at random, many times, must differ as often as the
  level says; and a learning rate that is truly worse must be found as often as the power of the test says.

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

import numpy as np  # noqa: E402
from pool import machine  # noqa: E402

import slm  # noqa: E402
from slm.study.student import t_power  # noqa: E402

SMALL = slm.load_config(HERE.parent / "configs" / "tiny.py")
MIXERS = ["softmax", "forgetting", "window", "gla", "mamba2", "gated_delta", "qwen3_next"]


def attention(how: dict, seeds: int):
    # A window of a quarter of the training length, so that it is a constraint at this scale.
    windowed = slm.study.when({"model.attention": "window"}, {"model.mixer.window": [32]})
    variants = slm.study.grid({"model.attention": MIXERS}) * windowed
    variants = slm.study.arms({arm.changes["model.attention"][0]: dict(arm.changes) for arm in variants})
    equal = {"match": "parameters", "solve": "model.mlp_width"}
    best, basins = slm.study.tune(SMALL, variants, [2e-3, 4e-3, 8e-3, 1.6e-2], metric="bits_per_byte", **how, **equal)
    return slm.study.ablate(SMALL, best, seeds=seeds, **how, **equal), basins


def optimizers(how: dict, seeds: int):
    base = slm.override(SMALL, {"train.steps": 200})
    names = ["adamw", "muon", "lion"]
    variants = slm.study.grid({"optim.name": names, "optim.schedule": ["linear", "cosine", "wsd"]})
    best, basins = slm.study.tune(base, variants, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], metric="bits_per_byte", **how)
    return slm.study.ablate(base, best, seeds=seeds, **how), basins


def order(how: dict, seeds: int):
    steps = 200
    whole = slm.study.ablate(
        slm.override(SMALL, {"train.steps": 1000}), slm.study.arms({"whole": {}}),
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


def chance(how: dict, seeds: int):
    short = slm.override(SMALL, {
        "model.layers": 2, "model.width": 32, "model.mlp_width": 96, "data.tokenizer": "bytes",
        "data.sequence_length": 64, "train.batch_size": 8, "train.steps": 150, "train.evaluate_every": 150,
    })  # fmt: skip
    arms = slm.study.arms({"base": {}, "worse": {"optim.learning_rate": 3.4e-3}})
    return slm.study.ablate(short, arms, seeds=20, **how), {}


def false_alarms(runs, level: float = 0.05, rounds: int = 2000) -> dict:
    """How often halves of the base's seeds differ; how often n seeds find the other arm, beside what is promised."""
    base, worse = (np.array(list(runs.values("bits_per_byte")[arm].values())) for arm in runs.arms)
    chosen, half = np.random.default_rng(0), len(base) // 2
    alarms = {"welch": 0, "paired": 0}
    for _ in range(rounds):
        split = chosen.permutation(len(base))
        a, b = base[split[:half]], base[split[half:]]
        alarms["welch"] += slm.study.verdict(slm.study.welch(a, b, resamplings=0)) != "tie"
        alarms["paired"] += slm.study.verdict(slm.study.paired_difference(a, b, resamplings=0)) != "tie"
    gaps = worse - base
    effect, found = gaps.mean() / gaps.std(ddof=1), {}
    for n in (2, 3, 5, 8):
        hits = 0
        for _ in range(rounds):
            some = chosen.choice(len(base), n, replace=False)
            difference = slm.study.paired_difference(base[some], worse[some], resamplings=0)
            hits += slm.study.verdict(difference) == "worse"
        found[n] = {"found": hits / rounds, "promised": t_power(effect * n**0.5, n - 1, level)}
    return {
        "level": level, "rounds": rounds, "alarms": {name: count / rounds for name, count in alarms.items()},
        "effect": gaps.mean(), "standard_deviation_of_gaps": gaps.std(ddof=1),
        "standard_deviation_of_seeds": base.std(ddof=1), "power": found,
    }  # fmt: skip


STUDIES = {"attention": attention, "optimizers": optimizers, "order": order, "chance": chance}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default="studies")
    parser.add_argument("--processes", type=int, default=2)
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
    if options.study == "chance":
        record["chance"] = false_alarms(runs)
        print(json.dumps(record["chance"], indent=1))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"study_{options.study}.json").write_text(json.dumps(record, indent=1) + "\n")
    runs.report(options.out / f"study_{options.study}.html", f"Study: {options.study}", metrics)


if __name__ == "__main__":
    main()
