"""What a person sees of a run: tables before step 0, then one live line, or plain lines where no terminal listens."""

import os
import time
from dataclasses import fields
from typing import Any, Self

from jax.sharding import PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from slm.config import Experiment, ShrinkConfig
from slm.models.counts import cache_bytes
from slm.models.mixers import MIXERS, configured, layer_pattern
from slm.training.plan import Plan


def make_console(enabled: bool) -> Console:
    """Where tables and lines go: standard output, or nowhere. Files get lines wide enough for parameter names."""
    console = Console(quiet=not enabled, highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 140
    return console


class Progress:
    """Context manager around the loop. Says nothing if not `enabled`.

    Args:
      enabled: cfg.log.console, on one of the processes.
      start: step the loop begins with.
      total: step it ends with.
    """

    def __init__(self, enabled: bool, start: int, total: int):
        self._console = make_console(enabled)
        self._start, self._total = start, total
        self._began = time.monotonic()
        self._evaluation = ""
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            refresh_per_second=4,  # training may need the core that draws
            disable=not (enabled and self._console.is_terminal),
        )

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total, completed=self._start, numbers="")
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def step(self, step: int) -> None:
        """Moves the live line on."""
        self._bar.update(self._task, completed=step)

    def row(self, row: dict) -> None:
        """Shows the numbers of a row of the history."""
        if row.get("validation_bits_per_byte") is not None:
            self._evaluation = f"  bits/byte {row['validation_bits_per_byte']:.4f}"
        elif row.get("validation_loss") is not None:
            self._evaluation = f"  validation loss {row['validation_loss']:.4f}"
        mfu = f"  MFU {row['mfu']:.1%}" if row.get("mfu") is not None else ""
        rate = f"  {si(row['tokens_per_second']).rstrip()} tokens/s" if row.get("tokens_per_second") else ""
        numbers = f"loss {row['loss']:.4f}{rate}{mfu}{self._evaluation}  ETA {self._eta(row['step'])}"
        if self._bar.disable:
            self._console.print(f"step {row['step']}/{self._total}  {numbers}", soft_wrap=True)
        else:
            self._bar.update(self._task, completed=row["step"], numbers=numbers)

    def say(self, text: str) -> None:
        """One line above the live line."""
        self._console.print(text, soft_wrap=True)

    def _eta(self, step: int) -> str:
        if step <= self._start:
            return "?"
        # Evaluations and saves included: it is the time until the prompt comes back.
        seconds = (time.monotonic() - self._began) / (step - self._start) * (self._total - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def show_plan(cfg: Experiment, plan: Plan, data: list[dict[str, Any]], console: Console) -> None:
    """Prints the parameter table with what the rules decided, the data, the mesh, and the price of a step.

    `data`: the rows of slm.data.pipeline.Data.summary; [] without data.
    """
    console.print(_parameter_table(cfg, plan))
    if data:
        console.print(_data_table(data))
    console.print(_facts(cfg, plan))


def _parameter_table(cfg: Experiment, plan: Plan) -> Table:
    table = Table(title=f"{cfg.name}: {plan.parameter_count:,} parameters", title_justify="left")
    columns = list(plan.parameters[0].values)
    for name in ("parameter", "shape", "count", *columns):
        table.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
    for row in plan.parameters:
        shape = " × ".join(map(str, row.shape))
        table.add_row(row.path, shape, f"{row.parameters:,}", *(_cell(row.values[name]) for name in columns))
    return table


def _data_table(data: list[dict[str, Any]]) -> Table:
    table = Table()
    for name in data[0]:
        table.add_column(name.replace("_", " "), justify="left" if name in ("source", "side") else "right")
    for row in data:
        table.add_row(*map(_cell, row.values()))
    return table


def _facts(cfg: Experiment, plan: Plan) -> Table:
    mesh = plan.program.mesh
    facts = Table(show_header=False, box=None, pad_edge=False)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    facts.add_row("mesh", f"{axes} on {mesh.size} × {kind}")
    tokens = cfg.train.batch_size * cfg.data.sequence_length
    emulated = cfg.train.precision == "fp8" and mesh.devices.flat[0].platform == "cpu"
    computes = cfg.train.precision + (" (emulated: a CPU has none)" if emulated else "")
    facts.add_row("batch", f"{tokens:,} tokens in {cfg.train.accumulation} micro-batches, {computes}")
    facts.add_row("attention", ", ".join(_backends(cfg, plan)))
    for name, fact in _techniques(cfg):
        facts.add_row(name, fact)
    facts.add_row("compute", f"{si(plan.flops_per_token)}FLOP a token, {si(plan.flops_per_token * tokens)}FLOP a step")
    length = cfg.data.sequence_length
    cache = cache_bytes(cfg.model, 1, length, plan.program.transformer.dtype)
    facts.add_row("decoding", f"cache of {si(cache)}B for {length:,} tokens")
    if plan.memory:
        m = plan.memory
        parts = f"arguments {si(m.arguments)}B, temporaries {si(m.temporaries)}B, outputs {si(m.outputs)}B"
        facts.add_row("memory", f"{si(m.total)}B a device: {parts}")
    facts.add_row("compiled", f"in {plan.compile_seconds:.1f} s")
    return facts


def _techniques(cfg: Experiment) -> list[tuple[str, str]]:
    """What a run does besides plain training."""
    found = []
    sizes = {field.name: getattr(cfg.shrink, field.name) for field in fields(ShrinkConfig)[:5]}
    cut = [f"{name} {size}" for name, size in sizes.items() if size] if cfg.shrink.on else []
    if cfg.shrink.learned:
        found.append(("shrinks", f"by gates, to {', '.join(cut)}"))
    if cfg.model.init_from is not None:
        mixers = ["mixers " + " ".join(cfg.convert.attention)] if cfg.convert.on else []
        found.append(
            ("begins", ", ".join(["as " + cfg.model.init_from, *([] if cfg.shrink.learned else cut), *mixers]))
        )
    if cfg.distill.on:
        teacher = cfg.distill.teacher or cfg.distill.cached
        found.append(("taught", f"by {teacher}: {cfg.distill.loss}, alpha {cfg.distill.alpha}"))
    if cfg.prune.on:
        amount = f"{cfg.prune.sparsity:.0%}" if cfg.prune.pattern == "unstructured" else cfg.prune.pattern
        found.append(("pruned", f"{amount} by {cfg.prune.criterion}, {cfg.prune.schedule}"))
    if cfg.quantize.on:
        groups = f", groups of {cfg.quantize.group_size}" if cfg.quantize.group_size else ""
        found.append(("rounded", f"{cfg.quantize.scheme}{groups}, {cfg.quantize.method}"))
    return found


def _backends(cfg: Experiment, plan: Plan) -> list[str]:
    """What `auto` came to, for each mechanism of the model."""
    platform, dtype = plan.program.mesh.devices.flat[0].platform, plan.program.transformer.dtype
    length, segments = cfg.data.sequence_length, cfg.data.packing == "documents"
    return [
        f"{name} by {row.mixer.backend(configured(row, cfg.model), length, dtype, platform, segments)}"
        for name, row in ((name, MIXERS[name]) for name in dict.fromkeys(layer_pattern(cfg.model)))
    ]


def si(value: float) -> str:
    """Three digits and a prefix: 12345 -> "12.3 k"."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"


def _cell(value: Any) -> str:
    if isinstance(value, PartitionSpec):
        return ", ".join(str(axis or "-") for axis in value) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)
