"""slm's own train step, as train.py runs it, as one worker."""

import json
import sys
import time

import jax
import numpy as np
from turns import serve

import slm
from slm.models.counts import parameter_counts
from slm.training.mesh import make_mesh, place_batch
from slm.training.step import build

job = json.loads(sys.argv[1])
B, T = job["batch"], job["length"]
cfg = slm.Experiment(
    model=slm.ModelConfig(vocab_size=job["vocab"], layers=job["layers"], width=job["width"], heads=job["heads"],
                          mlp_width=job["mlp_width"], mixer=slm.MixerConfig(qk_norm="none"), **job.get("model", {})),
    data=slm.DataConfig(sequence_length=T, packing="stream"),
    optim=slm.OptimConfig(learning_rate=1e-3),
    train=slm.TrainConfig(batch_size=B, precision=job["precision"]),
)  # fmt: skip
rng = np.random.default_rng(0)
tokens = rng.integers(0, job["vocab"], (B, T + 1), dtype=np.int32)
batch = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "weights": np.ones((B, T), np.float32),
    "segment_ids": np.ones((B, T), np.int32),
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
}
start = time.perf_counter()
mesh = make_mesh(cfg.mesh)
program = build(cfg, mesh)
state = program.init(jax.random.key(0))
compiled = program.train.lower(program.state, program.batch).compile()
batch = place_batch(batch, mesh)
state, metrics = compiled(state, batch)
metrics["loss"].block_until_ready()
first = time.perf_counter() - start


def turn():
    global state
    for _ in range(job["steps"]):
        state, metrics = compiled(state, batch)
    return {"loss": float(metrics["loss"])}


turn()
serve({"first_step_seconds": first, "parameters": parameter_counts(cfg.model)["total"],
       "version": f"jax {jax.__version__}"}, turn)  # fmt: skip
