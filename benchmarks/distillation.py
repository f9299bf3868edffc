"""When does a teacher help? Students with and without one, equal initialisation, batches and steps.

    python benchmarks/distillation.py PATH_TO/wikitext-2/valid.txt [--json FILE] [--regimes NAME ...] [--seeds 1 2 3]
        [--cores N]

Characters of 96 kinds, windows of 64, batches of 32; nats a character of the last 100,000 characters, which nobody is
trained on. Two regimes: little text for the student and plenty for its teacher, where a teacher tells what the text
cannot; and plenty for both but few steps, where its soft targets may only slow the student down. A teacher that was
never trained is the control: it must hurt. `samples` is what the teacher thinks of text that the student writes, nats a
character: what reverse KL and the student's own text (GKD) are for.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from pool import run_jobs

T, B, TEST = 64, 32, 100_000
LETTERS = "\n" + "".join(map(chr, range(32, 127)))
PROMPT = 16
REGIMES = {
    "little text": {
        "teacher": {"layers": 3, "width": 96, "heads": 4, "steps": 1500, "rate": 3e-3, "text": 1_000_000},
        "student": {"layers": 2, "width": 64, "heads": 4, "steps": 500, "rate": 3e-3, "text": 20_000},
    },
    "few steps": {
        "teacher": {"layers": 4, "width": 128, "heads": 4, "steps": 3000, "rate": 3e-3, "text": 1_000_000},
        "student": {"layers": 2, "width": 48, "heads": 4, "steps": 400, "rate": 4e-3, "text": 1_000_000},
    },
}
ARMS = {
    "no teacher": None,
    "alpha 0.9": {},
    "alpha 0.9, temperature 2": {"temperature": 2.0},
    "alpha 1": {"alpha": 1.0},
    "alpha 0.5, temperature 2": {"alpha": 0.5, "temperature": 2.0},
    "reverse KL, alpha 0.5": {"loss": "reverse_kl", "alpha": 0.5},
    "reverse KL, alpha 1": {"loss": "reverse_kl", "alpha": 1.0},
    "GKD: reverse KL, half on policy": {"loss": "reverse_kl", "alpha": 1.0, "on_policy": 0.5},
    "hidden states": {"hidden": 0.3},
    "relations": {"relations": 0.3, "relation_heads": 4},
    "untrained teacher": {},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "text", type=Path, help="valid.txt of WikiText-2, or any text of more than a million characters"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps, to see that it runs")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--work", type=Path, help="where teachers are kept")
    parser.add_argument("--job", type=json.loads)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(work(options.text, options.work, **options.job)))
        return
    if not options.text.is_file():
        raise SystemExit(f"no text {options.text}: name the valid.txt of WikiText-2")
    with tempfile.TemporaryDirectory() as folder:
        place = options.work or Path(folder)
        place.mkdir(exist_ok=True)
        results = options.json or Path(folder) / "results.json"
        extra = [str(options.text), "--work", str(place)]
        common = {"scale": options.scale}
        teachers = [{"regime": regime, "arm": "teacher", "seed": 0} | common for regime in options.regimes]
        # Without its parameters a teacher's figures are of no use, so teachers are made again.
        made = run_jobs(__file__, teachers, place / "teachers.json", options.cores, extra)
        jobs = [
            {"regime": regime, "arm": arm, "seed": seed} | common
            for regime in options.regimes
            for seed in options.seeds
            for arm in options.arms
        ]
        rows = run_jobs(__file__, jobs, results, options.cores, extra)
        if options.json:
            record = json.loads(results.read_text())
            record["teachers"] = made
            results.write_text(json.dumps(record, indent=1) + "\n")
    show(options, made, rows)


def show(options, made, rows):
    """The table: mean over seeds, and what of the way from no teacher to the teacher was gone."""
    for regime in options.regimes:
        teacher = next(row["result"]["nats"] for row in made if row["job"]["regime"] == regime)
        print(f"\n{regime}: teacher {teacher:.3f}")
        alone = values(rows, regime, "no teacher", "nats")
        for arm in options.arms:
            nats = values(rows, regime, arm, "nats")
            samples = values(rows, regime, arm, "samples")
            closed = [(a - n) / (a - teacher) for a, n in zip(alone, nats)]
            each = " ".join(f"{n:.3f}" for n in nats)
            share = f"{100 * statistics.mean(closed):6.0f} %" if closed else ""
            print(f"  {arm:34} {statistics.mean(nats):.3f} ({each}) {share}  samples {statistics.mean(samples):.3f}")


def values(rows, regime, arm, name):
    found = [row for row in rows if row["job"]["regime"] == regime and row["job"]["arm"] == arm]
    return [row["result"][name] for row in sorted(found, key=lambda row: row["job"]["seed"])]


def work(text: Path, place: Path, regime: str, arm: str, seed: int, scale: float) -> dict:
    import jax

    from slm.compress.distill import distill_objective
    from slm.compress.rollout import is_on_policy, make_rollout
    from slm.models.transformer import Transformer
    from slm.training.step import Techniques

    ids = read(text)
    train, test = ids[:-TEST], ids[-TEST:]
    sizes = REGIMES[regime]["teacher" if arm == "teacher" else "student"]
    steps = max(1, round(sizes["steps"] * scale))
    kept = place / f"{regime.replace(' ', '_')}.npz"
    changes = ARMS.get(arm)
    cfg = experiment(sizes, steps, seed, changes)
    teacher = Transformer(experiment(REGIMES[regime]["teacher"], 1, 0, None).model)
    abstract = jax.eval_shape(teacher.init, jax.random.key(0))
    techniques, theirs = None, ()
    if arm not in ("teacher", "untrained teacher"):
        with np.load(kept) as stored:
            params = jax.tree.unflatten(jax.tree.structure(abstract), [stored[f"{i}"] for i in range(len(stored))])
    if arm == "untrained teacher":
        params = teacher.init(jax.random.key(1234))
    if changes is not None:
        techniques = Techniques(objective=distill_objective(cfg, Transformer(cfg.model), teacher), teacher=abstract)
        theirs = (params,)
    program = made(cfg, techniques)
    rollout = jax.jit(make_rollout(cfg, program.transformer, (), len(LETTERS)))
    state = program.init(jax.random.key(seed))
    for step in range(steps):
        batch = windows(
            train[: sizes["text"]], np.random.default_rng((seed, step)).integers(0, sizes["text"] - T - 1, B)
        )
        if is_on_policy(cfg.distill, seed, step):
            batch = rollout(state.params, batch, step)
        state, _ = program.train(state, batch, *theirs)
    starts = np.arange(0, TEST - T - 1, T)
    nats = [
        np.asarray(program.evaluate(state.params, windows(test, starts[i : i + B]))["nats"])
        for i in range(0, len(starts) - B + 1, B)
    ]
    result = {"nats": float(np.mean(nats)), "steps": steps}
    if arm == "teacher":
        np.savez(kept, **{f"{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state.params))})
        return result
    if arm == "untrained teacher":
        with np.load(kept) as stored:
            params = jax.tree.unflatten(jax.tree.structure(abstract), [stored[f"{i}"] for i in range(len(stored))])
    judge = jax.jit(lambda batch: nats_of(teacher, params, batch))
    said = [
        np.asarray(judge(rollout(state.params, windows(test, starts[i : i + B]), 10**6 + i)))[:, PROMPT - 1 :]
        for i in range(0, 8 * B, B)
    ]
    return result | {"samples": float(np.mean(said))}


def nats_of(teacher, params, batch):
    import jax
    import jax.numpy as jnp

    hidden, _ = teacher.hidden(params, batch["tokens"])
    return -jnp.take_along_axis(jax.nn.log_softmax(teacher.logits(params, hidden)), (~batch["targets"])[..., None], -1)[
        ..., 0
    ]


def read(path: Path) -> np.ndarray:
    """int32 ids of at most 1.1 million characters; what is no ASCII letter or sign becomes `~`."""
    place = {letter: number for number, letter in enumerate(LETTERS)}
    text = path.read_text(encoding="utf-8")[: 1_000_000 + TEST]
    return np.array([place.get(letter, place["~"]) for letter in text], np.int32)


def windows(ids, starts):
    text = ids[np.asarray(starts)[:, None] + np.arange(T + 1)]
    at = np.tile(np.arange(T, dtype=np.int32), (len(starts), 1))
    ones = np.ones_like(at)
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "weights": ones.astype(np.float32), "segment_ids": ones,
            "positions": at}  # fmt: skip


def experiment(sizes, steps, seed, distill):
    import slm

    cfg = slm.Experiment(
        seed=seed,
        model=slm.ModelConfig(vocab_size=len(LETTERS), **{k: sizes[k] for k in ("layers", "width", "heads")}),
        data=slm.DataConfig(sequence_length=T, packing="stream"),
        optim=slm.OptimConfig(learning_rate=sizes["rate"], warmup_steps=50),
        train=slm.TrainConfig(steps=steps, batch_size=B),
    )
    if distill is None:
        return cfg
    return slm.override(cfg, {"distill.teacher": "it"} | {f"distill.{name}": value for name, value in distill.items()})


def made(cfg, techniques):
    import jax

    import slm
    from slm.training.mesh import make_mesh
    from slm.training.step import build

    return build(cfg, make_mesh(slm.config.MeshConfig(), jax.devices()[:1]), techniques)


if __name__ == "__main__":
    main()
