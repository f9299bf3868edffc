"""What a run will cost, known before step 0: the step is compiled ahead of time from shapes alone."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from slm.config import Experiment
from slm.models.counts import flops_per_token
from slm.training import rules
from slm.training.optimizers import assignments
from slm.training.step import Program

PLAN = "plan.json"
"""File of a run folder."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, from XLA's own account of the compiled step."""

    arguments: int
    """State and batch. The new state takes the old one's place."""
    outputs: int
    """What the step returns besides the new state."""
    temporaries: int
    """Activations, gradients and everything else that lives during a step."""

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries


@dataclass(frozen=True)
class Plan:
    """A compiled train step with its price."""

    program: Program
    compiled: jax.stages.Compiled
    """The train step: (state, batch, *teacher) -> (state, metrics)."""
    compile_seconds: float
    memory: Memory | None
    """None where the backend does not say."""
    parameters: list[rules.Row]
    """One row a parameter: path, shape, and what the rules decided."""
    flops_per_token: float
    """Of a training step, forwards and backwards, without recomputation."""

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(row.shape) for row in self.parameters)


def make_plan(cfg: Experiment, program: Program) -> Plan:
    """Compiles the train step of `program`, which is build(cfg, mesh). Allocates nothing."""
    start = time.perf_counter()
    compiled = program.train.lower(program.state, program.batch, *program.teacher).compile()
    seconds = time.perf_counter() - start
    params = program.state.params
    shardings = jax.tree.map(lambda a: a.sharding, params)
    return Plan(
        program=program,
        compiled=compiled,
        compile_seconds=seconds,
        memory=memory_of(compiled),
        parameters=rules.table(params, assignments(cfg.optim, params) | {"sharding": shardings}),
        flops_per_token=flops_per_token(cfg.model, cfg.data.sequence_length)["train"],
    )


def keep_plan(run_dir: Path, memory: Memory | None, compile_seconds: float, runs: int = 1) -> None:
    """Writes what a step of a run takes into its folder; `runs`: how many share the program."""
    facts = {"compile_seconds": compile_seconds / runs} | (
        {} if memory is None else {"peak_bytes": memory.total // runs}
    )
    (run_dir / PLAN).write_text(json.dumps(facts) + "\n")


def memory_of(compiled: jax.stages.Compiled) -> Memory | None:
    """None where the backend does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
    )
