"""Many runs in one program: experiments that differ in their seed and in numbers such as rates train together.

Small models leave a device idle: a step is mostly overhead, or products too small to fill it. `jax.vmap` over runs
makes one program whose every operation is as many times larger. Each run keeps its own folder, rows and checkpoints, as
`slm.train` writes them, and sees the batches that it would see alone, so a packed run can be resumed alone and the
other way round; its numbers agree with those of a separate run up to rounding.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm.config import DistillConfig, Experiment, MeshConfig, flatten
from slm.errors import DivergenceError
from slm.models.counts import flops_per_token
from slm.training import mesh as meshes
from slm.training import precision
from slm.training.checkpoint import Checkpoints
from slm.training.loop import begin
from slm.training.metrics import History
from slm.training.optimizers import make_optimizer
from slm.training.plan import keep_plan, memory_of
from slm.training.progress import Progress
from slm.training.recorder import Recorder, due
from slm.training.run import CHECKPOINTS, METRICS, Run, filled_in, finished_run, prepare, resumable
from slm.training.signals import StopRequest
from slm.training.step import Program, build, compiler_options, make_train_step

NUMBERS = (
    "optim.learning_rate", "optim.weight_decay", "optim.b2", "optim.eps", "distill.alpha", "distill.temperature",
)  # fmt: skip
"""Fields that enter the step as arrays, so that one program serves all of their values."""
LAG = 1
"""Steps that the host lets the device run ahead before it reads a metric."""


class Outcome(NamedTuple):
    """What became of one run of a pack."""

    run: Run
    error: str | None
    """Why it ended early; None if it did not."""


def pack_key(cfg: Experiment) -> tuple | None:
    """Equal for experiments that can train together; None for one that must train alone."""
    alone = (
        cfg.prune.on or cfg.quantize.on or cfg.convert.on or cfg.shrink.on or not _taught_simply(cfg.distill)
        or cfg.model.init_from is not None or cfg.optim.only or cfg.train.precision == "float16"
        or cfg.model.head != "lm" or (cfg.mesh.fsdp, cfg.mesh.tensor) != (1, 1)
        or cfg.log.tensorboard or cfg.log.wandb or cfg.log.profile
    )  # fmt: skip
    if alone or jax.process_count() > 1:
        return None
    free = {"name", "dir", "seed", "log.console", *NUMBERS}
    return tuple((path, value) for path, value in flatten(cfg).items() if path not in free)


def _taught_simply(distill: DistillConfig) -> bool:
    """Without a teacher, or by one whose logits are all that is asked of it: what is learned beside the model begins
    with the seed, and text that a student writes is its own."""
    further = distill.hidden or distill.attention or distill.relations or distill.on_policy
    return not (distill.cached or further or distill.loss == "uld")


def packs(cfgs: Sequence[Experiment], most: int = 32) -> list[list[int]]:
    """Numbers of experiments that train together, in the order of the first of each; alone: lists of one."""
    groups: dict[Any, list[int]] = {}
    for number, cfg in enumerate(cfgs):
        key = pack_key(cfg)
        groups.setdefault(("alone", number) if key is None else key, []).append(number)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def train_pack(cfgs: Sequence[Experiment], show: bool = True) -> list[Outcome]:
    """Trains experiments of one `pack_key`, each as `slm.train` would. Those that are finished are not touched.

    A stop (Ctrl-C, SIGTERM) saves all of them; a divergence ends one of them. Lanes are spread over the devices of this
    process where their number divides.

    Raises what slm.train raises before the first step.
    """
    from slm.compress.lessons import lessons
    from slm.compress.techniques import teaching_of, techniques_of
    from slm.data.pipeline import check_vocabulary, open_data

    outcomes: dict[int, Outcome] = {
        number: Outcome(run, None) for number, cfg in enumerate(cfgs) if (run := finished_run(cfg))
    }
    left = [number for number in range(len(cfgs)) if number not in outcomes]
    if not left:
        return [outcomes[number] for number in range(len(cfgs))]
    data = {seed: open_data(cfgs[0].data, seed) for seed in {cfgs[number].seed for number in left}}
    some = next(iter(data.values()))
    filled = {number: filled_in(cfgs[number], some.tokenizer.vocab_size) for number in left}
    check_vocabulary(some.tokenizer, filled[left[0]].model.vocab_size)
    first = dataclasses.replace(filled[left[0]], mesh=MeshConfig())
    teaching = teaching_of(first, _one_device(), some)
    techniques = techniques_of(first, teaching)
    program = build(first, _one_device(), techniques)
    theirs = lessons(first, program, techniques, teaching, some).teacher
    with contextlib.ExitStack() as stack:
        lanes = []
        for number in left:
            cfg = filled[number]
            prepare(cfg, some.tokenizer, resumable(cfg))
            checkpoints = Checkpoints(cfg.run_dir / CHECKPOINTS, cfg.checkpoint)
            stack.callback(checkpoints.close)
            state, meta = begin(cfg, program, checkpoints, data[cfg.seed])
            lanes.append(_Lane(number, cfg, state, meta, checkpoints, data[cfg.seed]))
        # After a kill between two saves some are further than others: each part goes on by itself.
        parts: dict[int, list[_Lane]] = {}
        for lane in lanes:
            parts.setdefault(int(lane.state.step), []).append(lane)
        stop = stack.enter_context(StopRequest())  # one for all parts: a stop is not for the first alone
        for _, together in sorted(parts.items()):
            with contextlib.ExitStack() as opened:
                for lane in together:
                    lane.open(opened, program, show and lane is together[0])
                finished = _train(together, program, teaching, theirs, stop)
            for lane in together:
                done = finished and lane.error is None
                outcomes[lane.number] = Outcome(Run(lane.cfg.run_dir, lane.history.rows, done), lane.error)
    return [outcomes[number] for number in range(len(cfgs))]


@dataclasses.dataclass
class _Lane:
    """One run of a pack."""

    number: int
    cfg: Experiment
    state: Any
    meta: dict
    checkpoints: Checkpoints
    data: Any
    error: str | None = None

    def open(self, stack, program, show: bool) -> None:
        start = int(self.state.step)
        self.history = History(self.cfg.run_dir / METRICS, start)
        stack.callback(self.history.close)
        # One bar for all of them: that of the first.
        self.progress = stack.enter_context(Progress(show and self.cfg.log.console, start, self.cfg.train.steps))
        self.recorder = Recorder(
            self.cfg.train, self.cfg.train.max_loss or 3 * math.log(self.cfg.model.vocab_size),
            flops_per_token(self.cfg.model, self.cfg.data.sequence_length)["train"], None,
            (self.meta["tokens"], self.meta["loss"]), self.history, [], self.progress,
        )  # fmt: skip

    def took(self, step: int, metrics: dict) -> None:
        """A divergence ends this lane: its numbers are not read any more, the others go on."""
        if self.error is None:
            try:
                self.recorder.push(step, metrics)
                self.recorder.settle(step)
            except DivergenceError as error:
                self.error = str(error)

    def save(self, state: Any, step: int, validation: dict) -> None:
        if self.error is None and bool(_finite(state)):
            meta = self.meta | {"tokens": self.recorder.tokens, "loss": self.recorder.loss}
            self.checkpoints.save(state, step, meta, validation)
        elif self.error is None:
            self.error = f"step {step}: the parameters or the optimizer's state hold an infinity or a NaN"


def _train(lanes: list[_Lane], program: Program, teaching: Any, theirs: tuple, stop: StopRequest) -> bool:
    """Steps of all lanes together, from the same step on. Returns whether they got to the last.

    Args:
      teaching, theirs: slm.compress.teacher.Teaching or None, and the teacher's parameters, which all lanes share.
      stop: asked before every step; set before the first, only what has been trained so far is reported.
    """
    from slm.data.prefetch import prefetch
    from slm.evaluation.bits_per_byte import evaluate_batches

    cfg, count = lanes[0].cfg, len(lanes)
    numbers = {path: jnp.array([flatten(lane.cfg)[path] for lane in lanes], jnp.float32) for path in NUMBERS}
    shared = len({lane.cfg.seed for lane in lanes}) == 1
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices[: math.gcd(count, len(devices))]), ("lane",))
    lane_wise, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("lane",), ()))
    states = jax.device_put(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(lane.state for lane in lanes)), lane_wise)
    numbers, theirs = jax.device_put(numbers, lane_wise), jax.device_put(theirs, everywhere)
    batch_axis, batch_place = (None, everywhere) if shared else (0, lane_wise)
    for lane in lanes:
        lane.state = None
    step_of_one = functools.partial(packed_step, cfg, program.transformer, teaching)
    together = jax.jit(
        jax.vmap(step_of_one, (0, 0, batch_axis, *[None] * len(theirs))),
        donate_argnums=1, in_shardings=(lane_wise, lane_wise, batch_place, *[everywhere] * len(theirs)),
        out_shardings=(lane_wise, lane_wise),
        compiler_options=compiler_options(devices[0].platform),
    )  # fmt: skip

    def rows(step: int) -> dict[str, np.ndarray]:
        drawn = [lane.data.train_batch(step, cfg.train.batch_size, 0, 1) for lane in (lanes[:1] if shared else lanes)]
        return drawn[0] if shared else {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}

    def evaluate(state, lane) -> dict[str, float]:
        if lane.data.validation is None:
            return {}
        size = cfg.train.batch_size // cfg.train.accumulation
        batches = lane.data.validation_batches(size, cfg.train.evaluate_sequences, 0, 1)
        return evaluate_batches(
            program.evaluate, program.evaluation_params(state), batches,
            lambda batch: meshes.place_batch(batch, program.mesh), sources=lane.data.validation.sources,
        )  # fmt: skip

    pending: deque[tuple[int, dict]] = deque()

    def read(ahead: int) -> None:
        """Gives metrics to their lanes, but for those of the last steps that the device may not have done yet."""
        while len(pending) > ahead:
            step, metrics = pending.popleft()
            metrics = jax.device_get(metrics)
            for i, lane in enumerate(lanes):
                lane.took(step, {name: values[i] for name, values in metrics.items()})

    steps, step = cfg.train.steps, int(jax.device_get(states.step[0]))
    start, compiled = step, None
    with contextlib.closing(prefetch(rows, start, 2)) as batches:
        while True:
            stopping, last = stop.agreed(step, cfg.train.log_every), step >= steps
            evaluates = due(step, cfg.train.evaluate_every, steps) and not (
                step == start and all(lane.recorder.has_row(step) for lane in lanes)
            )
            saves = due(step, cfg.checkpoint.every, steps) or (stopping and step > start)
            if last or stopping or evaluates or saves:
                read(0)
                for i, lane in enumerate(lanes):
                    if lane.error is not None:
                        continue
                    with lane.recorder.pause():
                        state = jax.device_put(jax.tree.map(lambda a, i=i: a[i], states), _one_device().devices.flat[0])
                        validation = evaluate(state, lane) if evaluates else {}
                        if evaluates:
                            lane.recorder.evaluated(step, validation)
                        if saves:
                            lane.save(state, step, validation)
            if last or stopping or all(lane.error is not None for lane in lanes):
                break
            batch = jax.device_put(next(batches), batch_place)
            if compiled is None:
                begun = time.perf_counter()
                compiled = together.lower(numbers, states, batch, *theirs).compile()
                for lane in lanes:
                    keep_plan(lane.cfg.run_dir, memory_of(compiled), time.perf_counter() - begun, runs=count)
            states, metrics = compiled(numbers, states, batch, *theirs)
            step += 1
            pending.append((step, metrics))
            read(LAG)
        for lane in lanes:
            lane.checkpoints.wait()
    return last


def packed_step(cfg: Experiment, transformer, teaching, numbers: dict[str, jax.Array], state, batch, *theirs):
    """The train step of `cfg` with these of its numbers, which may be traced."""
    for path, value in numbers.items():
        section, field = path.split(".")
        changed = dataclasses.replace(getattr(cfg, section), **{field: value})
        cfg = dataclasses.replace(cfg, **{section: changed})
    optimizer = make_optimizer(cfg.optim, cfg.train.steps, state.params)
    objective = teaching and teaching.objective(cfg)
    return make_train_step(transformer, optimizer, cfg, objective=objective)(state, batch, *theirs)


def _one_device() -> Mesh:
    return meshes.make_mesh(MeshConfig(), jax.local_devices()[:1])


_finite = jax.jit(precision.all_finite)
