"""The training loop.

Resuming. `train(cfg)` looks into the run folder, DIR/NAME:
1. No run, or one without a checkpoint: train from step 0. What such a run logged is dropped.
2. A run with `train.steps` steps done: return it at once, so a command is safe to repeat.
3. A run with fewer: continue from its latest checkpoint, exactly as if it had never stopped. The state is bit-equal,
   the batch is a function of (seed, step), and rows of metrics.jsonl after the checkpoint are dropped and made again.
   The mesh and the number of processes may differ; so may the fields in slm.training.run.FREE.
4. A run with another config, or whose data has changed since: ConfigError or DataError, naming the difference.
5. A latest checkpoint that is damaged: CheckpointError, naming an older one. Nothing falls back by itself.
6. train.overwrite: the run is deleted first.

Order. Each iteration does the same things in the same order: evaluate the state, save it, draw a batch, step, log. A
state is saved after it was evaluated and its row was written, so a checkpoint never lacks what should precede it.
"""

import contextlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from slm.config import Experiment, check
from slm.errors import CheckpointError, ConfigError, DataError, DivergenceError
from slm.models.heads import check_trains
from slm.models.mixers import MIXERS, check_mechanisms, layer_pattern
from slm.training import mesh as meshes
from slm.training import precision, rules
from slm.training.checkpoint import Checkpoints
from slm.training.compilation import enable_compilation_cache
from slm.training.metrics import History, trackers
from slm.training.plan import Plan, keep_plan, make_plan
from slm.training.profiler import Profiler
from slm.training.progress import Progress, make_console, show_plan
from slm.training.recorder import Recorder, due
from slm.training.run import (
    CHECKPOINTS,
    METRICS,
    Run,
    as_settings,
    filled_in,
    finished_run,
    latest_step,
    prepare,
    resumable,
)
from slm.training.schedules import make_schedule
from slm.training.signals import StopRequest
from slm.training.state import TrainState
from slm.training.step import Program, build

LAG = 2
"""Steps that the host runs ahead before it reads metrics: enough to keep the device busy, and a bound on how many
batches wait in its memory."""
PREFETCH = 2
"""Batches made ahead of the step that needs them."""


def train(cfg: Experiment) -> Run:
    """Trains the experiment, or continues it, or finds it finished: see the module's docstring.

    Raises:
      ConfigError: fields contradict each other, or the run folder holds another experiment.
      DataError: a source cannot be read, is too small, or has changed since the run began.
      CheckpointError: the latest checkpoint is damaged or of another shape, or one cannot be written.
      DivergenceError: a loss was NaN or above train.max_loss; names the step. The last good checkpoint is kept.
    """
    from slm.compress.lessons import lessons
    from slm.compress.start import starting_config
    from slm.compress.techniques import teaching_of, techniques_of
    from slm.data.cache import cache_folder
    from slm.data.pipeline import check_vocabulary, open_data

    cfg = starting_config(check(cfg))
    check_mechanisms(cfg.model)
    check_trains(cfg.model)
    apart = [name for name in layer_pattern(cfg.model) if MIXERS[name].mixer.own_loss]
    if cfg.train.precision == "float16" and apart:
        raise ConfigError(
            f"train.precision = float16: {apart[0]} layers have a loss of their own, which is not scaled with the "
            "objective, so its gradients would vanish; use bfloat16 or float32"
        )
    make_schedule(cfg.optim, cfg.train.steps)
    enable_compilation_cache(cache_folder(cfg.data.cache) / "xla")
    joined = meshes.initialise_distributed(cfg.mesh)
    main = jax.process_index() == 0
    console = make_console(main and cfg.log.console)
    if run := finished_run(cfg):
        console.print(f"{run.dir} has its {cfg.train.steps} steps already: nothing to do", soft_wrap=True)
        return run
    # What can be refused is refused before the run folder is touched, and before minutes of compilation.
    mesh = meshes.make_mesh(cfg.mesh)
    meshes.check_mesh(mesh, cfg.model, cfg.train)
    data = open_data(cfg.data, cfg.seed)
    hides = cfg.model.head == "masked_lm"
    cfg = filled_in(cfg, data.tokenizer.vocab_size + (hides and data.tokenizer.mask is None))
    check_vocabulary(data.tokenizer, cfg.model.vocab_size)
    masking_of(cfg, data)
    data.train_batch(0, cfg.train.batch_size, jax.process_index(), jax.process_count())
    teaching = teaching_of(cfg, mesh, data)
    techniques = techniques_of(cfg, teaching)
    program = build(cfg, mesh, techniques)
    resuming = resumable(cfg)
    if main:
        prepare(cfg, data.tokenizer, resuming)
    _barrier("the run folder is there")
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(cfg.run_dir / CHECKPOINTS, cfg.checkpoint)
        stack.callback(checkpoints.close)
        state, meta = begin(cfg, program, checkpoints, data)
        start = int(state.step)
        plan = make_plan(cfg, program)
        if main:
            keep_plan(cfg.run_dir, plan.memory, plan.compile_seconds)
        show_plan(cfg, plan, data.summary(), console)
        if joined:
            console.print(joined)
        history = History(cfg.run_dir / METRICS, start, write=main)
        stack.callback(history.close)
        followers = trackers(cfg.log, cfg.run_dir, start, as_settings(cfg)) if main else []
        for follower in followers:
            stack.callback(follower.close)
        progress = stack.enter_context(Progress(main and cfg.log.console, start, cfg.train.steps))
        recorder = Recorder(
            cfg.train,
            cfg.train.max_loss or 3 * math.log(cfg.model.vocab_size),
            plan.flops_per_token,
            _peak_flops(plan),
            (meta["tokens"], meta["loss"]),
            history,
            followers,
            progress,
        )
        learns = lessons(cfg, program, techniques, teaching, data)
        del teaching  # its copy of the teacher's parameters
        try:
            finished = _run(cfg, plan, data, learns, state, meta, checkpoints, recorder, progress)
        except DivergenceError as error:
            raise DivergenceError(f"{error}. {_advice(checkpoints)}") from None
    if not finished:
        saved = latest_step(cfg.run_dir) is not None
        what = "stopped and saved" if saved else "stopped before the first step, so nothing was saved"
        again = f"run the same command again to {'resume' if saved else 'start'}"
        console.print(f"{what} in {cfg.run_dir}: {again}", soft_wrap=True)
    return Run(cfg.run_dir, history.rows, finished)


def _run(cfg: Experiment, plan: Plan, data, learns, state: TrainState, meta, checkpoints, recorder, progress) -> bool:
    """The loop itself, from `state`. Returns whether it got to the last step."""
    steps, start = cfg.train.steps, int(state.step)
    step = start
    evaluate = _evaluator(cfg, plan, data)
    made = _batches(cfg, plan, data, learns, start)
    with StopRequest() as stop, Profiler(cfg.log, cfg.run_dir) as profiler, made as batches:
        while True:
            stopping = stop.agreed(step, cfg.train.log_every)
            last = step >= steps
            # What was due at the step of a checkpoint had been done before it was saved.
            evaluates = due(step, cfg.train.evaluate_every, steps) and not (step == start and recorder.has_row(step))
            saves = due(step, cfg.checkpoint.every, steps) or (stopping and step > start)
            if stopping:
                progress.say(
                    f"{stop.signal.name if stop.signal else 'another process was told to stop'}: at step {step}"
                )
            if last or stopping or evaluates or saves:
                recorder.settle(step)
                with recorder.pause():
                    validation = evaluate(state) if evaluates else {}
                    if evaluates:
                        recorder.evaluated(step, validation)
                    if saves:
                        _save(state, step, meta, checkpoints, recorder, validation)
            if last or stopping:
                break
            batch = next(batches)
            profiler.before(step + 1)
            state, metrics = plan.compiled(state, learns.rewrite(state, batch, step), *learns.teacher)
            step += 1
            recorder.push(step, metrics)
            recorder.settle(step - LAG)
            profiler.after(step, state)
        checkpoints.wait()
    return last


def begin(cfg: Experiment, program: Program, checkpoints: Checkpoints, data: Any) -> tuple[TrainState, dict]:
    """The state to start from and the `meta` of its checkpoint: the latest one, or a fresh state."""
    meta = {
        "config": as_settings(cfg),
        "data": data.fingerprint,
        "version": _version(),
        "tokens": 0.0,
        "loss": None,
    }
    if checkpoints.latest() is None:
        if cfg.model.init_from is not None:
            return _start_from(cfg, program, data), meta
        return program.init(jax.random.key(cfg.seed)), meta
    stored = checkpoints.read_meta()
    if stored["data"] != data.fingerprint:
        raise DataError(
            f"the data of {cfg.run_dir} has changed since it was trained (data.source or the tokenizer): restore it to "
            "resume, or use --name for a new run"
        )
    state, _ = checkpoints.restore(program.state)
    return state, meta | {"tokens": stored["tokens"], "loss": stored["loss"]}


def _start_from(cfg: Experiment, program: Program, data: Any) -> TrainState:
    from slm.compress.start import starting_params
    from slm.interop.starting import keep_origin

    abstract = dict(zip(rules.paths(program.state.params), jax.tree.leaves(program.state.params), strict=True))
    params, origin = starting_params(cfg, lambda path, array: jax.device_put(array, abstract[path].sharding), data)
    if origin is not None and jax.process_index() == 0:
        keep_origin(origin, cfg.run_dir)
    return program.start(params)


def _save(state: TrainState, step: int, meta: dict, checkpoints: Checkpoints, recorder: Recorder, validation) -> None:
    # The loss of a step is computed before its update, so only the state itself can tell that the update was sound.
    if not bool(jax.jit(precision.all_finite)(state)):
        raise DivergenceError(f"step {step}: the parameters or the optimizer's state hold an infinity or a NaN")
    checkpoints.save(state, step, meta | {"tokens": recorder.tokens, "loss": recorder.loss}, validation)


def _advice(checkpoints: Checkpoints) -> str:
    failed = ""
    try:
        checkpoints.wait()
    except CheckpointError as error:  # must not hide the divergence
        failed = f". Besides, {error}"
    latest = checkpoints.latest()
    kept = "There is no checkpoint yet" if latest is None else f"The last good checkpoint, step {latest}, is kept in "
    where = "" if latest is None else str(checkpoints.folder)
    return f"{kept}{where}. Lower optim.learning_rate, lengthen optim.warmup_steps, or set optim.clip_norm{failed}"


def masking_of(cfg: Experiment, data):
    """The slm.data.masking.Masking of a run; None unless model.head = masked_lm. Raises ConfigError if it cannot be."""
    from slm.data.masking import Masking

    if cfg.model.head != "masked_lm":
        return None
    return Masking.create(cfg.data.mask_fraction, data.tokenizer, cfg.model.vocab_size, cfg.seed)


def _evaluator(cfg: Experiment, plan: Plan, data) -> Callable[[TrainState], dict[str, float]]:
    """state -> validation metrics of the weights that would be shipped; {} if nothing is held out."""
    from slm.evaluation.bits_per_byte import evaluate_batches

    masking = masking_of(cfg, data)

    def evaluate(state: TrainState) -> dict[str, float]:
        if data.validation is None:
            return {}
        # No more rows at once than training holds.
        batches = data.validation_batches(
            cfg.train.batch_size // cfg.train.accumulation,
            cfg.train.evaluate_sequences,
            jax.process_index(),
            jax.process_count(),
        )
        if masking is not None:
            batches = map(masking.validation, batches)
        return evaluate_batches(
            plan.program.evaluate,
            plan.program.evaluation_params(state),
            batches,
            lambda batch: meshes.place_batch(batch, plan.program.mesh),
            sources=data.validation.sources,
        )

    return evaluate


@contextlib.contextmanager
def _batches(cfg: Experiment, plan: Plan, data, learns, start: int) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """Placed batches of the updates after `start`, made ahead in the background."""
    from slm.data.prefetch import prefetch

    masking = masking_of(cfg, data)

    def local_rows(step: int) -> dict[str, np.ndarray]:
        share = step, cfg.train.batch_size, jax.process_index(), jax.process_count()
        batch = data.train_batch(*share) | learns.entries(*share)
        rows = len(batch["tokens"])
        return batch if masking is None else masking.train(batch, step, rows * jax.process_index())

    with contextlib.closing(prefetch(local_rows, start, PREFETCH)) as batches:
        yield (meshes.place_batch(batch, plan.program.mesh) for batch in batches)


def _peak_flops(plan: Plan) -> float | None:
    mesh = plan.program.mesh
    peak = meshes.peak_flops(mesh.devices.flat[0].device_kind, plan.program.transformer.dtype)
    return None if peak is None else peak * mesh.size


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _version() -> str:
    try:
        return importlib.metadata.version("slm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
