"""What the training loop needs of a teacher besides the objective: parameters on the mesh, entries of batches, and the
student's own text."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from slm.compress.rollout import is_on_policy, make_rollout
from slm.compress.teacher import Teaching
from slm.config import Experiment
from slm.training.state import TrainState
from slm.training.step import Program, Techniques, seen_by_model


class Lessons(NamedTuple):
    """Of one run; for one without a teacher, `NO_LESSONS`."""

    teacher: tuple = ()
    """What the compiled step takes behind state and batch."""
    entries: Callable[..., dict[str, np.ndarray]] = lambda *share: {}
    """(step, batch_size, process_index, process_count) -> further entries of this process's share of a batch."""
    rewrite: Callable[[TrainState, dict, int], dict] = lambda state, batch, step: batch
    """(state, placed batch, number of the step that it is for) -> batch, written by the student if it is its turn."""


NO_LESSONS = Lessons()


def lessons(cfg: Experiment, program: Program, techniques: Techniques, teaching: Teaching | None, data: Any) -> Lessons:
    """What the loop of this run calls. Puts the teacher's parameters on the mesh of `program`."""
    if teaching is None:
        return NO_LESSONS
    if teaching.cached is not None:
        return Lessons(entries=lambda *share: teaching.cached.read(*data.drawn(*share)))
    (abstract,) = program.teacher
    theirs = jax.tree.map(lambda a, one: jax.device_put(one, a.sharding), abstract, teaching.params)
    if teaching.translator is not None:
        return Lessons((theirs,), lambda *share: teaching.translator.entries(data.train_batch(*share)))
    return Lessons((theirs,), rewrite=_rewriting(cfg, program, techniques, data.tokenizer))


def _rewriting(cfg: Experiment, program: Program, techniques: Techniques, tokenizer: Any):
    if not cfg.distill.on_policy:
        return NO_LESSONS.rewrite
    ends = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    rollout = make_rollout(cfg, program.transformer, ends, tokenizer.vocab_size)
    shardings = jax.tree.map(lambda a: a.sharding, (program.state, program.batch))

    def write(state, batch):
        return rollout(seen_by_model(techniques.transforms, state.params, state.extra, state.step), batch, state.step)

    write = jax.jit(write, in_shardings=shardings, out_shardings=shardings[1])

    def rewrite(state, batch, step):
        return write(state, batch) if is_on_policy(cfg.distill, cfg.seed, step) else batch

    return rewrite
